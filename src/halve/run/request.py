"""What a run is asked for, all of it: groups of options, checked as far as that is possible without a model.

A new option of `halve.prune` is a field of one of these groups, or of those that they hold. The keywords of the Python
functions, the flags of the command line, what a resumed run goes by, the fingerprint and ``halve.json`` follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.attention import check_attention
from halve.checkpoint.streamed import AUTO, check_stream
from halve.checks import check_count
from halve.device import forward_precision, parse_dtype, resolve_device
from halve.errors import InputError
from halve.evaluation.request import Evaluation
from halve.evaluation.top_one import ImageEvaluation
from halve.model.reconstruct import Reconstruction, parse_reconstruction
from halve.option_groups import OptionError, fill, group, known_names, option
from halve.run.settings import Settings, default_reconstruction
from halve.runtime.speed import check_measurable
from halve.solve import methods, refit
from halve.text.calibration import Calibration

_RECONSTRUCT = "reconstruct"
WORKERS = ("worker_threads", "workers")
NO_WORKERS = "none"
"""Instead of workers, where a run goes on that had some."""


@dataclass(frozen=True)
class Placement:
    """Where a run computes and keeps what it works with.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, …
        forward_dtype: products of forward passes: ``auto``, ``float32`` or ``bfloat16``. Statistics and solves are
            float32.
        offload: keep hidden states in this directory, not in memory; a temporary folder is made in it.
        work: keep finished blocks in this directory, new or empty, while the run lasts, not in the output directory.
        stream: leave the weights on disk, and read them block by block: ``always``, ``never``, or ``auto``, where they
            would take more than half of the memory that is free, or the run would not fit. Results are the same bytes,
            but the model that is returned cannot be changed: its weights are read-only maps of files.
        workers: how many processes share the work, on this machine or on the Ray cluster that ``RAY_ADDRESS`` names;
            or the address of a cluster, all of which is used: ``auto``, ``host:6379``, ``ray://host:10001``. Results
            are the same bytes for any number of workers with as many threads each.
        worker_threads: CPU threads of each worker; those that torch has here, shared out, where nobody says.

    Raises:
        InputError: a device or dtype is unknown, ``offload`` is not there, or a number is not at least 1.
    """

    device: str | torch.device = "auto"
    forward_dtype: str = option("auto", shared=True)
    offload: str | Path | None = None
    work: str | Path | None = None
    stream: str = AUTO
    workers: int | str | None = None
    worker_threads: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.workers, str) and self.workers.isdecimal():
            object.__setattr__(self, "workers", int(self.workers))
        if not isinstance(self.workers, str | None) or self.workers == "":
            check_count("workers", self.workers)
        if self.worker_threads is not None:
            check_count("worker_threads", self.worker_threads)
            if self.workers is None:
                raise OptionError("{} is of workers, and {} is not given: give it, or neither", *WORKERS)
        forward_precision(self.forward_dtype, self.target)
        check_stream(self.stream)
        for name, place in (("offload", self.offload), ("work", self.work)):
            if place is not None and not isinstance(place, str | Path):
                raise InputError(f"{name} must be a directory, got {place!r}")
        if self.offload is not None and not Path(self.offload).is_dir():
            raise InputError(f"offload directory {self.offload} does not exist: create it, or leave offload out")

    @cached_property
    def target(self) -> torch.device:
        """The device itself."""
        return resolve_device(self.device)

    @property
    def precision(self) -> torch.dtype:
        """What float32 matrices are multiplied in, in forward passes."""
        return forward_precision(self.forward_dtype, self.target)


@dataclass(frozen=True)
class Loading:
    """How a model is found and loaded, and in which dtype it is written.

    Attributes:
        revision: branch, tag or commit of a model on the hub; a run that goes on takes the commit it began with.
        trust_remote_code: run Python code that comes with the model, which is copied to the output. Read it first.
        dtype: written dtype where the input has none of its own (GGUF): ``float32`` (default), ``bfloat16``,
            ``float16``.
        attention: implementation of attention that Halve runs the model with: ``eager`` or ``sdpa``. The config's own
            where nobody says; what is written keeps the config's.

    Raises:
        InputError: a dtype or an implementation is unknown, or a value is of another type.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    dtype: torch.dtype | str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        check_attention(self.attention)
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InputError(f"dtype {self.dtype!r} is not known: give a name such as 'bfloat16', or a torch.dtype")
        if not isinstance(self.trust_remote_code, bool):
            raise InputError(f"trust_remote_code must be true or false, got {self.trust_remote_code!r}")

    @property
    def written_dtype(self) -> torch.dtype | None:
        """The dtype itself."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run is asked for.

    Attributes:
        settings: what to do to every matrix.
        reconstruct: ``block``: after a block's matrices are pruned, tune what survived, norms and biases included,
            against the dense model's output of that block; ``none`` leaves it. Where nobody says, it is ``block`` for
            method ``auto`` with effort ``best``, else ``none``.
        calibration: on what.
        placement: where.
        loading: of the model.
        evaluation: texts to measure perplexity on before and after; None measures none.
        image_evaluation: pictures to measure top-1 accuracy on before and after; None measures none.

    Raises:
        InputError: a part of what is asked for would have no effect.
    """

    settings: Settings = group(factory=Settings)
    reconstruct: str | Reconstruction | None = option(None, transient=True)
    calibration: Calibration = group(factory=Calibration)
    placement: Placement = group(factory=Placement)
    loading: Loading = group(factory=Loading)
    evaluation: Evaluation | None = group(None, prefix="eval_")
    image_evaluation: ImageEvaluation | None = group(None, prefix="eval_")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Request":
        """Return what flat keywords ask for.

        Args:
            given: options of all groups by their flat names, ready groups by theirs, and options of the method and
                the refit; None is the same as not given.

        Raises:
            InputError: an option is unknown, given twice or refused by its group.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name in ("settings", "reconstruction"):
            if name in given:
                raise InputError(
                    f"there is no option {name!r}: give what is in it, or reconstruct=halve.Reconstruction(…)"
                )
        known = known_names(cls)
        options = {name: given.pop(name) for name in list(given) if name not in known}
        _suggest(options, given, known)
        prefix = f"{_RECONSTRUCT}_"
        tuning = {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}
        asked = fill(cls, given)
        settings = replace(asked.settings, options={**asked.settings.options, **options})
        word = default_reconstruction(settings.method, options) if asked.reconstruct is None else asked.reconstruct
        settings = replace(settings, reconstruction=parse_reconstruction(word, **tuning))
        return replace(asked, settings=settings)

    @property
    def uses_calibration(self) -> bool:
        """Whether a calibration set is run: it is needed, or one is named, on which losses are then measured."""
        return self.settings.needs_calibration or not self.calibration.is_self_written

    def check(self) -> None:
        """Refuse what can be known to be unusable before the model is looked for.

        Raises:
            InputError: a text is not there, or something cannot be measured on this machine.
        """
        self.settings.check_objective()
        self.check_texts()
        if self.settings.only_where_faster is not None:  # the model's dtype is known later
            check_measurable(self.settings.pattern, torch.bfloat16, self.placement.target)

    def check_texts(self) -> None:
        """Refuse texts and pictures that are not there, and numbers that they cannot be cut by.

        Raises:
            InputError: one of them is not usable.
        """
        self.calibration.check()
        if self.evaluation is not None:
            self.evaluation.check(self.placement.target)
        if self.image_evaluation is not None:
            self.image_evaluation.check(self.placement.target)


def _suggest(options: Mapping[str, Any], given: Mapping[str, Any], known: Any) -> None:
    """Refuse names that are no options of method and refit, and look like one of ours."""
    row = methods.get(given.get("method", Settings.method))
    of_refit = refit.get(given.get("refit", Settings.refit))
    taken = {each.name for each in fields(row.options)} | {f"refit_{each.name}" for each in fields(of_refit.options)}
    for name in options:
        close = get_close_matches(name, [*taken, *known], n=1)
        if name not in taken and close:
            raise InputError(f"there is no option {name!r}: did you mean {close[0]!r}?")
