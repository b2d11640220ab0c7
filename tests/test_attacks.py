"""Every crafted input in ``attacks/`` is refused, in one sentence that names it, before anything is done."""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halve.checkpoint.load import load_model
from halve.cli.app import app
from halve.cli.errors import EXIT_FAILED, EXIT_REFUSED
from halve.errors import HalveError
from halve.packed.load import load
from models import decoder
from tiny_tokenizers import SENTENCES, byte_bpe

ATTACKS = Path(__file__).parent.parent / "attacks"
NAMES = sorted(path.name for path in ATTACKS.iterdir() if path.is_dir())
EXPECTED = dict(
    re.findall(r"^\| `([\w-]+)` \| .*? \| (.*?) \|$", (ATTACKS / "README.md").read_text("utf-8"), re.MULTILINE)
)


@pytest.fixture
def dense(tmp_path):
    decoder("llama", vocab_size=320).save_pretrained(tmp_path / "dense")
    byte_bpe().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def attack(name, dense):
    """Lay the crafted files over a sound checkpoint; an index or a pickle takes the place of its weights."""
    files = list((ATTACKS / name).iterdir())
    if any(path.suffix == ".bin" or path.name.endswith("index.json") for path in files):
        (dense / "model.safetensors").unlink()
    if any(path.name == "adapter_config.json" for path in files):
        (dense / "config.json").unlink()
    (dense.parent / "outside.txt").write_text("not of the checkpoint", encoding="utf-8")
    for path in files:
        (dense / path.name).unlink(missing_ok=True)
        shutil.copy(path, dense / path.name, follow_symlinks=False)
    return dense


def test_every_attack_is_listed_and_every_entry_is_there():
    assert sorted(EXPECTED) == NAMES
    assert len(NAMES) >= 50


def test_the_checkpoint_without_an_attack_is_fine(dense):
    assert load_model(dense).tokenizer is not None


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("text-")])
def test_a_crafted_checkpoint_is_refused(name, dense):
    load_it = load if name.startswith("packed-") else load_model
    with pytest.raises(HalveError) as caught:
        load_it(attack(name, dense))
    message = str(caught.value)
    assert EXPECTED[name] in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_refuses_it_and_leaves_nothing(name, dense, tmp_path):
    text = next((ATTACKS / name).iterdir()) if name.startswith("text-") else tmp_path / "text.txt"
    if text.parent == tmp_path:
        text.write_text(" ".join(SENTENCES * 40), encoding="utf-8")
        attack(name, dense)
    asked = ["--method", "wanda", "--calibration", str(text), "--samples", "4", "--seq-len", "16"]
    command = ["unpack"] if name.startswith("packed-") else ["prune", *asked]
    result = CliRunner().invoke(app, [*command, str(dense), "--out", str(tmp_path / "out")])
    assert result.exit_code in {EXIT_REFUSED, EXIT_FAILED}
    assert isinstance(result.exception, SystemExit)
    *before, last = result.stderr.splitlines()
    assert EXPECTED[name] in last
    assert not before or "what the run takes" in before[1]  # which a text is read after
    assert result.stderr.count("error: ") == 1
    assert not (tmp_path / "out").exists()
