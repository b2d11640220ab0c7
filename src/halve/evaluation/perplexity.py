"""Perplexity of a language model: causal, or the decoder's of an encoder-decoder."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from halve.checkpoint.load import resolve
from halve.checkpoint.mapped import Weights
from halve.checkpoint.streamed import AUTO, check_stream, loaded_to_measure
from halve.checks import check_count
from halve.device import forward_precision, model_device, resolve_device
from halve.errors import InputError, one_line
from halve.evaluation.figure import SECOND_HALF, Perplexity
from halve.evaluation.in_step import Passes, ready
from halve.evaluation.losses import LOGITS_AT_ONCE, finite_sums, token_losses
from halve.evaluation.teacher_forced import decoder_sums, labels_of_text
from halve.text.halves import evaluation_halves
from halve.text.limits import check_fits, check_length, is_encoder_decoder, refuse_unread
from halve.text.tokens import TokenSet, evaluation_corpus, evaluation_tokens
from halve.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halve.checkpoint.load import LoadedModel

_TOKENS_PER_BATCH = 4096
_PROBE = 16  # tokens on which the sliced head is compared with the model


def perplexity(
    model: nn.Module,
    tokens: TokenSet,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    forward_dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    weights: Weights | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on windows of tokens.

    Every window is predicted on its own from its first token, or from what stands before its text. The softmax is taken
    in float32 (float64 for float64 logits), sums in float64. The output head is applied to slices of the hidden states,
    so that logits of at most 2^24 elements exist at a time; where that is not exactly the model's own logits
    (soft-capped or scaled logits, no plain linear head), the model's own forward is used, one window at a time, and
    ``note`` of the result says so.

    An encoder-decoder reads the first half of each window and is scored on the second, given the tokens before
    (``scored`` of the result says so): that is another figure than a causal model's, and the two cannot be compared.

    Args:
        model: a causal language model: called with ``input_ids`` (batch, seq_len) it returns logits (batch, seq_len,
            vocabulary), or an object that has them as ``logits``. Or an encoder-decoder, for tokens that are cut.
        tokens: what to measure on; ids (windows, seq_len).
        batch_size: windows in one forward; None is as many as make 4096 tokens.
        device: where to run; the model is moved there meanwhile. None leaves it where it is.
        forward_dtype: ``"auto"`` multiplies float32 weights in bfloat16 where the hardware does so faster, and takes
            other weights as they are; ``"float32"`` computes in float32 whatever the weights are (they get a float32
            copy meanwhile); ``"bfloat16"`` multiplies float32 weights in bfloat16.
        progress: called with the windows done and the windows in all, after each batch.
        weights: where the model's weights lie; those on disk are read three times in all. None is memory.

    Raises:
        InputError: an argument is not usable, the windows do not fit the model, or the loss of a window is not finite;
            the message names which.
    """
    if tokens.cut is None and tokens.seq_len <= max(1, tokens.lead):
        least = 1 + max(1, tokens.lead)
        raise InputError(f"windows of seq_len = {tokens.seq_len} leave no token to predict: give at least {least}")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_fits(tokens, model)
    place = model_device(model) if device is None else resolve_device(device)
    started = time.perf_counter()
    scored = tokens.seq_len - max(1, tokens.lead) if tokens.cut is None else labels_of_text(tokens)
    with ready(model, place, forward_dtype, weights) as passes:
        if tokens.cut is None:
            sums, note = _window_sums(model, tokens, place, batch_size, progress, passes)
        else:
            sums, note = decoder_sums(model, tokens, place, batch_size, progress, passes), ""
    nll = math.fsum(sums) / (tokens.samples * scored)
    return Perplexity(
        value=torch.tensor(nll, dtype=torch.float64).exp().item(),
        windows=tokens.samples,
        seq_len=tokens.seq_len,
        dtype=str(passes.dtype).removeprefix("torch."),
        source=tokens.source,
        tokens_sha256=tokens.sha256,
        seconds=time.perf_counter() - started,
        nll=nll,
        note=note,
        bos=tokens.bos,
        scored=SECOND_HALF if tokens.cut is not None else "",
        window_nll=tuple(total / scored for total in sums),
        versions=versions(),
    )


def evaluate(
    model: nn.Module | str | Path,
    data: TokenSet | str | Path,
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    text_field: str = "text",
    bos: str = "auto",
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    forward_dtype: str = "auto",
    trust_remote_code: bool = False,
    stream: str = AUTO,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on text.

    Args:
        model: a model in memory, or a checkpoint as `halve.checkpoint.load.load_model` takes it.
        data: text as `halve.text.tokens.evaluation_tokens` takes it, or ready tokens, which have their own length.
        seq_len: tokens in a window, for text.
        max_windows: only the first windows, for text; None takes all.
        tokenizer: for text; None takes the checkpoint's own.
        text_field: key or column of the text in ``.jsonl`` and ``.parquet`` files.
        bos: which windows begin with BOS, for text: ``auto``, ``always``, ``never`` or ``once``, see
            `halve.text.special_tokens.begin_sequences`.
        batch_size: as `perplexity` has it, and ``forward_dtype`` and ``progress``.
        device: ``"auto"`` is where a model in memory lies, and the GPU if there is one for a checkpoint.
        trust_remote_code: whether to run Python code that comes with the checkpoint.
        stream: whether the weights of a checkpoint stay on disk, and are read block by block: ``always``, ``never``, or
            ``auto``, where they would take more than half of the memory that is free.

    Raises:
        InputError: see `perplexity` and `halve.text.tokens.evaluation_tokens`; or there is no tokenizer.
        HalveError: the checkpoint cannot be loaded, see `halve.checkpoint.load.load_model`.
    """
    place = model_device(model) if isinstance(model, nn.Module) and device == "auto" else resolve_device(device)
    forward_precision(forward_dtype, place)
    if not isinstance(data, TokenSet):
        # before a long load
        evaluation_corpus(data, seq_len=seq_len, max_windows=max_windows, text_field=text_field, bos=bos)
    check_stream(stream)
    with ExitStack() as stack:
        weights = None
        if isinstance(model, nn.Module):
            network: nn.Module = model
        else:
            source = resolve(model, trust_remote_code=trust_remote_code)
            loaded = stack.enter_context(loaded_to_measure(source, stream))
            network, weights = loaded.model, loaded.weights
            tokenizer = tokenizer or loaded.tokenizer
        if isinstance(data, TokenSet):
            tokens = data
        elif tokenizer is None:
            raise InputError("text needs a tokenizer, and the model has none: give tokenizer, or a TokenSet as data")
        else:
            tokens = _windows(
                data, tokenizer, network, seq_len=seq_len, max_windows=max_windows, text_field=text_field, bos=bos
            )
        how: dict[str, Any] = {"batch_size": batch_size, "device": place, "forward_dtype": forward_dtype}
        return perplexity(network, tokens, **how, progress=progress, weights=weights)


def evaluation_texts(
    loaded: "LoadedModel",
    sources: Sequence[str | Path],
    *,
    seq_len: int,
    max_windows: int | None,
    text_field: str,
    bos: str = "auto",
) -> list[TokenSet]:
    """Tokenise the evaluation texts for a model.

    Args:
        loaded: the model, and its tokenizer; all else is as `halve.text.tokens.evaluation_tokens` has it.

    Raises:
        InputError: no tokenizer, or a source or the length is not usable.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so perplexity of text cannot be measured: give another model")
    options: dict[str, Any] = {"max_windows": max_windows, "text_field": text_field, "bos": bos}
    return [_windows(source, tokenizer, loaded.model, seq_len=seq_len, **options) for source in sources]


def _windows(
    source: str | Path, tokenizer: "PreTrainedTokenizerBase", model: nn.Module, *, seq_len: int, **options: Any
) -> TokenSet:
    if not is_encoder_decoder(model):
        check_length(seq_len, model)
        return evaluation_tokens(source, tokenizer, seq_len=seq_len, **options)
    refuse_unread(model, "its perplexity on text cannot be measured", usable=False)
    return evaluation_halves(source, tokenizer, model, seq_len=seq_len, **options)


def _window_sums(
    model: nn.Module,
    tokens: TokenSet,
    device: torch.device,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
    passes: Passes,
) -> tuple[list[float], str]:
    """Sum the negative log-likelihood over each window's tokens; with that, why the model's own logits were used."""
    parts = _split(model, tokens.ids[:1, :_PROBE].to(device), passes)
    batch = 1 if isinstance(parts, str) else batch_size or max(1, _TOKENS_PER_BATCH // tokens.seq_len)

    def sums(start: int) -> list[float]:
        ids = tokens.ids[start : start + batch].to(device)
        losses = _whole_nll(model, ids) if isinstance(parts, str) else _sliced_nll(parts, ids)
        found = finite_sums(losses[:, max(1, tokens.lead) - 1 :], start, tokens.source)  # the first is of the second
        if progress is not None:
            progress(start + len(ids), tokens.samples)
        return found

    found = passes.run([partial(sums, start) for start in range(0, tokens.samples, batch)])
    return [total for batch_sums in found for total in batch_sums], parts if isinstance(parts, str) else ""


class _Parts(NamedTuple):
    base: nn.Module
    head: nn.Linear


def _sliced_nll(parts: _Parts, ids: Tensor) -> Tensor:
    """Losses (batch, seq_len - 1) of ids (batch, seq_len), by the output head on slices of the hidden states."""
    hidden = _last_hidden(_forward(parts.base, ids))[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    step = max(1, LOGITS_AT_ONCE // parts.head.out_features)
    slices = zip(torch.split(hidden, step), torch.split(targets, step), strict=True)
    return torch.cat([token_losses(parts.head(states), target) for states, target in slices]).reshape(len(ids), -1)


def _whole_nll(model: nn.Module, ids: Tensor) -> Tensor:
    """Losses (batch, seq_len - 1) of ids (batch, seq_len), from the model's own logits."""
    logits = _logits(_forward(model, ids))[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    slices = zip(torch.split(logits, step), torch.split(targets, step), strict=True)
    return torch.cat([token_losses(part, target) for part, target in slices]).reshape(len(ids), -1)


def _split(model: Any, probe: Tensor, passes: Passes) -> _Parts | str:
    """Return the base model and the output head that may be run apart, or why there are none.

    One forward of the model on ``probe`` (1, length) has to show the head reading exactly what the base returned, and
    the model returning exactly what the head did; and the base run on its own has to return the same.

    Raises:
        InputError: the model predicts no tokens, or sees those that it is to predict.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # Most models call their base model, OPT and its like only the decoder in it.
    bases = [getattr(model, "base_model", model), model.get_decoder() if hasattr(model, "get_decoder") else model]
    bases = [base for base in bases if isinstance(base, nn.Module) and base is not model]
    seen: dict[nn.Module, tuple[Any, Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(module, (args, output))  # of the probe, which goes first

    watched = [head, *bases] if type(head) is nn.Linear else []
    hooks = [module.register_forward_hook(record) for module in watched]
    try:
        logits = _causal_logits(model, probe, passes)
    finally:
        for hook in hooks:
            hook.remove()
    if type(head) is not nn.Linear or not bases:
        return "the model has no plain linear output head over a base model, so its own forward was used"
    called = [base for base in bases if base in seen]
    if head not in seen or not called:
        return "the model does not call its output head or its base model, so its own forward was used"
    (read,), returned = seen[head]
    hidden = _last_hidden(seen[called[0]][1])
    if not torch.equal(hidden, read):
        return "the model changes the hidden states before the output head, so its own forward was used"
    if not torch.equal(returned.to(logits.dtype), logits):
        return "the model changes its logits after the output head, so its own forward was used"
    alone = _last_hidden(passes.run([lambda: _forward(called[0], probe)])[0])
    if not bool((alone - hidden).norm() <= 0.01 * hidden.norm()):  # not exact, as GPUs may add in another order
        return "the base model does something else when run on its own, so the model's own forward was used"
    return _Parts(called[0], head)


def _causal_logits(model: nn.Module, probe: Tensor, passes: Passes) -> Tensor:
    """Return the logits of ``probe`` (1, length), which must not see the tokens that they are to predict.

    Raises:
        InputError: they do, or the model has none.
    """
    name = type(model).__name__
    other, last = probe.clone(), int(probe[0, -1])
    other[:, -1] = last - 1 if last else 1
    try:
        logits, changed = passes.run([lambda: _logits(_forward(model, probe)), lambda: _logits(_forward(model, other))])
    except AttributeError as error:
        raise InputError(
            f"{name} has no perplexity, since it predicts no tokens ({one_line(error)}): give a causal language model"
        ) from error
    if logits.ndim != 3 or logits.shape[:2] != probe.shape:
        raise InputError(
            f"{name} has no perplexity: its logits have shape {tuple(logits.shape)} for {probe.shape[1]} tokens, where "
            "a causal language model has some for every token"
        )
    before, after = logits[:, :-1].double(), changed[:, :-1].double()
    if bool((before - after).norm() > 0.01 * before.norm()):
        raise InputError(
            f"{name} sees the tokens that it is to predict (a last token changes what it says of those before it): "
            "perplexity is for causal language models"
        )
    return logits


def _forward(model: nn.Module, ids: Tensor) -> Any:
    # A cache of keys and values would be built for nothing; only transformers' models know the word.
    return model(input_ids=ids, use_cache=False) if hasattr(model, "config") else model(input_ids=ids)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _last_hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
