"""A worker: holds shards of the calibration set, takes them through the blocks, and prunes what it is given."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from halve.checkpoint.durable import crash_point
from halve.checkpoint.load import resolve
from halve.checkpoint.room import check_space
from halve.device import evaluation_mode
from halve.errors import HalveError, ResumeMismatchError, one_line
from halve.memory import trim
from halve.model.blocks import Batch, eager_experts, working_copy
from halve.model.collect import Sums
from halve.model.reconstruct import Reconstruction
from halve.order import recording
from halve.order.reordering import Reorderer, reordered
from halve.provenance import deciding_environment, differences, flat, source_fields
from halve.run.executor import Job, solve_bundle
from halve.run.fingerprint import device_name
from halve.run.local import LocalExecutor
from halve.run.loop import put_tensor, survey
from halve.run.phases import Phase, Phases
from halve.run.request import Request
from halve.serial import from_plain
from halve.whole_model import load_found
from halve.workers import terms
from halve.workers.messages import Message, pack, unpack
from halve.workers.sums import NotThereError, on_host, statistics_of, told

_MAY_DIFFER = ("environment.platform",)
"""Fields of the fingerprint in which nodes of equal hardware may differ: the system's version decides no bytes."""
_FOLDER = "halve-worker-"


def must_agree(mark: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of a run's fingerprint that a worker must have too."""
    wanted = ("model.", "environment.")
    return {
        name: value
        for name, value in mark.items()
        if (name.startswith(wanted) and name not in _MAY_DIFFER) or name == "device"
    }


@dataclass
class _Site:
    """A loaded model, with the shards of the calibration set that go through it together.

    Attributes:
        job: what is worked on.
        executor: that works on it.
        shards: indices of its shards.
        block: the block that it is at.
        collected: whether it has gathered that block's statistics.
        parts: what was summed over that block's inputs and not fetched, each with the first of its shards.
    """

    job: Job
    executor: LocalExecutor
    shards: Sequence[int]
    block: int
    collected: bool
    parts: dict[int, Sums]


def _answering(method: Callable[..., Message]) -> Callable[..., Message]:
    """Let a method answer with what went wrong, instead of raising it, and count the seconds that it takes."""

    @wraps(method)
    def answer(self: "Worker", *args: Any) -> Message:
        started = time.perf_counter()
        crash_point(f"worker.{method.__name__}.start")
        try:
            found = method(self, *args)
        except NotThereError as error:
            return pack({"failed": [terms.LOST, str(error)]})
        except HalveError as error:
            return terms.failed(error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            text = f"a worker on {socket.gethostname()} ran out of memory ({error}): use shorter sequences (seq_len)"
            return terms.failed(HalveError(text))
        except OSError as error:
            text = f"a worker on {socket.gethostname()} could not read or write a file ({one_line(error)})"
            return terms.failed(HalveError(f"{text}: free some space there, then go on with halve resume"))
        else:
            crash_point(f"worker.{method.__name__}.done")
            return found
        finally:
            self.seconds[method.__name__] = self.seconds.get(method.__name__, 0.0) + time.perf_counter() - started

    return answer


class Worker:
    """One worker; its methods are told plain values and messages, and answer with a message.

    Attributes:
        seconds: spent in each method.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._sites: list[_Site] = []
        self._open = ExitStack()
        self._batches: list[Batch] = []
        self._charge: terms.Charge | None = None
        self._scratch: Path | None = None
        self._model = Path()

    @_answering
    def hire(self, charge: Message) -> Message:
        """Take on a charge, and say whether the model's files are needed.

        Raises:
            ResumeMismatchError: answered where versions or the processor differ from the driver's.
        """
        content, tensors = unpack(charge, terms.Charge)
        torch.set_num_threads(content.threads)
        self._charge = content
        self._batches = [{} for _ in range(content.batches)]
        for name, tensor in tensors.items():
            batch, _, argument = name.partition(".")
            self._batches[int(batch)][argument] = tensor.clone()  # type: ignore[index]
        self._scratch = _scratch(content.scratch)
        torch.use_deterministic_algorithms(content.mark.get("environment.deterministic") == "True")
        found = {name: str(value) for name, value in flat("environment", deciding_environment()).items()}
        request = from_plain(Request, content.request)
        found["device"] = device_name(request.placement.target)
        self._refuse({name: value for name, value in content.mark.items() if not name.startswith("model.")}, found)
        self._model = Path(content.model)
        present = self._model.exists()
        if not present:
            check_space(self._scratch, sum(content.files.values()), "the model's files, for a worker")
            self._model = self._scratch / "model" / (self._model.name if len(content.files) == 1 else "")
        return pack({"needs_files": not present, "node": socket.gethostname()})

    @_answering
    def receive(self, name: str, chunk: Message) -> Message:
        """Add bytes to a file of the model, which was named in the charge."""
        charge = self._charged()
        if name not in charge.files:
            raise HalveError(f"{name!r} is no file of the model that this worker was told of")
        path = self._folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(np.asarray(chunk, dtype=np.uint8).data)
        return pack({})

    @_answering
    def open(self, shards: list[int]) -> Message:
        """Load the model for shards of the calibration set, which begin at the first block.

        Raises:
            ResumeMismatchError: answered where the model's files are not the driver's.
        """
        charge = self._charged()
        request = from_plain(Request, charge.request)
        source = resolve(self._model, trust_remote_code=request.loading.trust_remote_code)
        if not self._sites:
            files = {name: value for name, value in charge.mark.items() if name.startswith("model.")}
            self._refuse(files, source_fields(source))
        folder = self._folder / f"site-{len(self._sites)}"
        loaded = load_found(source, None, request.loading.attention, folder if source.shards else None)
        placement, settings = request.placement, request.settings
        self._open.enter_context(evaluation_mode(loaded.model))
        self._open.enter_context(eager_experts(loaded.model))
        plan, runs = survey(loaded.model, self._batches, settings, loaded.weights, charge.together)
        numbers = [batch for shard in shards for batch in range(*charge.shards[shard])]
        ranges, first = [], 0
        for shard in shards:
            start, stop = charge.shards[shard]
            ranges.append(range(first, first + stop - start))
            first += stop - start
        job = Job(
            model=loaded.model,
            plan=plan,
            runs=runs,
            batches=[self._batches[number] for number in numbers],
            numbers=numbers,
            shards=ranges,
            settings=settings,
            device=placement.target,
            precision=placement.precision,
            weights=loaded.weights,
            hidden=lambda name: folder / "hidden" / name,
            phases=Phases(placement.target),
            tell=_tell_nobody,
            collect=charge.collect,
            fixed=charge.fixed,
            neighbours=charge.neighbours,
        )
        self._sites.append(_Site(job, LocalExecutor(job), shards, 0, collected=False, parts={}))
        return pack({})

    @_answering
    def collect(self, block: int) -> Message:
        """Sum over the inputs of a block, shard by shard.

        Leading shards, from the very first on, are summed to one: whoever adds all up would add them in that order.
        The sums of all others are kept apart, in the memory of the machine.
        """
        parts = []
        for site in self._sites:
            if not site.shards or site.block != block or site.collected:
                continue
            site.executor.begin(block)
            for place, sums in enumerate(site.executor.shard_sums(block)):
                shard = site.shards[place]
                if place and shard == place:  # so are all before it
                    site.parts[0].absorb(sums)
                else:
                    site.parts[shard] = sums if not shard else on_host(sums)
            site.collected = True
            parts += [told(site.parts, site.shards, first) for first in site.parts]
        return pack({"parts": parts})

    @_answering
    def sums(self, first: int, leader: str) -> Message:
        """Return sums over the inputs of a matrix, once.

        Args:
            first: the first of the shards that they are of.
            leader: name of the matrix.
        """
        site = next(each for each in self._sites if first in each.parts)
        found = site.parts[first].accumulators.pop(leader)
        return pack({"d_in": found.d_in, "counts": list(found.counts)}, found.tensors)

    @_answering
    def folds(self, block: int) -> Message:
        """Find the folds of a block, which is run for that: its shards were summed here."""
        site = next(each for each in self._sites if each.collected and each.block == block)
        folds, found = site.executor.folds(block)
        return pack({"folds": [recording.fold_to_plain(fold) for fold in folds], "found": found})

    @_answering
    def choose(self, task: Message, sums: list[Any]) -> Message:
        """Choose an order for the inputs of a matrix.

        Args:
            task: which, and what is tied to them.
            sums: as for `solve`.
        """
        content, _ = unpack(task, terms.Choice)
        job = self._sites[0].job
        name = job.plan.blocks[content.block]
        statistics = statistics_of(content.matrix, sums, job.device)
        work = working_copy(job.model.get_submodule(name), job.device)
        job.weights.release(name)
        cautions: list[str] = []
        folds = [recording.fold_from_plain(fold) for fold in content.folds]
        reorderer = Reorderer(job.settings.pattern, ())
        matrices = job.plan.of_block(content.block)
        orders = reorderer.choose(name, work, folds, matrices, {content.matrix: statistics}, cautions.append)
        return pack({"orders": [recording.to_plain(order) for order in orders], "cautions": cautions})

    @_answering
    def solve(self, task: Message, sums: list[Any]) -> Message:
        """Prune matrices that share their statistics.

        Args:
            task: which, and how.
            sums: what was summed over their inputs, in the order of shards: messages, or references to them.
        """
        content, _ = unpack(task, terms.Task)
        site = self._sites[0]
        known = {matrix.name: matrix for matrix in site.job.plan.of_block(content.block)}
        bundle = [known[name] for name in content.matrices]
        orders = [recording.from_plain(order) for order in content.orders]
        statistics = statistics_of(bundle[0].name, sums, site.job.device)
        for order in orders:
            index = order.of_inputs(bundle[0])
            if statistics is not None and index is not None:
                statistics = reordered(statistics, index)
        with site.job.phases.timing(Phase.SOLVE):
            return terms.solved(solve_bundle(site.job, bundle, statistics, content.options, orders=orders))

    @_answering
    def reconstruct(self, tuning: Message) -> Message:
        """Tune what is left of a block, for whose shards this worker holds all."""
        content, tensors = unpack(tuning, terms.Tuning)
        (site,) = (each for each in self._sites if each.shards)
        options = from_plain(Reconstruction, content.options)
        tuned, changed = site.executor.reconstruct(content.block, tensors, options)
        return pack({"tuned": asdict(tuned)}, changed)

    @_answering
    def advance(self, changed: Message) -> Message:
        """Take the shards that are at a block through it, now that it is pruned."""
        content, tensors = unpack(changed, terms.Changed)
        for site in self._sites:
            if not site.shards or site.block != content.block:
                continue
            if site.collected:
                site.executor.finish(content.block, tensors)
            else:
                site.executor.begin(content.block)
                site.executor.follow(content.block, tensors)
            if len(site.job.runs) > 1:  # what enters a later stack follows from this one
                for name, tensor in tensors.items():
                    put_tensor(site.job.model, site.job.weights, name, tensor)
            site.job.weights.release(site.job.plan.blocks[content.block])  # which a solve has read again
            site.block, site.collected, site.parts = content.block + 1, False, {}
        trim()
        return pack({})

    @_answering
    def spent(self) -> Message:
        """Return the seconds spent by method; as any answer it says that all that was asked before is done."""
        return pack({"seconds": {name: round(value, 3) for name, value in self.seconds.items()}})

    def close(self) -> None:
        """Remove what this worker has put on the disk."""
        self._sites.clear()
        self._open.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        if self._scratch is None:
            raise HalveError("this worker was not told what to work on")
        return self._scratch

    def _charged(self) -> terms.Charge:
        if self._charge is None:
            raise HalveError("this worker was not told what to work on")
        return self._charge

    def _refuse(self, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
        if different := differences(wanted, {name: found.get(name, "absent") for name in wanted}):
            raise ResumeMismatchError(
                f"a worker on {socket.gethostname()} is not like the driver, and would give other bytes "
                f"({'; '.join(different)}, where the driver's stand first): install the same versions, give the same "
                "files, or use nodes of one kind"
            )


def _tell_nobody(block: int, phase: Phase, *, caution: str = "", note: str = "") -> None:
    """The driver tells what happens."""


def _scratch(given: str) -> Path:
    """Make a folder for what a worker keeps: in the one that is given, or in the temporary one of its machine.

    What workers that were killed have left there is removed.
    """
    if given:
        folder = Path(given) / f"{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        pid = left.name.removeprefix(_FOLDER).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
