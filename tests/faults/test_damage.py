"""Damaged files of an unfinished run: an error that names the file, or the right bytes; never anything else."""

import random
import shutil

import pytest

from halve.checkpoint.directory import HOME
from halve.checkpoint.durable import CRASH_POINT
from harness import REFUSED, crash_at, forked, loadable, make_job, tell, tree

STOPS = ("block.start@3", "file.start@3")
"""In the last block, and while the finished files move to their places."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A job, what it writes, and for each stop the directory that it left."""
    job = make_job(tmp_path_factory.mktemp("damage"))
    assert forked(job.call) == 0
    left = {}
    for stop in STOPS:
        trial = job.elsewhere(stop.replace("@", "-"))
        crash_at(stop, trial.call)
        left[stop] = trial.out
    return job, tree(job.out), left


def flip(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


DAMAGE = {
    "a flipped bit": flip,
    "a byte less": lambda content, _chance: content[:-1],
    "half of it": lambda content, _chance: content[: len(content) // 2],
    "nothing in it": lambda _content, _chance: b"",
    "zeros at its end": lambda content, _chance: content[:-16] + bytes(min(16, len(content))),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_or_does_not_matter(stopped, stop, damage, capfd):
    job, expected, left = stopped
    chance = random.Random(f"{stop} {damage}")
    names = [name for name in tree(left[stop]) if not name.endswith(("/lock", ".tmp"))]
    assert len(names) >= 4
    refused = 0
    for place, name in enumerate(names):
        trial = job.elsewhere(f"{stop.replace('@', '-')}-{damage.replace(' ', '-')}-{place}")
        shutil.copytree(left[stop], trial.out)
        path = trial.out / name
        path.write_bytes(DAMAGE[damage](path.read_bytes(), chance))
        capfd.readouterr()
        status = forked(trial.call)
        said = capfd.readouterr().err
        if status == REFUSED:
            refused += 1
            assert path.name in said, (name, said)
            assert not loadable(trial.out)
            assert path.exists()  # nothing is started anew behind the user's back
        else:
            assert (status, tree(trial.out)) == (0, expected), name
    tell(f"{damage} in each of {len(names)} files: {refused} refused by name, {len(names) - refused} of no effect")
    assert refused >= 3


@pytest.mark.parametrize("name", ["block-00000.safetensors", "block-00001.safetensors"])
def test_a_missing_block_is_named(stopped, name, capfd):
    job, _, left = stopped
    trial = job.elsewhere(f"missing-{name}")
    shutil.copytree(left[STOPS[0]], trial.out)
    (trial.out / HOME / name).unlink()
    assert forked(trial.call) == REFUSED
    assert f"{name} is missing" in capfd.readouterr().err


def test_swapped_blocks_are_found(stopped, capfd):
    job, _, left = stopped
    trial = job.elsewhere("swapped")
    shutil.copytree(left[STOPS[0]], trial.out)
    first, second = (trial.out / HOME / f"block-0000{i}.safetensors" for i in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    assert forked(trial.call) == REFUSED
    assert "block-00000.safetensors was changed" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["shard", "text", "config"])
def test_a_changed_input_is_refused_by_name(tmp_path, kind, capfd):
    job = make_job(tmp_path)
    assert forked(job.call, **{CRASH_POINT: "block.start@2"}) < 0
    if kind == "shard":
        path = max(job.model.glob("*.safetensors"))
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif kind == "config":
        path = job.model / "generation_config.json"
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    else:
        path = job.text
        path.write_text("zebra " + job.text.read_text(encoding="utf-8"), encoding="utf-8")
    assert forked(job.call) == REFUSED
    said = capfd.readouterr().err
    assert "begun differently" in said
    assert ("calibration was" if kind == "text" else f"model.{path.name} was") in said
