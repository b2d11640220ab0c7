"""From what a run is asked for to the workers that do it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from torch import nn

from halve.checkpoint.load import Source, source_files
from halve.errors import InputError
from halve.provenance import Fingerprint
from halve.run.batch_norms import ESTIMATE, batch_norms
from halve.run.directory import RunDirectory
from halve.run.executor import Executor, Job
from halve.run.loop import Employ, Employing
from halve.run.request import Placement, Request
from halve.serial import to_plain
from halve.solve import methods
from halve.text.calibration import Calibration
from halve.workers import terms
from halve.workers.cluster import Cluster, check_cluster, cluster
from halve.workers.crew import Crew
from halve.workers.messages import Message
from halve.workers.worker import must_agree

_CHUNK = 1 << 26
"""Bytes of a model's file that are sent at once."""


def check_workers(model: nn.Module | Source, request: Request) -> None:
    """Refuse workers for a run that they cannot do.

    Raises:
        InputError: the model is in memory, the method weighs gradients, hidden states are to be at one place, or the
            cluster is not there.
    """
    if request.placement.workers is None:
        return
    if isinstance(model, nn.Module):
        raise InputError("workers read the model from a disk, and it is in memory: save it, and give its directory")
    method = request.settings.method
    if methods.get(method).gradient is not None:
        raise InputError(f"{method} takes backward passes, which are for one process: leave workers out")
    if request.placement.offload is not None:
        raise InputError("offload is a place of one process, and each worker keeps its own hidden states: leave it out")
    check_cluster(request.placement.workers)


@contextmanager
def threads_of_workers(placement: Placement) -> Iterator[None]:
    """Let this process use as many CPU threads as each worker, since their number decides the last bits."""
    before = torch.get_num_threads()
    if placement.workers is not None:
        torch.set_num_threads(threads(placement))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads(placement: Placement) -> int:
    """Return the CPU threads of each worker: as asked for, or this process's, shared out among those of a machine."""
    if placement.worker_threads is not None:
        return placement.worker_threads
    here = torch.get_num_threads()
    return max(1, here // placement.workers) if isinstance(placement.workers, int) else here


class Hiring:
    """Makes a crew for a run that has begun.

    Args:
        among: the cluster.
        request: what is asked for.
        source: the model's files.
        scratch: a folder that workers of this machine put what they keep into; None where they are elsewhere.
    """

    def __init__(self, among: Cluster, request: Request, source: Source, scratch: Path | None) -> None:
        self._cluster = among
        self._request = request
        self._source = source
        self._scratch = scratch

    def employ(self, mark: Fingerprint, together: Sequence[Sequence[str]]) -> Employ:
        """Return what hires the crew of a job.

        Args:
            mark: the run's fingerprint, of which workers must have the same where it concerns them.
            together: names of parameters that are stored in one tensor.
        """

        def hire(job: Job) -> Executor:
            _refuse_batch_norms(job)
            return Crew(job, self._cluster, self._charge(job, mark, together), self._files())

        return hire

    def _charge(self, job: Job, mark: Fingerprint, together: Sequence[Sequence[str]]) -> terms.Charge:
        placement = self._request.placement
        precision = str(placement.precision).removeprefix("torch.")  # resolved: `auto` may be another one there
        theirs = Placement(device=placement.target.type, forward_dtype=precision)
        asked = self._request
        request = Request(settings=job.settings, placement=theirs, loading=asked.loading, calibration=Calibration())
        return terms.Charge(
            request=to_plain(request),
            model=str(self._source.path.resolve()),
            mark=must_agree(mark),
            files={name: path.stat().st_size for name, path in self._paths().items()},
            threads=torch.get_num_threads(),
            batches=len(job.batches),
            shards=[(shard.start, shard.stop) for shard in job.shards],
            scratch="" if self._scratch is None else str(self._scratch.resolve()),
            collect=job.collect,
            fixed=sorted(job.fixed),
            together=[list(names) for names in together],
            neighbours=1 if self._scratch is None else self._cluster.workers,
        )

    def _paths(self) -> dict[str, Path]:
        root = self._source.path if self._source.path.is_dir() else self._source.path.parent
        return {str(path.relative_to(root)): path for path in source_files(self._source)}

    def _files(self) -> dict[str, partial[Iterator[Message]]]:
        return {name: partial(_chunks, path) for name, path in self._paths().items()}


def _refuse_batch_norms(job: Job) -> None:
    if job.settings.batch_norm != ESTIMATE or not job.collect:
        return
    for name in job.plan.blocks:
        if found := next(iter(batch_norms(job.model.get_submodule(name))), None):
            raise InputError(
                f"the statistics of batch norms ({name}.{found}) are estimated anew in one process: leave workers out, "
                "or keep the statistics (batch_norm keep)"
            )


@contextmanager
def hiring(request: Request, source: Source | None, run: RunDirectory | None) -> Iterator[Employing | None]:
    """Start or reach the cluster that a request names, and yield what makes a crew on it; None without workers.

    Args:
        request: what is asked for.
        source: the model's files.
        run: in whose directory workers of this machine keep what they need; None makes a temporary one.

    Raises:
        InputError: as `halve.workers.cluster.cluster`.
    """
    placement = request.placement
    if placement.workers is None or source is None:
        yield None
        return
    with ExitStack() as stack:  # the folder is removed when the workers that write to it are gone
        folder = Path(mkdtemp(prefix="halve-")) if run is None else run.workers
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        early = request.settings.only_where_faster is None  # they would disturb the times that are taken of matrices
        count, device = torch.get_num_threads(), placement.target
        among = stack.enter_context(cluster(placement.workers, count, device, early=early))
        yield Hiring(among, request, source, folder if among.own else None).employ


def _chunks(path: Path) -> Iterator[Message]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield np.frombuffer(chunk, dtype=np.uint8)
