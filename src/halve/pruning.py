"""Prune a whole model: from what the user names to a pruned model, and to a verified checkpoint on disk."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from halve import checkpoint, report, store, tokens
from halve.blocks import Batch
from halve.checkpoint import LoadedModel
from halve.device import evaluation_mode, forward_precision, resolve_device
from halve.errors import CorruptFileError, InputError
from halve.objective import Objective
from halve.pattern import Pattern
from halve.reconstruct import Reconstruction, default_reconstruction, parse_reconstruction
from halve.run import prune_blocks
from halve.run_report import Listener, RunReport
from halve.settings import MIN_EXPERT_TOKENS, Settings
from halve.tokens import TokenSet
from halve.verification import check

DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
_BATCH_TOKENS = 4096
"""Tokens a batch of the calibration set holds at most (at least one sequence)."""
_STEP_TOKENS = 512
"""The same where blocks are reconstructed, which takes one optimiser step a batch."""

Calibration = str | Path | TokenSet | Tensor | Sequence[Batch] | None
"""A file, directory, ``c4``, ``wikitext2`` or ``self`` (None); tokens (samples, seq_len); or ready batches."""


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`.

    Attributes:
        model: the pruned model; the very object that was given, if one was.
        report: what was done to every matrix.
        record: the content of ``halve.json``.
        out: the checkpoint's directory, None if none was asked for.
    """

    model: nn.Module
    report: RunReport
    record: dict[str, Any]
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
    offload: str | Path | None = None,
    listen: Listener | None = None,
    **options: Any,
) -> Pruned:
    """Prune every linear layer inside a model's blocks to an N:M (or unstructured) pattern.

    Args:
        model: a model in memory (pruned in place), a local directory, a ``.gguf`` file, or a hub id.
        out: directory for the pruned Hugging Face checkpoint; it must not exist yet or be empty. Required unless
            ``model`` is in memory.
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
        fallback: method for matrices that the asked one fails on; None stops there.
        min_expert_tokens: experts that see fewer tokens are pruned by magnitude, and reported as fallen back.
        reconstruct: ``block``, or `halve.reconstruct.Reconstruction`: after a block's matrices are pruned, tune what
            survived, norms and biases included, against the dense model's output of that block; ``none`` leaves it.
            None is ``block`` for method ``auto`` with ``effort="best"``, else ``none``.
        objective: shrinkage of the statistics and targets from the dense model, see `halve.objective.Objective`.
        device: ``auto``, ``cpu``, ``cuda``, …
        forward_dtype: ``auto``, ``float32`` or ``bfloat16``: products of the calibration's forward passes.
            Statistics and solves are float32.
        dtype: dtype of the written checkpoint where the input has none of its own (GGUF); None keeps float32.
        offload: a directory where hidden states are kept instead of in memory; a temporary folder is made in it.
        listen: called with a `halve.run_report.Progress` at every step.
        **options: of the method and the refit.

    Returns:
        Pruned: the model, and what was done to every matrix.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        UnsupportedModelError: the model's structure or checkpoint is not supported; nothing was done.
        CalibrationError: the calibration data gave no usable statistics.
        LayerFailedError: a matrix could not be pruned and no fallback was allowed.
    """
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
            objective or Objective(),
        ),
        resolve_device(device),
        forward_precision(forward_dtype, resolve_device(device)),
        dtype,
        None if offload is None else _existing_directory(offload),
    )
    destination = None if out is None else Path(out)
    loaded = _load(model, destination, dtype, tokenizer)
    if calibration is None and not request.settings.needs_calibration:
        return prune_loaded(loaded, [], request, destination, seed=seed, listen=listen)
    data = calibration_data(loaded, calibration, samples=samples, seq_len=seq_len, seed=seed, text_field=text_field)
    return prune_loaded(loaded, data, request, destination, seed=seed, listen=listen)


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
    out: Path | None,
    *,
    seed: int,
    listen: Listener | None = None,
) -> Pruned:
    """Prune a loaded model in place, then write and verify it if ``out`` is given.

    Args:
        loaded: the model.
        data: calibration tokens or batches; an empty list for a method and refit that need none.
        request: how to prune.
        out: the checkpoint's directory, absent or empty.
        seed: that chose the calibration data, for the record.
        listen: called at every step.

    Raises:
        InputError, UnsupportedModelError, CalibrationError, LayerFailedError: as `prune`.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(loaded.model))
        folder = None
        if request.offload is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="halve-", dir=request.offload)))
        most = _BATCH_TOKENS if request.settings.reconstruction is None else _STEP_TOKENS
        batches = token_batches(data.ids, most) if isinstance(data, TokenSet) else data
        done = prune_blocks(
            loaded.model,
            batches or [{"input_ids": torch.zeros(1, 8, dtype=torch.int64)}],
            request.settings,
            device=request.device,
            precision=request.precision,
            offload=folder,
            listen=listen,
            collect=bool(batches),
        )
    record = report.to_json(
        done,
        request.settings,
        {} if out is None else {m.name: loaded.layout.locate(m.parameter, m.expert) for m in done.matrices},
        {} if out is None else {name: loaded.layout.locate(name).tensors for name in sorted(done.changed)},
        source=_source_record(loaded),
        calibration={"seed": seed, **_calibration_record(data)},
        device=str(request.device),
        precision=str(request.precision).removeprefix("torch."),
    )
    if out is not None:
        store.write_checkpoint(out, loaded, done.changed, record, dtype=request.dtype)
        _verify(out, None if loaded.source is None else loaded.source.path)
    return Pruned(loaded.model, done, record, out)


def calibration_data(
    loaded: LoadedModel,
    calibration: Calibration,
    *,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    text_field: str = "text",
) -> TokenSet | list[Batch]:
    """Turn what the user named into calibration tokens; ready batches pass through.

    Args:
        loaded: the model, and its tokenizer.
        calibration: see `prune`.
        samples: as for `prune`.
        seq_len: as for `prune`.
        seed: as for `prune`.
        text_field: as for `prune`.

    Raises:
        InputError: the source is not usable, or its tokens do not fit the model.
        CalibrationError: the source has too few tokens.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point() or not calibration.numel():
            raise InputError(
                f"calibration is a tensor of shape {tuple(calibration.shape)} and {calibration.dtype}: "
                "give token ids of shape (samples, seq_len), or batches as dictionaries"
            )
        calibration = TokenSet(calibration, "tokens", tokens.hash_ids(calibration), calibration.shape[0])
    if isinstance(calibration, TokenSet):
        tokens.check_vocabulary(calibration.ids, loaded.model, calibration.source)
        tokens.check_length(calibration.seq_len, loaded.model)
        return calibration
    if calibration is not None and not isinstance(calibration, str | Path):
        return _checked_batches(calibration)
    return text_tokens(
        loaded,
        tokens.SELF if calibration is None else calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        text_field=text_field,
    )


def text_tokens(
    loaded: LoadedModel, source: str | Path, *, samples: int, seq_len: int | None, seed: int, text_field: str
) -> TokenSet:
    """Tokenise calibration text for a model.

    Args:
        loaded: the model, and its tokenizer.
        source: see `prune`; ``self`` lets the model write.
        samples: as for `prune`.
        seq_len: as for `prune`.
        seed: as for `prune`.
        text_field: as for `prune`.

    Raises:
        InputError: no tokenizer, or the source or the length is not usable.
        CalibrationError: the source has too few tokens.
    """
    if loaded.tokenizer is None:
        raise InputError("the model has no tokenizer, so text cannot be used: give tokenizer, or tokens as calibration")
    if seq_len is None:
        seq_len = default_length(loaded)
    tokens.check_length(seq_len, loaded.model)
    return tokens.calibration_tokens(
        source,
        loaded.tokenizer,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        field=text_field,
        model=loaded.model,
    )


def default_length(loaded: LoadedModel) -> int:
    """Return the length of calibration sequences where none is asked for: 2048, or the model's maximum if less."""
    return min(DEFAULT_SEQ_LEN, tokens.longest(loaded.model) or DEFAULT_SEQ_LEN)


def token_batches(ids: Tensor, most: int = _BATCH_TOKENS) -> list[Batch]:
    """Cut token ids (samples, seq_len) into batches of at most ``most`` tokens (at least one sequence)."""
    rows = max(1, most // ids.shape[1])
    return [{"input_ids": ids[start : start + rows]} for start in range(0, len(ids), rows)]


def _checked_batches(batches: Sequence[Batch]) -> list[Batch]:
    batches = list(batches)
    if not batches:
        raise InputError("calibration is an empty list: give at least one batch, or None to let the model write")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise InputError(
                f"calibration batch {index} is not a dictionary of tensors: give keyword arguments of the model, "
                "for example {'input_ids': ids} or {'pixel_values': images}"
            )
    return [dict(batch) for batch in batches]


def _load(model: nn.Module | str | Path, out: Path | None, dtype: torch.dtype | None, tokenizer: Any) -> LoadedModel:
    """Load what the user named, after checking that the result can be written."""
    if isinstance(model, nn.Module):
        from transformers import PreTrainedModel

        if out is not None and not isinstance(model, PreTrainedModel):
            raise InputError(
                f"{type(model).__name__} is not a transformers model, so it cannot be written as a checkpoint: "
                "leave out out, and save the model yourself"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError("the model has parameters on the meta device, without values: load it completely")
        loaded = LoadedModel(model, tokenizer, None)  # type: ignore[arg-type]
    else:
        source = checkpoint.resolve(model)
        if out is not None:
            store.check_destination(out, source, source.size)
        if dtype is not None and source.shards:
            raise InputError("dtype is for GGUF input: a safetensors checkpoint keeps its own dtypes")
        found = checkpoint.load_model(source)
        loaded = found if tokenizer is None else LoadedModel(found.model, tokenizer, source)
    if out is not None:
        store.check_destination(out, loaded.source, store.output_bytes(loaded, dtype))
    return loaded


def _existing_directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"offload directory {directory} does not exist: create it, or leave offload out")
    return directory


def _source_record(loaded: LoadedModel) -> dict[str, Any]:
    if loaded.source is None:
        return {"kind": "memory", "name": type(loaded.model).__name__}
    return {"kind": loaded.source.kind, "name": loaded.source.name, "revision": loaded.source.revision}


def _calibration_record(data: TokenSet | Sequence[Batch]) -> dict[str, Any]:
    if isinstance(data, TokenSet):
        return {
            "source": data.source,
            "samples": data.samples,
            "seq_len": data.seq_len,
            "tokens": data.tokens,
            "documents": data.documents,
            "separator": data.separator,
            "revision": data.revision,
            "sha256": data.sha256,
        }
    return {"source": "batches" if data else "none", "batches": len(data)}


def _verify(directory: Path, source: Path | None) -> None:
    """Judge the bytes on disk; a checkpoint that does not pass is an error, not a result."""
    against = source if source is not None and source.is_dir() else None
    verdict = check(directory, against=against)
    if not verdict.ok:
        raise CorruptFileError(
            f"the checkpoint just written to {directory} is wrong, do not use it: {verdict.problems[0]}"
        )
