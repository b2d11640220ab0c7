"""A disk that is full at any write: the run stops with a sentence, loses at most a block, and goes on when there is
room."""

import errno
import os
import resource
import signal

import pytest

from halve.checkpoint import durable
from halve.checkpoint.directory import HOME
from harness import REFUSED, forked, loadable, make_job, tell, tree


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    job = make_job(tmp_path_factory.mktemp("disk"))
    assert forked(job.call) == 0
    return job, tree(job.out)


def full_from(write, job):
    """Run ``job`` on a disk that has no room from the given write on, then let it report how many writes there were."""
    real, passed = durable._append, [0]

    def append(file, chunk):
        passed[0] += 1
        if passed[0] > write:
            real(file, bytes(chunk)[: len(chunk) // 2])  # a full disk takes what fits
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, chunk)

    durable._append = append
    job.call()


@pytest.mark.parametrize("step", [pytest.param(6, id="sixth"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_no_room_at_any_write(golden, step):
    job, expected = golden
    kept = []
    for write in range(0, 400, step):
        one = job.elsewhere(f"full-{step}-{write}")
        if forked(lambda write=write, one=one: full_from(write, one)) == 0:
            break
        assert not loadable(one.out)
        assert not list(one.out.rglob("*.tmp"))
        kept = sorted(path.name for path in one.out.rglob("block-*"))
        assert forked(one.carry_on) == 0
        assert tree(one.out) == expected
        if write == 6:  # tokens and the first manifest are three writes, a block of 23 parameters many
            assert kept == []
    tell(f"{write // step} of {write} writes found no room, all survived")
    assert write > 60
    assert kept == [f"block-{index:05d}.safetensors" for index in range(3)]  # of the last trial that failed


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_limit_on_file_sizes(golden, share):
    job, expected = golden
    limit = int(share * max((job.out / name).stat().st_size for name in expected))
    one = job.elsewhere(f"limited-{limit}")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        one.call()

    assert forked(limited) == REFUSED
    assert not loadable(one.out)
    assert forked(one.carry_on) == 0
    assert tree(one.out) == expected


def test_the_sentence_says_what_to_do(golden, capfd):
    job, _ = golden
    one = job.elsewhere("sentence")

    def late():
        real = os.fsync

        def fsync(descriptor):
            if (one.out / HOME / "block-00001.safetensors").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        os.fsync = fsync
        one.call()

    assert forked(late) == REFUSED
    assert "failed (No space left on device): free some space and call again" in capfd.readouterr().err
