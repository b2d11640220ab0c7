"""What other libraries do not promise to keep is still there, and is written down where a reader looks for it."""

import re
from pathlib import Path

import pytest

import halve
from halve import torch_internals, transformers_internals
from halve.errors import HalveError
from halve.leaning import Leaning, faults
from halve.learning import lora

ROOT = Path(__file__).parents[1]
PACKAGE = Path(halve.__file__).parent
ENTRIES = (*torch_internals.LEANINGS, *transformers_internals.LEANINGS, *lora.LEANINGS)
OWN_MODULES = {"torch_internals.py", "transformers_internals.py", "lora.py"}


def entry(**changes):
    given = {"path": "json.dumps", "use": "writing", "breaks": "nothing is written", "test": "tests/test_leaning.py"}
    return Leaning(**{**given, **changes})


@pytest.mark.parametrize("leaning", ENTRIES, ids=lambda leaning: leaning.path)
def test_what_is_leaned_on_is_there_as_it_was(leaning):
    assert not leaning.fault(), leaning.fault()


@pytest.mark.parametrize("leaning", ENTRIES, ids=lambda leaning: leaning.path)
def test_the_page_and_the_table_agree(leaning):
    rows = [line for line in (ROOT / "docs" / "leaning.md").read_text().splitlines() if f"| `{leaning.path}` |" in line]
    assert len(rows) == 1, f"{leaning.path} is not on docs/leaning.md"
    assert [leaning.use, leaning.breaks, f"`{leaning.test}`"] == [cell.strip() for cell in rows[0].split("|")[2:5]]
    assert (ROOT / leaning.test).is_file()


def test_the_page_has_nothing_else():
    text = (ROOT / "docs" / "leaning.md").read_text()
    assert re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE) == [leaning.path for leaning in ENTRIES]


def test_what_is_gone_or_was_changed_is_told_in_a_sentence():
    gone, changed = entry(path="json.decoder.NoSuch.thing"), entry(parameters=("obj", "fast"))
    assert faults([entry(), entry(parameters=("obj", "skipkeys")), entry(path="json.none", optional=True)]) == []
    assert "has no json.decoder.NoSuch.thing, which Halve needs: without it, nothing is written" in gone.fault()
    assert "json.dumps takes obj, skipkeys" in changed.fault()
    assert "Halve gives it obj, fast" in changed.fault()
    with pytest.raises(HalveError, match=r"install a version of json that pyproject\.toml allows"):
        gone.find()


def test_names_of_the_table_can_be_imported_and_no_others(monkeypatch):
    from halve.transformers_internals import Conv1D

    assert Conv1D.__name__ == "Conv1D"
    with pytest.raises(AttributeError, match="Nothing is not in the table"):
        _ = transformers_internals.Nothing
    table = {"Lost": entry(path="transformers.pytorch_utils.Lost")}
    monkeypatch.setattr(transformers_internals, "_IMPORTED", table)
    with pytest.raises(HalveError, match=r"has no transformers\.pytorch_utils\.Lost"):
        _ = transformers_internals.Lost


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_else_leans(path):
    """Public are what transformers exports at its top, and its logging; of torch, what has no leading underscore."""
    if path.name in OWN_MODULES:
        return
    text = path.read_text(encoding="utf-8")
    submodules = re.findall(r"^ *(?:from|import) transformers\.(\w+)", text, re.MULTILINE)
    assert set(submodules) <= {"utils"}
    assert not re.search(r"\btorch\.(?:\w+\.)*_(?!_)\w", re.sub(r"torch\.nn\.modules\.conv import _ConvNd", "", text))
