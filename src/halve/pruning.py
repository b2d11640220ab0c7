"""Prune a whole model: from what the user names to a pruned model, and to a verified checkpoint on disk."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from halve import checkpoint, report, store, tokens
from halve.blocks import Batch
from halve.calibration import (
    BATCH_TOKENS,
    DEFAULT_SAMPLES,
    STEP_TOKENS,
    Calibration,
    calibration_data,
    calibration_record,
    check_source,
    token_batches,
)
from halve.call_record import read_back, written_down
from halve.checkpoint import LoadedModel, Source
from halve.device import evaluation_mode, forward_precision, resolve_device
from halve.documents import is_on_hub
from halve.errors import CorruptFileError, HalveError, InputError
from halve.fingerprint import code_fields, fingerprint
from halve.objective import Objective
from halve.pattern import Pattern
from halve.reconstruct import Reconstruction, parse_reconstruction
from halve.run import prune_blocks
from halve.run_directory import RunDirectory, open_run, recorded_call
from halve.run_log import RunLog
from halve.run_report import Listener, Progress, RunReport
from halve.settings import MIN_EXPERT_TOKENS, Settings, default_reconstruction
from halve.tokens import TokenSet
from halve.verification import check


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`.

    Attributes:
        model: the pruned model; the very object that was given, if one was.
        report: what was done to every matrix.
        record: the content of ``halve.json`` but for the files' sha256.
        out: the checkpoint's directory, None if none was asked for.
    """

    model: nn.Module
    report: RunReport = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    out: Path | None


def prune(
    model: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    pattern: str | Pattern = "2:4",
    method: str = "auto",
    refit: str = "cg",
    calibration: Calibration = None,
    tokenizer: Any = None,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    text_field: str = "text",
    skip: Sequence[str] = (),
    fallback: str | None = None,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    reconstruct: Reconstruction | str | None = None,
    objective: Objective | None = None,
    device: str = "auto",
    forward_dtype: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload: str | Path | None = None,
    work: str | Path | None = None,
    listen: Listener | None = None,
    **options: Any,
) -> Pruned:
    """Prune every linear layer inside a model's blocks to an N:M (or unstructured) pattern.

    With ``out``, every block is kept there as it is finished. A run that was stopped is continued by the same call, or
    by `halve.resume`, and ends with the same bytes.

    Args:
        model: a model in memory (pruned in place), a local directory, a ``.gguf`` file, or a hub id.
        out: directory for the pruned Hugging Face checkpoint; it must not exist yet, be empty, or hold the same run,
            unfinished. None keeps the result in memory alone.
        pattern: ``N:M`` keeps N of every M consecutive weights; ``S%`` zeroes S percent of each row.
        method: see `halve.methods`; ``auto`` takes ``effort="fast"``, ``"balanced"`` or ``"best"``, and a
            ``time_limit`` in seconds for solving all matrices.
        refit: re-adjustment of the kept weights: ``none``, ``cg``, ``gd``, ``swap``; see `halve.prune_weight`.
        calibration: text, tokens or batches; None lets the model write its own text, if method or refit need any.
        tokenizer: for a model in memory; otherwise the checkpoint's own.
        samples: number of calibration sequences.
        seq_len: tokens in each; None takes 2048, or the model's maximum if that is less.
        seed: of the choice of calibration text.
        text_field: field of ``.jsonl`` and ``.parquet`` files.
        skip: shell-style patterns of parameter names that stay dense.
        fallback: method for matrices that the asked one fails on; None stops there, also at experts that see too few
            tokens.
        min_expert_tokens: with a fallback, experts that see fewer tokens are pruned by magnitude, and reported.
        reconstruct: ``block``, or `halve.reconstruct.Reconstruction`: after a block's matrices are pruned, tune what
            survived, norms and biases included, against the dense model's output of that block; ``none`` leaves it.
            None is ``block`` for method ``auto`` with ``effort="best"``, else ``none``.
        objective: shrinkage of the statistics and targets from the dense model, see `halve.objective.Objective`.
        device: ``auto``, ``cpu``, ``cuda``, …
        forward_dtype: ``auto``, ``float32`` or ``bfloat16``: products of the calibration's forward passes.
            Statistics and solves are float32.
        dtype: dtype of the written checkpoint where the input has none of its own (GGUF); None keeps float32.
        revision: branch, tag or commit of a model on the hub; a run that goes on takes the commit it began with.
        trust_remote_code: whether to run Python code that comes with the model; it is copied to ``out``.
        offload: a directory where hidden states are kept instead of in memory; a temporary folder is made in it.
        work: a directory for finished blocks while the run lasts, new or empty; None keeps them in ``out``.
        listen: called with a `halve.run_report.Progress` at every step.
        **options: of the method and the refit.

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
    arguments = locals()
    request = Request(
        Settings(
            Pattern.parse(pattern),
            method,
            refit,
            options,
            (skip,) if isinstance(skip, str) else tuple(skip),
            fallback,
            min_expert_tokens,
            parse_reconstruction(default_reconstruction(method, options) if reconstruct is None else reconstruct),
            Objective.of(objective),
        ),
        resolve_device(device),
        forward_precision(forward_dtype, resolve_device(device)),
        dtype,
        None if offload is None else _existing_directory(offload),
    )
    if work is not None and out is None:
        raise InputError("work is a place for the blocks of a run that writes a checkpoint: give out too")
    request.settings.check_objective()
    check_source(calibration, samples=samples, seq_len=seq_len, text_field=text_field)
    call = None if out is None else written_down(arguments)
    destination = None if out is None else Path(out)
    asked = {"source": str(calibration), "samples": samples, "seq_len": seq_len, "seed": seed}
    with ExitStack() as stack:
        found = _find(model, destination, dtype, revision, trust_remote_code=trust_remote_code)
        if call is not None and isinstance(found, Source):
            call["revision"] = found.revision
        run = None
        if destination is not None:
            run = stack.enter_context(open_run(destination, None if work is None else Path(work)))
            if isinstance(found, Source) and found.trust_remote_code:
                run.check_code(code_fields(found))
        loaded = _load(found, tokenizer)
        if run is not None:
            store.check_room(loaded, run, dtype)
        wrote = calibration is None or (isinstance(calibration, str) and calibration == tokens.SELF)
        if wrote and not request.settings.needs_calibration:
            return prune_loaded(loaded, [], request, run, seed=seed, listen=listen, call=call)
        # Neither must the model write its text again, nor the hub be asked again.
        far = wrote or (isinstance(calibration, str) and is_on_hub(calibration))
        data: TokenSet | list[Batch] | None = run.tokens(asked) if run is not None and far else None
        if data is None and wrote and listen is not None:
            listen(Progress(0, 0, "generate", 0, 0))
        data = data or calibration_data(
            loaded, calibration, samples=samples, seq_len=seq_len, seed=seed, text_field=text_field
        )
        return prune_loaded(loaded, data, request, run, seed=seed, listen=listen, call=call, asked=asked)


def resume(out: str | Path, *, fallback: str | None = None, listen: Listener | None = None) -> Pruned:
    """Continue the run that was stopped in a directory, from the first block that is not finished.

    Args:
        out: the output directory that `prune` was given.
        fallback: method for matrices that the asked one fails on, for a run that was begun without one.
        listen: called with a `halve.run_report.Progress` at every step.

    Returns:
        Pruned: as `prune` would have.

    Raises:
        InputError: there is no unfinished run, or it was given a model or data in memory: then call `prune` again; or
            it was begun in another directory, with relative paths.
        AlreadyCompleteError: nothing was left to do.
        ResumeMismatchError: the model, the data, versions or the machine differ from when it was begun.
        CorruptFileError: a file of the model, or of the unfinished run, was damaged.
    """
    arguments = read_back(recorded_call(Path(out)))
    if fallback is not None:
        arguments["fallback"] = fallback
    return prune(out=out, listen=listen, **arguments)


@dataclass(frozen=True)
class Request:
    """How to prune, all of it checked.

    Attributes:
        settings: what to do to every matrix.
        device: where blocks run and matrices are solved.
        precision: dtype of the forward products.
        dtype: of the written checkpoint, only for GGUF input and models in memory.
        offload: an existing directory for hidden states, None for memory.
    """

    settings: Settings
    device: torch.device
    precision: torch.dtype
    dtype: torch.dtype | None = None
    offload: Path | None = None


def prune_loaded(
    loaded: LoadedModel,
    data: TokenSet | Sequence[Batch],
    request: Request,
    run: RunDirectory | None,
    *,
    seed: int,
    listen: Listener | None = None,
    call: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Pruned:
    """Prune a loaded model in place, then write and verify it if there is a directory to.

    Args:
        loaded: the model.
        data: calibration tokens or batches; an empty list for a method and refit that need none.
        request: how to prune.
        run: where finished blocks and the checkpoint go, new or stopped; None writes nothing.
        seed: that chose the calibration data, for the record.
        listen: called at every step.
        call: arguments of `prune` that would repeat this, for `resume`; None if they cannot be written down.
        asked: how the calibration tokens were asked for.

    Raises:
        InputError, UnsupportedModelError, CalibrationError, LayerFailedError, CorruptFileError: as `prune`.
    """
    if run is None:
        done = _prune(loaded, data, request, None, listen)
        return Pruned(loaded.model, done, _record(loaded, data, request, done, seed, None), None)
    settings, device, precision, dtype = request.settings, request.device, request.precision, request.dtype
    mark = fingerprint(loaded, data, settings, device=device, precision=precision, dtype=dtype) | {"seed": str(seed)}
    run.begin(mark, call, data if isinstance(data, TokenSet) else None, asked or {}, settings.fallback)
    log = RunLog(run.home)

    def tell(step: Progress) -> None:
        log(step)
        if listen is not None:
            listen(step)

    try:
        done = _prune(loaded, data, request, run, tell)
        record = _record(loaded, data, request, done, seed, run.out)
        seconds = _publish(loaded, done, record, run, dtype)
    except CorruptFileError:  # to call again would not help
        raise
    except HalveError as error:
        error.unfinished = run.out if run.worth_keeping else None
        raise
    return Pruned(loaded.model, replace(done, seconds={**done.seconds, **seconds}), record, run.out)


def _publish(
    loaded: LoadedModel, done: RunReport, record: Mapping[str, Any], run: RunDirectory, dtype: torch.dtype | None
) -> dict[str, float]:
    """Write, verify and publish the checkpoint, what an earlier process did left out; return the seconds by phase."""
    begun = written = time.perf_counter()
    files = None
    if not run.verified:
        files = store.write_checkpoint(run.prepare_staging(), loaded, done.changed, record, dtype=dtype)
        written = time.perf_counter()
        _verify(run.staging, loaded.source)
    run.publish(files)
    return {"write": written - begun, "verify": time.perf_counter() - written}


def _prune(
    loaded: LoadedModel,
    data: TokenSet | Sequence[Batch],
    request: Request,
    run: RunDirectory | None,
    listen: Listener | None,
) -> RunReport:
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(loaded.model))
        folder = None
        if request.offload is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="halve-", dir=request.offload)))
        most = BATCH_TOKENS if request.settings.reconstruction is None else STEP_TOKENS
        batches = token_batches(data.ids, most) if isinstance(data, TokenSet) else data
        return prune_blocks(
            loaded.model,
            batches or [{"input_ids": torch.zeros(1, 8, dtype=torch.int64)}],
            request.settings,
            device=request.device,
            precision=request.precision,
            offload=folder,
            listen=listen,
            collect=bool(batches),
            ledger=run,
        )


def _record(
    loaded: LoadedModel,
    data: TokenSet | Sequence[Batch],
    request: Request,
    done: RunReport,
    seed: int,
    out: Path | None,
) -> dict[str, Any]:
    return report.to_json(
        done,
        request.settings,
        {} if out is None else {m.name: loaded.layout.locate(m.parameter, m.expert) for m in done.matrices},
        report.masks(loaded.model, done, request.dtype),
        {} if out is None else {name: loaded.layout.locate(name).tensors for name in sorted(done.changed)},
        source=_source_record(loaded),
        calibration={"seed": seed, **calibration_record(data)},
        device=str(request.device),
        precision=str(request.precision).removeprefix("torch."),
    )


def _find(
    model: nn.Module | str | Path,
    out: Path | None,
    dtype: torch.dtype | None,
    revision: str | None,
    *,
    trust_remote_code: bool,
) -> nn.Module | Source:
    """Find what the user named, and refuse what cannot be read or written, before anything is created."""
    if isinstance(model, nn.Module):
        from transformers import PreTrainedModel

        if out is not None and not isinstance(model, PreTrainedModel):
            raise InputError(
                f"{type(model).__name__} is not a transformers model, so it cannot be written as a checkpoint: "
                "leave out out, and save the model yourself"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError("the model has parameters on the meta device, without values: load it completely")
        if out is not None:
            store.check_destination(out, None, 0)
        return model
    source = checkpoint.resolve(model, revision=revision, trust_remote_code=trust_remote_code)
    if out is not None:
        store.check_destination(out, source, source.size)
    if dtype is not None and source.shards:
        raise InputError("dtype is for GGUF input: a safetensors checkpoint keeps its own dtypes")
    return source


def _load(model: nn.Module | Source, tokenizer: Any) -> LoadedModel:
    if isinstance(model, nn.Module):
        return LoadedModel(model, tokenizer, None)  # type: ignore[arg-type]
    found = checkpoint.load_model(model)
    return found if tokenizer is None else LoadedModel(found.model, tokenizer, model)


def _existing_directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"offload directory {directory} does not exist: create it, or leave offload out")
    return directory


def _source_record(loaded: LoadedModel) -> dict[str, Any]:
    if loaded.source is None:
        return {"kind": "memory", "name": type(loaded.model).__name__}
    return {"kind": loaded.source.kind, "name": loaded.source.name, "revision": loaded.source.revision}


def _verify(directory: Path, source: Source | None) -> None:
    """Judge the bytes on disk; a checkpoint that does not pass is an error, not a result."""
    against = source if source is not None and source.shards else None
    verdict = check(directory, against=against, trust_remote_code=against is not None and against.trust_remote_code)
    if not verdict.ok:
        raise HalveError(f"the checkpoint just written to {directory} is wrong, do not use it: {verdict.problems[0]}")
