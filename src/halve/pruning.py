"""Prune a whole model: from what the user names to a pruned model, and to a verified checkpoint on disk."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.checkpoint import write
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.precision import bytes_in_memory, dtype_in_config
from halve.checkpoint.room import check_destination, check_shared_space, same_volume
from halve.checkpoint.streamed import ALWAYS, stays_on_disk
from halve.device import weight_dtype
from halve.errors import InputError
from halve.forecast.foreseen import Foreseen, foresee
from halve.judging import judge_of
from halve.memory import available_memory
from halve.option_groups import OptionError
from halve.provenance import code_fields
from halve.run.call_record import read_back, written_down
from halve.run.directory import RunDirectory, open_run, recorded_call
from halve.run.events import Listener, announce, writing_told_to
from halve.run.phases import Phase, Phases
from halve.run.request import NO_WORKERS, WORKERS, Request
from halve.text.calibration import CalibrationData, refuse_text
from halve.whole_model import Pruned, choose_dense, find, load_found, prune_loaded
from halve.workers.hiring import check_workers, hiring, threads_of_workers

_TIMES = 20
"""How many times the weights a run may take, at most, for it to be worth a look whether there is that much."""


def prune(
    model: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    listen: Listener | None = None,
    values: str | None = None,
    **options: Any,
) -> Pruned:
    """Prune every linear layer inside a model's blocks to an N:M (or unstructured) pattern.

    With ``out``, every block is kept there as it is finished. A run that was stopped is continued by the same call, or
    by `halve.resume`, and ends with the same bytes.

    Everything else is an option, a keyword by its flat name: ``pattern="2:4"``, ``method="wanda"``,
    ``calibration="c4"``, ``samples=64``, ``device="cpu"``, … Those that belong together are fields of a group
    (`Objective`, `Reconstruction`, `WhereFaster`, `KeepDense`, `Calibration`, `Placement`, `Loading`, `Evaluation`,
    `ImageEvaluation`; docs/options.md lists them all), and a whole group may be given instead: ``objective=``,
    ``reconstruct=``, ``only_where_faster=``, ``keep_dense=``, ``calibration=``, ``placement=``, ``loading=``,
    ``evaluation=``, ``image_evaluation=``. What is an option of the method or the refit (``effort="best"``,
    ``refit_steps=200``) is one too.

    Args:
        model: a model in memory (pruned in place), a local directory, a ``.gguf`` file, or a hub id.
        out: directory for the pruned Hugging Face checkpoint; it must not exist yet, be empty, or hold the same run,
            unfinished. None keeps the result in memory alone.
        tokenizer: of a model in memory, what turns data into tensors for it: its tokenizer, or the image processor of
            one that sees (the ``processing_class`` of transformers' Trainer); otherwise the checkpoint's own.
        listen: called with a `halve.run.events.Progress` at every step.
        values: ``int4`` is another name of the refit ``int4``, after what `halve.pack` makes of the kept weights.
        **options: see above; None leaves an option at its default.

    Returns:
        Pruned: the model, and what was done to every matrix.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        UnsupportedModelError: the model's structure or checkpoint is not supported; nothing was done.
        CalibrationError: the calibration data gave no usable statistics.
        LayerFailedError: a matrix could not be pruned and no fallback was allowed.
        ResumeMismatchError: ``out`` holds an unfinished run that was begun differently.
        CorruptFileError: a file of the model, or of the unfinished run, was damaged.
    """
    request = Request.of(with_refit_of(values, options))
    return prune_as(model, None if out is None else Path(out), request, tokenizer, listen)


def with_refit_of(values: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the refit that makes kept weights what they are going to be packed as.

    Args:
        values: ``int4``; ``own``, or None, asks for nothing.
        options: by their flat names.

    Raises:
        InputError: nothing is solved for such values, or another refit is given.
    """
    if values in (None, "own"):
        return dict(options)
    if values != "int4":
        raise InputError(
            f"values is {values!r}, and only int4 is solved for: prune without it, and give it to halve pack (--values)"
        )
    if options.get("refit") not in (None, "int4"):
        raise InputError(f"values int4 is the refit int4, and refit {options['refit']} is given: leave one of them out")
    return {**options, "refit": "int4"}


def prune_as(
    model: nn.Module | str | Path,
    out: Path | None,
    request: Request,
    tokenizer: Any = None,
    listen: Listener | None = None,
    foreseeing: Callable[[Foreseen], None] | None = None,
) -> Pruned:
    """Prune as a request says.

    Args:
        model: as for `prune`, and ``out``, ``tokenizer`` and ``listen``.
        out: see ``model``.
        request: what is asked for.
        tokenizer: see ``model``.
        listen: see ``model``.
        foreseeing: is told what the run is going to take, before the model is loaded; None measures no rates.

    Raises:
        HalveError: as `prune`.
    """
    if out is None:
        _refuse_places(request)
    request.check()
    call = None if out is None else written_down(model, tokenizer, request)
    with ExitStack() as stack:
        found = find(model, request, writes=out is not None)
        check_workers(found, request)
        stack.enter_context(threads_of_workers(request.placement))
        if out is not None:
            size = found.size if isinstance(found, Source) else 0
            check_destination(out, found if isinstance(found, Source) else None, size)
        run = None
        if out is not None:
            work = request.placement.work
            run = stack.enter_context(open_run(out, None if work is None else Path(work)))
        if isinstance(found, Source):
            if call is not None:
                call["request"]["loading"]["revision"] = found.revision
            if run is not None and found.trust_remote_code:
                run.check_code(code_fields(found))
        source = found if isinstance(found, Source) else None
        weights = 0 if source is None else bytes_in_memory(source)
        foreseen = _check_fits(found, weights, out, request, foreseeing)
        phases = Phases(request.placement.target)
        beside = None
        if run is not None:
            run.tidy()
            streams = stays_on_disk(source, request.placement.stream, weights)
            beside = run.computed if streams or (foreseen is not None and foreseen.plan.streamed) else None
        employing = stack.enter_context(hiring(request, source, run))
        with phases.timing(Phase.LOAD):
            loaded = load_found(found, tokenizer, request.loading.attention, beside)
        if run is not None:
            _check_room(loaded, run, request.loading.written_dtype)
        request = _with_ratios(request, loaded, run, phases, listen)
        judge = judge_of(loaded, request, run, phases, listen)
        data = _data(loaded, request, run, phases, listen)
        request = _with_damages(request, loaded, data, run, phases, listen)
        pruned = prune_loaded(
            loaded,
            data,
            request,
            run,
            listen=listen,
            call=call,
            phases=phases,
            before=None if judge is None else judge.measure_dense,
            employing=employing,
        )
        return pruned if judge is None else judge.measure_pruned(pruned)


def resume(
    out: str | Path,
    *,
    fallback: str | None = None,
    workers: int | str | None = None,
    worker_threads: int | None = None,
    listen: Listener | None = None,
) -> Pruned:
    """Continue the run that was stopped in a directory, from the first block that is not finished.

    Args:
        out: the output directory that `prune` was given.
        fallback: method for matrices that the asked one fails on, for a run that was begun without one.
        workers: who shares the work from here on, as `halve.run.request.Placement` has it, or ``none`` for this process
            alone; None leaves that as the run began. As many threads have to work on a matrix as before.
        worker_threads: CPU threads of each of these workers.
        listen: called with a `halve.run.events.Progress` at every step.

    Returns:
        Pruned: as `prune` would have.

    Raises:
        InputError: there is no unfinished run, or it was given a model or data in memory: then call `prune` again; or
            it was begun in another directory, with relative paths; or the workers are not such.
        AlreadyCompleteError: nothing was left to do.
        ResumeMismatchError: the model, the data, versions or the machine differ from when it was begun.
        CorruptFileError: a file of the model, or of the unfinished run, was damaged.
    """
    if worker_threads is not None and workers in (None, NO_WORKERS):
        raise OptionError("{} is of other workers, and {} names none: give both, or neither", *WORKERS)
    call = read_back(recorded_call(Path(out)))
    request = call.request
    if fallback is not None:
        request = replace(request, settings=replace(request.settings, fallback=fallback))
    if workers is not None:
        others = None if workers == NO_WORKERS else workers
        request = replace(request, placement=replace(request.placement, workers=others, worker_threads=worker_threads))
    return prune_as(call.model, Path(out), request, listen=listen)


def _refuse_places(request: Request) -> None:
    """Refuse places on disk for a run that writes no checkpoint."""
    if request.placement.work is not None:
        raise InputError("work is a place for the blocks of a run that writes a checkpoint: give out too")
    if request.placement.stream == ALWAYS:
        raise InputError("stream = 'always' leaves pruned weights on disk too, where a checkpoint is put: give out")


def _check_fits(
    found: nn.Module | Source,
    weights: int,
    out: Path | None,
    request: Request,
    foreseeing: Callable[[Foreseen], None] | None,
) -> Foreseen | None:
    """Refuse a run that cannot fit into memory, and return what is foreseen.

    Where nobody listens, nothing is if the ``weights`` (bytes) are so small that a run of them is sure to fit.
    """
    if foreseeing is None and _TIMES * weights < available_memory():
        return None
    foreseen = foresee(found, out, request, measured=foreseeing is not None)
    if foreseeing is not None:
        foreseeing(foreseen)
    foreseen.check()
    return foreseen


def _data(
    loaded: LoadedModel, request: Request, run: RunDirectory | None, phases: Phases, listen: Listener | None
) -> Any:
    """Return what the model is calibrated on; a run that goes on neither writes its text nor asks the hub again."""
    calibration = request.calibration
    if not request.uses_calibration:
        return []
    kept = run.tokens(calibration.asked) if run is not None and calibration.is_far else None
    if kept is not None:
        return kept
    if calibration.is_self_written:
        refuse_text(loaded.model)
        announce(listen, Phase.GENERATE)
    with phases.timing(Phase.CALIBRATE):
        return calibration.data(loaded, writing_told_to(listen))


def _check_room(loaded: LoadedModel, run: RunDirectory, dtype: torch.dtype | None) -> None:
    """Check that the checkpoint and, until it is complete, all finished blocks have room, each on its volume."""
    if run.verified:  # only names are left to be changed
        return
    run.prepare_staging()  # what a stopped attempt at the checkpoint has left there is removed
    blocks = sum(parameter.nbytes for parameter in loaded.model.parameters()) - run.kept_bytes
    needs = [(run.out, write.output_bytes(loaded, dtype)), (run.state, blocks)]
    check_shared_space(needs)
    run.reserved = sum(size for place, size in needs if same_volume(place, run.out))


def _with_ratios(
    request: Request, loaded: LoadedModel, run: RunDirectory | None, phases: Phases, listen: Listener | None
) -> Request:
    """Return the request with what was measured of the model's matrices, now or when the run began."""
    settings, begun = request.settings, None if run is None else run.fingerprint
    if settings.only_where_faster is None:
        return request
    if begun is None:
        announce(listen, Phase.MEASURE)
    with phases.timing(Phase.MEASURE):
        found = settings.only_where_faster.measured(
            loaded.model,
            settings.pattern,
            settings.skip,
            dtype=request.loading.written_dtype or _run_dtype(loaded),
            device=request.placement.target,
            begun=begun,
        )
    return replace(request, settings=replace(settings, only_where_faster=found))


def _with_damages(
    request: Request,
    loaded: LoadedModel,
    data: CalibrationData,
    run: RunDirectory | None,
    phases: Phases,
    listen: Listener | None,
) -> Request:
    """Return the request with the choice of what stays dense for its cost, made now or when the run began."""
    settings, target = request.settings, request.placement.target
    asked = settings.keep_dense
    if asked is None:
        return request
    if run is not None and run.fingerprint is not None:
        return replace(request, settings=replace(settings, keep_dense=asked.recalled(run.fingerprint)))
    with phases.timing(Phase.DAMAGE):
        found = choose_dense(loaded, data, settings, target, listen)
    return replace(request, settings=replace(settings, keep_dense=found))


def _run_dtype(loaded: LoadedModel) -> torch.dtype:
    """Return the dtype in which people load the model, and multiply with its matrices."""
    named = None if loaded.source is None else dtype_in_config(loaded.source)
    return named or weight_dtype(loaded.model)
