"""One model, loaded, with its calibration data: prune it, then write, verify and publish what comes out."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from halve.checkpoint.directory import CONFIG, MEASURED
from halve.checkpoint.load import LoadedModel, Source, load_model, resolve
from halve.checkpoint.precision import differing_dtypes, dtype_to_prune_in
from halve.checkpoint.quantised import is_plain
from halve.checkpoint.shards import read_json
from halve.checkpoint.streamed import load_streamed
from halve.checkpoint.weight_files import refuse_copies
from halve.checkpoint.write import refuse_unlike_config, write_checkpoint
from halve.device import evaluation_mode
from halve.errors import CorruptFileError, HalveError, InputError, first_few
from halve.evaluation.figure import Perplexity
from halve.evaluation.top_one import TopOne
from halve.model.adapters import refuse_adapters
from halve.model.blocks import stand_in_batch
from halve.provenance import files_sha256
from halve.recorded import made_from
from halve.report import record
from halve.report.card import leave_beside
from halve.report.measured import measured_json, write_measured
from halve.run.directory import RunDirectory
from halve.run.events import Listener, Progress, RunLog, RunReport, announce
from halve.run.fingerprint import fingerprint
from halve.run.local import LocalExecutor
from halve.run.loop import Employ, Employing, prune_blocks, survey
from halve.run.phases import Phase, Phases
from halve.run.request import Request
from halve.run.settings import Settings
from halve.sensitivity.keep_dense import KeepDense
from halve.sensitivity.samples import Samples
from halve.text.calibration import CalibrationData, batch_tokens, calibration_batches
from halve.text.calibration_record import calibration_record
from halve.text.limits import is_encoder_decoder
from halve.text.tokens import TokenSet
from halve.verification import check


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`.

    Attributes:
        model: the pruned model; the very object that was given, if one was. Where weights stayed on disk (``stream``)
            it can be read and run, but writing to a weight ends the process: load the checkpoint to change it.
        report: what was done to every matrix.
        record: the content of ``halve.json`` but for the files' sha256.
        out: the checkpoint's directory, None if none was asked for.
        before: the dense model's perplexities, one a text of the evaluation, empty without one.
        after: the pruned model's.
        top_one_before: the dense model's top-1 accuracy; None where no pictures were to be looked at.
        top_one_after: the pruned model's.
        notes: what to know of the model on disk, and what could not be done once the checkpoint was complete (its
            report, or its evaluation); sentences.
    """

    model: nn.Module
    report: RunReport = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    out: Path | None
    before: tuple[Perplexity, ...] = ()
    after: tuple[Perplexity, ...] = ()
    top_one_before: TopOne | None = None
    top_one_after: TopOne | None = None
    notes: tuple[str, ...] = ()


def find(model: nn.Module | str | Path, request: Request, *, writes: bool) -> nn.Module | Source:
    """Find what the user named, and refuse what cannot be pruned as asked, before anything is loaded or created.

    Args:
        model: in memory, a directory, a file, or a name on the hub.
        request: how it is to be pruned.
        writes: whether a checkpoint is to be written.

    Raises:
        InputError: the model cannot be used as it is, or a dtype is asked for that it cannot be written in.
        UnsupportedModelError, CorruptFileError: as `halve.checkpoint.load.resolve`.
    """
    asked = request.loading
    if isinstance(model, nn.Module):
        if asked.attention is not None:
            raise InputError("attention is for a model that Halve loads: set it on the model, set_attn_implementation")
        _check_in_memory(model, writes=writes)
        if is_encoder_decoder(model) and request.settings.needs_calibration:
            request.calibration.refuse_own_text(type(model).__name__)
        return model
    source = resolve(model, revision=asked.revision, trust_remote_code=asked.trust_remote_code)
    if asked.written_dtype is not None and source.shards:
        raise InputError("dtype is for a GGUF file or a model in memory: a safetensors checkpoint keeps its own dtypes")
    named = {} if source.kind == "gguf" else read_json(source.path / CONFIG)
    if named.get("is_encoder_decoder") is True and request.settings.needs_calibration:
        request.calibration.refuse_own_text(source.name)
    if writes:
        refuse_copies(source.path, source.copies)
    return source


def _check_in_memory(model: nn.Module, *, writes: bool) -> None:
    from transformers import PreTrainedModel

    from halve.runtime.compressed_linear import CompressedLinear

    refuse_adapters(model)
    if writes and not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} is not a transformers model, so it cannot be written as a checkpoint: "
            "give no output directory, and save the model yourself"
        )
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise InputError("the model is accelerated, its pruned weights are packed: save it, and prune what was saved")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("the model has parameters on the meta device, without values: load it completely")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.is_floating_point() and not is_plain(parameter.dtype):
            raise InputError(f"{name} is {parameter.dtype}, not plain floating point: prune the model unquantised")
    if writes and isinstance(model, PreTrainedModel):
        refuse_unlike_config(model)


def choose_dense(
    loaded: LoadedModel,
    data: CalibrationData,
    settings: Settings,
    device: torch.device,
    listen: Listener | None = None,
) -> KeepDense | None:
    """Choose what stays dense for what pruning it costs (`halve.sensitivity`); None where nobody asks for it.

    Args:
        loaded: the dense model, on the CPU.
        data: what it is calibrated on, not empty.
        settings: what to do to every matrix.
        device: where the model is run.
        listen: told that it begins, and what to beware of.

    Raises:
        InputError, UnsupportedModelError: as `KeepDense.measured` and `halve.run.loop.survey`.
    """
    asked = settings.keep_dense
    if asked is None:
        return None

    def warn(sentence: str) -> None:
        if listen is not None:
            listen(Progress(0, 0, Phase.DAMAGE, 0, 0, caution=sentence))

    announce(listen, Phase.DAMAGE)
    together = stored_together(loaded)
    with evaluation_mode(loaded.model):
        samples = Samples.of(data, loaded.model, asked.tokens, batch_tokens(device, stepping=False))
        plan, _ = survey(loaded.model, samples.judging, settings, loaded.weights, together)
        found = asked.measured(
            loaded.model, plan, samples, settings.pattern, together=together, device=device, warn=warn
        )
    loaded.weights.release()
    return found


def load_found(
    found: nn.Module | Source, tokenizer: Any, attention: str | None = None, beside: Path | None = None
) -> LoadedModel:
    """Load what `find` has found, with all bits of its weights on disk, and with the attention asked for.

    A tokenizer that is given takes the place of the checkpoint's own. With ``beside``, a folder for what loading
    computes, the weights stay on disk (`halve.checkpoint.streamed`).
    """
    if isinstance(found, nn.Module):
        return LoadedModel(found, tokenizer, None)  # type: ignore[arg-type]
    dtype = dtype_to_prune_in(found)
    if beside is None:
        loaded = load_model(found, dtype=dtype, attention=attention)
    else:
        loaded = load_streamed(found, beside, dtype=dtype, attention=attention)
    notes = [differing_dtypes(found)]
    if found.copies:
        names = first_few([path.name for path in found.copies])
        notes.append(f"{names} of the cache is a second copy of the weights, and is not written")
    return replace(
        loaded,
        tokenizer=loaded.tokenizer if tokenizer is None else tokenizer,
        notes=(*loaded.notes, *filter(None, notes)),
    )


def as_written(loaded: LoadedModel, pruned: Pruned, request: Request) -> LoadedModel:
    """Return a model that was pruned in place; where it was written in another dtype, as that has rounded it."""
    asked = request.loading
    if pruned.out is None or asked.written_dtype is None:
        return loaded
    return load_model(pruned.out, trust_remote_code=asked.trust_remote_code, attention=asked.attention)


def prune_loaded(
    loaded: LoadedModel,
    data: CalibrationData,
    request: Request,
    run: RunDirectory | None,
    *,
    listen: Listener | None = None,
    call: Mapping[str, Any] | None = None,
    phases: Phases | None = None,
    before: Callable[[], None] | None = None,
    employing: Employing | None = None,
) -> Pruned:
    """Prune a loaded model in place, then write and verify it if there is a directory to.

    Args:
        loaded: the model.
        data: calibration tokens, pairs or batches; an empty list for a method and refit that need none.
        request: how to prune.
        run: where finished blocks and the checkpoint go, new or stopped; None writes nothing.
        listen: called at every step.
        call: what would repeat this, for `halve.resume`; None if it cannot be written down.
        phases: what already counts towards the run's seconds and memory; None begins at nothing.
        before: called once, when the run has begun, its plan is accepted, and nothing has been changed yet.
        employing: gives what does the work; None is this process.

    Raises:
        InputError, UnsupportedModelError, CalibrationError, LayerFailedError, CorruptFileError: as `halve.prune`.
    """
    phases = phases or Phases(request.placement.target)
    mark = None if run is None and employing is None else fingerprint(loaded, data, request)
    employ = LocalExecutor if employing is None or mark is None else employing(mark, stored_together(loaded))
    if run is None or mark is None:
        done = _prune(loaded, data, request, None, listen, phases, before, employ)
        return Pruned(loaded.model, done, _record(loaded, data, request, done, None), None, notes=loaded.notes)
    kept = data if isinstance(data, TokenSet) else None
    run.begin(mark, call, kept, request.calibration.asked, request.settings.fallback)
    log = RunLog(run.home)

    def tell(step: Progress) -> None:
        log(step)
        if listen is not None:
            listen(step)

    try:
        done = _prune(loaded, data, request, run, tell, phases, before, employ)
        content = _record(loaded, data, request, done, run.out)
        content["source"]["sha256"] = files_sha256(mark)
        done, notes = _publish(loaded, done, content, run, request.loading.written_dtype, phases)
    except HalveError as error:
        helps = not isinstance(error, CorruptFileError)  # to call again would not help against damage
        error.unfinished = run.out if helps and run.worth_keeping else None
        raise
    return Pruned(loaded.model, done, content, run.out, notes=(*loaded.notes, *notes))


def _publish(
    loaded: LoadedModel,
    done: RunReport,
    content: Mapping[str, Any],
    run: RunDirectory,
    dtype: torch.dtype | None,
    phases: Phases,
) -> tuple[RunReport, tuple[str, ...]]:
    """Write, verify and publish the checkpoint, but for what an earlier process did.

    Returns:
        tuple[RunReport, tuple[str, ...]]: the report with that, and what there is to say, sentences.
    """
    files: dict[str, str] | None = None
    notes: list[str] = []
    if not run.verified:
        with phases.timing(Phase.WRITE):
            if loaded.weights.mapped:
                run.check_blocks()
            files = write_checkpoint(run.prepare_staging(), loaded, done.changed, record=content, dtype=dtype)
        with phases.timing(Phase.VERIFY):
            _verify(run.staging, loaded.source)
        done = replace(
            done,
            seconds=dict(phases.seconds),
            peak_memory=dict(phases.peak_memory),
            peak_device_memory=dict(phases.peak_device_memory),
        )
        files[MEASURED] = write_measured(run.staging, measured_json(done))
        sums, notes = leave_beside(run.staging, loaded.source, run.out)
        files |= sums
    run.publish(files)
    return done, tuple(notes)


def _prune(
    loaded: LoadedModel,
    data: CalibrationData,
    request: Request,
    run: RunDirectory | None,
    listen: Listener | None,
    phases: Phases,
    before: Callable[[], None] | None,
    employ: Employ,
) -> RunReport:
    placement, settings = request.placement, request.settings
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(loaded.model))
        folder = None
        if placement.offload is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="halve-", dir=placement.offload)))
        most = batch_tokens(placement.target, stepping=settings.reconstruction is not None)
        batches = calibration_batches(data, loaded.model, most)
        return prune_blocks(
            loaded.model,
            batches or [stand_in_batch(loaded.model)],
            settings,
            device=placement.target,
            precision=placement.precision,
            shards=request.calibration.shards,
            offload=folder,
            listen=listen,
            collect=bool(batches),
            ledger=run,
            phases=phases,
            before=before,
            together=stored_together(loaded),
            weights=loaded.weights,
            fixed=_fixed(loaded) if settings.reorders else (),
            employ=employ,
        )


def _fixed(loaded: LoadedModel) -> set[str]:
    """Return the parameters and buffers that are no tensor of their own on disk, so that none can say how they lie."""
    from transformers import PreTrainedModel

    if not isinstance(loaded.model, PreTrainedModel):
        return set()
    alone = {names[0] for names in loaded.layout.everything() if len(names) == 1}
    return {
        name
        for name, _ in (*loaded.model.named_parameters(), *loaded.model.named_buffers())
        if name not in alone or len(loaded.layout.locate(name).tensors) != 1
    }


def stored_together(loaded: LoadedModel) -> list[tuple[str, ...]]:
    """Return which parameters are stored in one tensor; none where the model has no layout on disk."""
    from transformers import PreTrainedModel

    return loaded.layout.together if isinstance(loaded.model, PreTrainedModel) else []


def _record(
    loaded: LoadedModel,
    data: CalibrationData,
    request: Request,
    done: RunReport,
    out: Path | None,
) -> dict[str, Any]:
    return record.to_json(
        done,
        request.settings,
        {} if out is None else {m.name: loaded.layout.locate(m.parameter, m.expert) for m in done.matrices},
        record.masks(
            loaded.model, done.matrices, request.settings.pattern, request.loading.written_dtype, loaded.weights
        ),
        {} if out is None else {name: loaded.layout.locate(name).tensors for name in sorted(done.changed)},
        source=_source_record(loaded),
        moved={} if out is None else {m: loaded.layout.locate(m) for each in done.orders for m in each.parameters},
        notes=loaded.notes,
        calibration={
            "seed": request.calibration.seed,
            **({} if data == [] else {"shards": done.shards}),
            **calibration_record(data),
        },
        device=str(request.placement.target),
        precision=str(request.placement.precision).removeprefix("torch."),
    )


def _source_record(loaded: LoadedModel) -> dict[str, Any]:
    if loaded.source is None:
        return {"kind": "memory", "name": type(loaded.model).__name__}
    source = loaded.source
    described = {"kind": source.kind, "name": source.name, "revision": source.revision}
    return described | ({} if source.kind == "gguf" else made_from(source.path))


def _verify(directory: Path, source: Source | None) -> None:
    """Judge the bytes on disk; a checkpoint that does not pass is an error, not a result."""
    against = source if source is not None and source.shards else None
    verdict = check(directory, against=against, trust_remote_code=against is not None and against.trust_remote_code)
    if not verdict.ok:
        raise HalveError(f"the checkpoint just written to {directory} is wrong, do not use it: {verdict.problems[0]}")
