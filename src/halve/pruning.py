"""Prune a whole model: from what the user names to a pruned model, and to a verified checkpoint on disk."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halve.checkpoint import load as checkpoint
from halve.checkpoint import write as store
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.room import check_destination, check_shared_space
from halve.device import forward_precision, resolve_device, weight_dtype
from halve.errors import HalveError, InputError
from halve.evaluation.request import Evaluation
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction, parse_reconstruction
from halve.planner.where_faster import WhereFaster
from halve.report.measured import add_perplexity
from halve.run.call_record import read_back, written_down
from halve.run.directory import RunDirectory, open_run, recorded_call
from halve.run.events import Listener, Progress
from halve.run.fingerprint import code_fields
from halve.run.phases import Phases
from halve.run.settings import MIN_EXPERT_TOKENS, Settings, default_reconstruction
from halve.runtime.speed import check_measurable
from halve.solve.objective import Objective
from halve.text import tokens
from halve.text.calibration import DEFAULT_SAMPLES, Calibration, calibration_data, check_source
from halve.text.documents import is_on_hub
from halve.text.tokens import TokenSet
from halve.whole_model import Pruned, Request, prune_loaded, report_notes

if TYPE_CHECKING:
    from halve.evaluation.perplexity import Perplexity


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
    only_where_faster: WhereFaster | float | None = None,
    device: str = "auto",
    forward_dtype: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload: str | Path | None = None,
    work: str | Path | None = None,
    evaluation: Evaluation | None = None,
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
        method: see `halve.solve.methods`; ``auto`` takes ``effort="fast"``, ``"balanced"`` or ``"best"``, and a
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
        reconstruct: ``block``, or `halve.model.reconstruct.Reconstruction`: after a block's matrices are pruned, tune
            what survived, norms and biases included, against the dense model's output of that block; ``none`` leaves
            it. None is ``block`` for method ``auto`` with ``effort="best"``, else ``none``.
        objective: shrinkage of the statistics and targets from the dense model, see `halve.solve.objective.Objective`.
        only_where_faster: leave matrices dense that are not this many times as fast sparse on this machine, measured
            before anything is pruned, at batch 1 or as `halve.planner.where_faster.WhereFaster` says; they are listed
            with the reason. A run that goes on does not measure again.
        device: ``auto``, ``cpu``, ``cuda``, …
        forward_dtype: ``auto``, ``float32`` or ``bfloat16``: products of the calibration's forward passes.
            Statistics and solves are float32.
        dtype: dtype of the written checkpoint where the input has none of its own (GGUF); None keeps float32.
        revision: branch, tag or commit of a model on the hub; a run that goes on takes the commit it began with.
        trust_remote_code: whether to run Python code that comes with the model; it is copied to ``out``.
        offload: a directory where hidden states are kept instead of in memory; a temporary folder is made in it.
        work: a directory for finished blocks while the run lasts, new or empty; None keeps them in ``out``.
        evaluation: texts to measure perplexity on, dense and pruned, for the report; None measures nothing.
        listen: called with a `halve.run.events.Progress` at every step.
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
            WhereFaster.of(only_where_faster),
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
    _check_machine(request, evaluation)
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
        phases = Phases(request.device)
        with phases.timing("load"):
            loaded = _load(found, tokenizer)
        if run is not None:
            _check_room(loaded, run, dtype)
        request = _measured(request, loaded, run, phases, listen)
        judged = None
        hear = listen
        if evaluation is not None:
            judged = _Judged(evaluation, loaded, request.device, _length(calibration, seq_len), phases)
            hear = judged.listening(listen)
        wrote = calibration is None or (isinstance(calibration, str) and calibration == tokens.SELF)
        if wrote and not request.settings.needs_calibration:
            pruned = prune_loaded(loaded, [], request, run, seed=seed, listen=hear, call=call, phases=phases)
            return pruned if judged is None else judged.after(pruned, dtype, listen)
        # Neither must the model write its text again, nor the hub be asked again.
        far = wrote or (isinstance(calibration, str) and is_on_hub(calibration))
        kept = run.tokens(asked) if run is not None and far else None
        if kept is None and wrote and listen is not None:
            listen(Progress(0, 0, "generate", 0, 0))
        with phases.timing("calibrate"):
            data = kept or calibration_data(
                loaded, calibration, samples=samples, seq_len=seq_len, seed=seed, text_field=text_field
            )
        pruned = prune_loaded(loaded, data, request, run, seed=seed, listen=hear, call=call, asked=asked, phases=phases)
        return pruned if judged is None else judged.after(pruned, dtype, listen)


def resume(out: str | Path, *, fallback: str | None = None, listen: Listener | None = None) -> Pruned:
    """Continue the run that was stopped in a directory, from the first block that is not finished.

    Args:
        out: the output directory that `prune` was given.
        fallback: method for matrices that the asked one fails on, for a run that was begun without one.
        listen: called with a `halve.run.events.Progress` at every step.

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


def _check_room(loaded: LoadedModel, run: RunDirectory, dtype: torch.dtype | None) -> None:
    """Check that the checkpoint and, until it is complete, all finished blocks have room, each on its volume."""
    if run.verified:  # only names are left to be changed
        return
    run.prepare_staging()  # what a stopped attempt at the checkpoint has left there is removed
    blocks = sum(parameter.nbytes for parameter in loaded.model.parameters()) - run.kept_bytes
    check_shared_space([(run.out, store.output_bytes(loaded, dtype)), (run.state, blocks)])


def _measured(
    request: Request, loaded: LoadedModel, run: RunDirectory | None, phases: Phases, listen: Listener | None
) -> Request:
    """Return the request with what was measured of the model's matrices, now or when the run began."""
    asked, begun = request.settings.only_where_faster, None if run is None else run.fingerprint
    if asked is None:
        return request
    if listen is not None and begun is None:
        listen(Progress(0, 0, "measure", 0, 0))
    with phases.timing("measure"):
        found = asked.measured(
            loaded.model,
            request.settings.pattern,
            request.settings.skip,
            dtype=request.dtype or weight_dtype(loaded.model),
            device=request.device,
            begun=begun,
        )
    return replace(request, settings=replace(request.settings, only_where_faster=found))


def _check_machine(request: Request, evaluation: Evaluation | None) -> None:
    """Refuse what cannot be measured here, before the model is looked for."""
    if evaluation is not None:
        evaluation.check(request.device)
    if request.settings.only_where_faster is not None:  # the model's dtype is known later
        check_measurable(request.settings.pattern, torch.bfloat16, request.device)


class _Judged:
    """Perplexity before and after: the dense model's is measured once the run has begun and its plan is accepted."""

    def __init__(
        self, evaluation: Evaluation, loaded: LoadedModel, device: torch.device, seq_len: int | None, phases: Phases
    ) -> None:
        self._evaluation = evaluation
        self._model = loaded.model
        self._device = device
        self._phases = phases
        self._trusted = loaded.source is not None and loaded.source.trust_remote_code
        self._texts = evaluation.texts(loaded, seq_len)
        self._before: tuple[Perplexity, ...] = ()

    def listening(self, listen: Listener | None) -> Listener:
        """Return a listener that measures the dense model where nothing has been changed yet, in phase ``plan``."""

        def heard(step: Progress) -> None:
            if listen is not None:
                listen(step)
            if step.phase == "plan":
                _announce(listen)
                with self._phases.timing("evaluate"):
                    self._before = self._evaluation.measure(self._model, self._texts, self._device)

        return heard

    def after(self, pruned: Pruned, dtype: torch.dtype | None, listen: Listener | None) -> Pruned:
        """Measure the pruned model, and put both on record; what fails is a note beside the complete checkpoint."""
        _announce(listen)
        notes = list(pruned.notes)
        source = pruned.record["calibration"]["source"]
        if any(text.source == source for text in self._texts):
            notes.append(f"{source} is both calibrated on and evaluated on: perplexities on it flatter")
        try:
            model = pruned.model
            if pruned.out is not None and dtype is not None:  # rounded as it was written
                model = checkpoint.load_model(pruned.out, trust_remote_code=self._trusted).model
            after = self._evaluation.measure(model, self._texts, self._device)
        except (HalveError, RuntimeError, MemoryError) as error:
            notes.append(f"the model is pruned, but its perplexity was not measured: {error}")
            return replace(pruned, before=self._before, notes=tuple(notes))
        if pruned.out is not None:
            try:
                add_perplexity(pruned.out, self._before, after)
            except HalveError as error:
                notes.append(f"perplexity was measured, but not put on record: {error}")
            else:
                notes += report_notes(pruned.out)
        return replace(pruned, before=self._before, after=after, notes=tuple(notes))


def _announce(listen: Listener | None) -> None:
    if listen is not None:
        listen(Progress(0, 0, "evaluate", 0, 0))


def _length(calibration: Calibration, seq_len: int | None) -> int | None:
    """Return the length of the calibration sequences, None where the model decides or batches have their own."""
    if isinstance(calibration, torch.Tensor) and calibration.ndim == 2:
        return calibration.shape[1]
    return calibration.seq_len if isinstance(calibration, TokenSet) else seq_len


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

        from halve.runtime.linear import SparseLinear
        from halve.runtime.semi_structured import SemiStructuredLinear

        if out is not None and not isinstance(model, PreTrainedModel):
            raise InputError(
                f"{type(model).__name__} is not a transformers model, so it cannot be written as a checkpoint: "
                "leave out out, and save the model yourself"
            )
        if any(isinstance(module, SparseLinear | SemiStructuredLinear) for module in model.modules()):
            raise InputError(
                "the model is accelerated, its pruned weights are packed: save it, and prune what was saved"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError("the model has parameters on the meta device, without values: load it completely")
        if out is not None:
            check_destination(out, None, 0)
        return model
    source = checkpoint.resolve(model, revision=revision, trust_remote_code=trust_remote_code)
    if out is not None:
        check_destination(out, source, source.size)
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
