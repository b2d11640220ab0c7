"""A small run in forked processes that are killed, starved of disk, or find their files damaged."""

import hashlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging

import halve
from halve.checkpoint.durable import CRASH_LOG, CRASH_POINT
from halve.errors import AlreadyCompleteError, HalveError
from halve.model.reconstruct import Reconstruction
from models import OF_ONE_RUN, decoder
from tiny_tokenizers import SENTENCES, byte_bpe

REFUSED, BROKEN = 10, 11
logging.disable_progress_bar()


def tell(sentence: str) -> None:
    """Say what was tried; ``pytest -rP`` shows it."""
    sys.stdout.write(f"{sentence}\n")


@dataclass(frozen=True)
class Job:
    """What is pruned, and where to."""

    model: Path
    text: Path
    out: Path
    work: Path | None = None
    stream: str = "never"

    def elsewhere(self, name: str) -> "Job":
        work = None if self.work is None else self.work.with_name(f"{name}-work")
        return replace(self, out=self.out.with_name(name), work=work)

    def call(self) -> None:
        """Begin the run, or continue it."""
        halve.prune(
            str(self.model),
            self.out,
            method="wanda",
            reconstruct=Reconstruction(epochs=1, learning_rate=1e-3),
            calibration=str(self.text),
            samples=4,
            seq_len=16,
            work=self.work,
            stream=self.stream,
            min_expert_tokens=1,
            fallback="magnitude",
        )

    def carry_on(self) -> None:
        """Do what a user does after a crash: call again, unless the checkpoint is there."""
        try:
            self.call()
        except AlreadyCompleteError:
            pass
        except HalveError as error:
            if "holds a finished checkpoint" not in str(error):
                raise


def make_job(folder: Path, *, work: bool = False, family: str = "llama", stream: str = "never") -> Job:
    """Write a tiny model of three blocks and a text."""
    model, text = folder / "dense", folder / "text.txt"
    decoder(family, vocab_size=320).save_pretrained(model, max_shard_size="60KB")
    byte_bpe().save_pretrained(model)
    text.write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    return Job(model, text, folder / "out", folder / "work" if work else None, stream)


def forked(action, **environment) -> int:
    """Run ``action`` in a process of its own and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            os.environ.update(environment)
            torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here: waiting for them hangs or crashes
            action()
        except HalveError as error:
            sys.stderr.write(f"{error}\n")
            code = REFUSED
        except BaseException:  # noqa: BLE001 - the child must not return into pytest
            traceback.print_exc()
            code = BROKEN
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crash_at(point: str, action) -> None:
    """Run ``action`` until ``point``, where it must be killed: a crash that did not happen proves nothing."""
    assert forked(action, **{CRASH_POINT: point}) == -signal.SIGKILL, point


def crash_points(job: Job, log: Path) -> list[str]:
    """Return every crash point that a whole run passes, in order."""
    assert forked(job.call, **{CRASH_LOG: str(log)}) == 0
    return log.read_text(encoding="utf-8").split()


def tree(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file but those that hold times, by name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in OF_ONE_RUN
    }


def loadable(directory: Path) -> bool:
    """Whether a loader could take a directory for a model."""
    return (directory / "config.json").exists()


def failures(job: Job, points: list[str], golden: dict[str, str]) -> list[str]:
    """Kill a run at each point and carry on; return the points after which something was lost or wrong."""
    wrong = []
    for place, point in enumerate(points):
        trial = job.elsewhere(f"trial-{place}")
        crash_at(point, trial.call)
        half = loadable(trial.out) and {name: h for name, h in tree(trial.out).items() if name in golden} != golden
        if half or forked(trial.carry_on) != 0 or tree(trial.out) != golden:
            wrong.append(point)
    return wrong
