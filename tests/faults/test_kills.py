"""kill -9 at every named point, at random times, and again and again: the bytes of an uninterrupted run come out."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest

from harness import crash_points, failures, forked, loadable, make_job, tell, tree

SAMPLED_OR_ALL = [pytest.param(False, id="sampled"), pytest.param(True, id="all", marks=pytest.mark.slow)]


def chosen(points, every):
    """Return all points, or of each name one that chance picks: every kind of write, in some block."""
    if every:
        return points
    names = {}
    for point in points:
        names.setdefault(point.partition("@")[0], []).append(point)
    chance = random.Random(0)
    return [chance.choice(same) for same in names.values()]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A job, the crash points that it passes, and what it writes when nothing happens."""
    job = make_job(tmp_path_factory.mktemp("kills"))
    points = crash_points(job, job.out.with_name("points.txt"))
    return job, points, tree(job.out)


@pytest.fixture(scope="module")
def whole(golden):
    """Seconds that the job takes at its fastest: one slow start must not push every kill past the end."""
    job, _, _ = golden

    def timed(trial):
        begun = time.perf_counter()
        assert forked(job.elsewhere(f"timed-{trial}").call) == 0
        return time.perf_counter() - begun

    return min(timed(trial) for trial in range(3))


def test_the_points_cover_every_kind_of_write(golden):
    _, points, _ = golden
    for point in (
        "tokens.synced@1",
        "block.written@1",
        "block.renamed@3",
        "manifest.renamed@4",
        "shard.done@2",
        "halve.json.start@1",
        "config.json.renamed@2",
        "model.safetensors.index.json.start@2",
        "file.renamed@1",
        "remove.start@1",
        "remove.done@1",
        "unlock@1",
    ):
        assert point in points


@pytest.mark.parametrize("every", SAMPLED_OR_ALL)
def test_a_kill_at_every_point_costs_nothing_but_time(golden, every):
    job, points, expected = golden
    points = chosen(points, every)
    assert len(points) > 20
    assert failures(job, points, expected) == []
    tell(f"{len(points)} crash points killed at, all survived")


def killed_after(seconds, action):
    """Run ``action`` for a while; return whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_times(golden, whole, kills):
    job, _, expected = golden
    chance = random.Random(kills)
    killed = 0
    for trial in range(kills):
        one = job.elsewhere(f"random-{kills}-{trial}")
        killed += killed_after(chance.uniform(0.0, whole), one.call)
        assert not loadable(one.out) or expected.items() <= tree(one.out).items()
        assert forked(one.carry_on) == 0
        assert tree(one.out) == expected
    tell(f"{killed} of {kills} kills at random times came before the end, all survived")
    assert killed > kills // 2


@pytest.mark.parametrize("chains", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_chains_of_kills(golden, whole, chains):
    job, _, expected = golden
    chance = random.Random(1)
    killed = 0
    for trial in range(chains):
        one = job.elsewhere(f"chain-{chains}-{trial}")
        # Slices far shorter than the run: its first one is cut, and so are most of the resumed ones.
        killed += sum(killed_after(chance.uniform(0.1, 0.4) * whole, one.carry_on) for _ in range(4))
        assert forked(one.carry_on) == 0
        assert tree(one.out) == expected
    tell(f"{killed} kills in {chains} chains, all survived")
    assert killed > 2 * chains


@pytest.mark.parametrize("every", SAMPLED_OR_ALL)
def test_blocks_may_be_kept_elsewhere(tmp_path, every):
    job = make_job(tmp_path, work=True)
    points = crash_points(job, tmp_path / "points.txt")
    assert not any(job.work.iterdir()) if job.work.exists() else True
    theirs = [point for point in points if point.startswith(("work", "block", "manifest", "remove"))]
    assert failures(job, chosen(theirs, every), tree(job.out)) == []


@pytest.mark.parametrize("every", SAMPLED_OR_ALL)
def test_weights_may_stay_on_disk(tmp_path, every):
    job = make_job(tmp_path, family="mixtral", stream="always")
    points = crash_points(job, tmp_path / "points.txt")
    assert "weights.written@1" in points
    theirs = [point for point in points if point.startswith(("weights", "block", "manifest", "shard", "remove"))]
    assert failures(job, chosen(theirs, every), tree(job.out)) == []
    in_memory = replace(job, out=tmp_path / "in-memory", stream="never")
    assert forked(in_memory.call) == 0
    assert tree(in_memory.out) == tree(job.out)
