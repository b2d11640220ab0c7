"""The fault suite against stores that are bad on purpose: a suite that cannot go red proves nothing."""

import pytest

from halve.checkpoint import directory as checkpoint_files
from halve.checkpoint import durable
from halve.checkpoint.shards import build_header, tensor_bytes
from halve.run import directory as run_directory
from halve.run import manifest as run_manifest
from harness import REFUSED, crash_at, crash_points, failures, forked, make_job, tree


def without_renaming(path, chunks, kind):
    """Write a file in place, a piece at a time, as most tools do."""
    digest = durable.hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.crash_point(f"{kind}.start")
    with path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            for half in (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]):
                file.write(half)
                file.flush()
                durable.crash_point(f"{kind}.written")
    return digest.hexdigest()


def manifest_first(self, tensors, record):
    """Promise a block before it is there."""
    entries = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    content = [build_header(entries, {"record": run_directory.json.dumps(record)})]
    content += [tensor_bytes(tensor) for tensor in tensors.values()]
    digest = durable.hashlib.sha256()
    for chunk in content:
        digest.update(chunk)
    name = f"block-{len(self._manifest.blocks):05d}.safetensors"
    self._manifest.blocks.append((name, digest.hexdigest()))
    self._manifest.write(self.state)
    durable.write_file(self.state / name, content, "block")


def trusting(_path, _expected):
    """Take whatever lies there for what was written."""


def put_config_first(self, files=None):
    """Give a checkpoint its config before its weights."""
    if files is not None:
        self._manifest.files = dict(files)
        self._manifest.write(self.state)
    for name in sorted(self._manifest.files, key=lambda name: name != "config.json"):
        if (self.staging / name).exists():
            durable.move_file(self.staging / name, self.out / name, "file")
    self.remove()


def crash_and_judge(tmp_path, chosen):
    job = make_job(tmp_path)
    points = [point for point in crash_points(job, tmp_path / "points.txt") if point.startswith(chosen)]
    assert points
    return failures(job, points, tree(job.out))


@pytest.mark.parametrize(
    ("owner", "name", "bad", "chosen"),
    [
        (run_manifest, "write_file", without_renaming, ("manifest.written",)),
        (run_directory.RunDirectory, "commit", manifest_first, ("block.start", "block.written")),
        (run_directory.RunDirectory, "publish", put_config_first, ("file.start",)),
    ],
)
def test_a_bad_store_is_caught(tmp_path, monkeypatch, owner, name, bad, chosen):
    monkeypatch.setattr(owner, name, bad)
    assert crash_and_judge(tmp_path, chosen)


@pytest.mark.parametrize("verifying", [True, False])
def test_a_store_that_trusts_its_files_gives_wrong_bytes(tmp_path, monkeypatch, verifying):
    job = make_job(tmp_path)
    assert forked(job.call) == 0
    trial = job.elsewhere("trial")
    crash_at("block.start@3", trial.call)
    block = trial.out / checkpoint_files.HOME / "block-00000.safetensors"
    content = bytearray(block.read_bytes())
    kept = next(place for place in range(len(content) - 4, 0, -4) if any(content[place : place + 4]))
    content[kept + 2] ^= 4  # in the mantissa of the last weight that is not zero
    block.write_bytes(content)
    if not verifying:
        monkeypatch.setattr(run_directory, "check_hash", trusting)
        monkeypatch.setattr(durable, "check_hash", trusting)
    status = forked(trial.carry_on)
    assert (status == REFUSED) is verifying
    assert verifying or tree(trial.out) != tree(job.out)


def test_the_same_points_are_survived_by_the_real_store(tmp_path):
    assert crash_and_judge(tmp_path, ("manifest.written", "block.written@2", "file.start@2")) == []
