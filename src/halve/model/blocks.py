"""Run a model block by block: capture what enters the first block, then replay one block at a time.

Capture replaces each block's ``forward`` by a recorder that hands the hidden state on, so that one cheap pass of the
model's own code yields the embeddings and every argument that each block receives; no exception is thrown to stop the
model, and nothing has to be known of its family. `halve.model.replay` verifies beforehand that the replay computes what
the model computes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.durable import make_directory
from halve.checkpoint.room import check_space
from halve.device import own_settings, weight_dtype
from halve.errors import CalibrationError, InputError, first_few
from halve.maths.linalg import is_finite
from halve.memory import check_memory, would_fill
from halve.model.calls import Behaviour, Recorder, Recording, Template
from halve.model.stream import HiddenStates, Stream

Passing = Sequence[tuple[Sequence[nn.Module], Sequence[Template]]]
"""The blocks of stacks that need not be computed, with what they return."""
Batch = Mapping[str, Tensor]
"""Keyword arguments of one forward pass, as tensors: ``input_ids``, ``attention_mask``, ``pixel_values``, …"""

SIDE = 224
"""Of a picture, where nobody says."""
_PICTURES = 4
"""Dimensions of a batch of pictures."""
_MASKS = ("attention_mask", "decoder_attention_mask")


def run_model(model: nn.Module, batch: Batch) -> None:
    """Run one batch through the model without its head and without a cache; what comes out is not needed."""
    body = getattr(model, "base_model", model)
    accepted = signature(body.forward).parameters
    if any(name not in accepted and name in signature(model.forward).parameters for name in batch):
        body, accepted = model, signature(model.forward).parameters  # it prepares something for the base model
    # Where only **kwargs take it, the config says it; a model that is none of transformers' may not know the word.
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in accepted.values()) and hasattr(body, "config")
    extra = {"use_cache": False} if "use_cache" in accepted or takes_any else {}
    with torch.no_grad(), own_settings(model):
        body(**_in_dtype_of(model, batch), **extra)


def _in_dtype_of(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch whose images or sounds have the dtype of the model's weights, which its first layer insists on."""
    if not any(value.is_floating_point() for value in batch.values()):
        return batch
    dtype = weight_dtype(model)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def stand_in_batch(model: nn.Module) -> Batch:
    """Return a batch that shows how a model of text or of pictures is built, where its values do not matter.

    Raises:
        InputError: the model takes something else.
    """
    name = getattr(model, "main_input_name", "input_ids")
    config = getattr(model, "config", None)
    if name == "pixel_values" and not getattr(config, "is_encoder_decoder", False):
        height, width = sides_of(getattr(config, "image_size", None)) or (SIDE, SIDE)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if name != "input_ids":
        raise InputError(
            f"{type(model).__name__} takes {name}, not text, and Halve needs a batch to see how it is built: give "
            f"calibration=[{{{name!r}: …}}]"
        )
    ids = torch.zeros(1, 8, dtype=torch.int64)
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if decodes else {"input_ids": ids}


def sides_of(named: Any) -> tuple[int, int] | None:
    """Return height and width out of what settings call a size of pictures; None where it is none.

    Args:
        named: one number, two, or a mapping with ``height`` and ``width``, or with ``shortest_edge``.
    """
    if isinstance(named, Mapping):
        named = [named.get("height", named.get("shortest_edge")), named.get("width", named.get("shortest_edge"))]
    sides = [named, named] if isinstance(named, int) else named
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    height, width = sides
    fits = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
    return (height, width) if fits else None


def caution_of_sizes(batches: Sequence[Batch]) -> str:
    """Return what to do about pictures of several sizes where a model fails on them; empty where all are alike."""
    shapes = (value.shape for batch in batches for value in batch.values() if value.ndim == _PICTURES)
    sizes = list(dict.fromkeys(f"{shape[-2]} x {shape[-1]}" for shape in shapes))
    if len(sizes) < 2:
        return ""
    return (
        f"pictures come in several sizes ({first_few(sizes)}): let the image processor resize them (do_resize and size "
        "in its settings), or give pictures of the size that the model takes"
    )


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Make fused experts multiply slice by slice, so that each product can be observed; put the setting back after."""
    getter = getattr(model, "get_experts_implementation", None)
    before = getter() if getter is not None else {}
    if all(value is None for value in before.values()):
        yield
        return
    setter: Callable[[Any], None] = model.set_experts_implementation  # type: ignore[assignment]
    setter("eager")
    try:
        yield
    finally:
        setter(before)


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    behaviour: Behaviour,
    directory: Path | None = None,
    *,
    beside: Path | None = None,
    reserved: int = 0,
    copies: int = 1,
    passing: Passing = (),
) -> Stream:
    """Record the hidden state that enters the first block, and every block's arguments, for all batches.

    Args:
        model: the model; the blocks themselves are not computed, all else that it does is.
        blocks: its blocks, in order.
        batches: the calibration set.
        behaviour: of the blocks (`verify_replay`).
        directory: where to keep hidden states on disk; None keeps them in memory.
        beside: where to keep them if they would take more than half of the memory that is free, made if it is needed;
            None refuses what does not fit.
        reserved: bytes on that volume that something else is going to take.
        copies: how many sets of hidden states there are going to be, for the room they take.
        passing: the blocks of stacks that run later, with what they return: they need not be computed either.

    Raises:
        CalibrationError: an embedding is not finite.
        InputError: there is no room for so many hidden states; the first batch tells.
    """
    stream = Stream(behaviour.templates, directory, has_memory=behaviour.memory_mask is not None)
    for index, batch in enumerate(batches):
        recording = _recorded(model, blocks, batch, behaviour, passing)
        hidden = recording.calls[0][0]
        if not index:
            side = "decoder_input_ids" if behaviour.memory_mask is not None else ""
            size = copies * hidden.nbytes * _size(batches, side) // _size([batch], side)
            if directory is None and beside is not None and would_fill(size):
                directory = beside
                make_directory(beside)
                stream.hidden = HiddenStates(beside)
                size += reserved
            _check_room(size, directory)
        check_finite(hidden, f"the embeddings of calibration batch {index}")
        stream.append(hidden, [recording.calls[block][1] for block in range(len(blocks))], recording.objects)
        stream.valid.append(_valid_positions(batch, behaviour.mask))
        stream.memory_valid.append(_valid_positions(batch, behaviour.memory_mask))
    return stream


def _recorded(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Batch,
    behaviour: Behaviour,
    passing: Passing,
) -> Recording:
    recording = Recording(behaviour.living, behaviour.hands_on)
    with ExitStack() as stack:
        for index, (block, template) in enumerate(zip(blocks, behaviour.templates, strict=True)):
            stack.enter_context(replaced_forward(block, Recorder(index, template, recording)))
        for later, templates in passing:
            forgotten = Recording(living=False, hands_on=False)
            for index, (block, template) in enumerate(zip(later, templates, strict=True)):
                stack.enter_context(replaced_forward(block, Recorder(index, template, forgotten)))
        run_model(model, batch)
    return recording


def _size(batches: Sequence[Batch], name: str) -> int:
    """Return the number of entries of the batches' tensors of a name, or of their first ones if there are none.

    Hidden states are proportional to it.
    """
    return sum(batch.get(name, next(iter(batch.values()))).numel() for batch in batches)


def _check_room(bytes_needed: int, directory: Path | None) -> None:
    what = "the hidden states of the calibration set"
    if directory is None:
        check_memory(what, bytes_needed, "keep them on disk (offload), or use fewer samples")
    else:
        check_space(directory, bytes_needed, what, "free some space, or use fewer samples")


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let something shadow a module's forward, and put back what was there: the class's, or one of the instance."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _valid_positions(batch: Batch, name: str | None) -> Tensor | None:
    mask = None if name is None else batch.get(name)
    return None if mask is None or bool(mask.all()) else mask.bool()


def check_batches(batches: Sequence[Batch]) -> None:
    """Refuse calibration batches whose padding could not be told from data.

    Raises:
        InputError: there is none, or a mask is not (batch, sequence).
    """
    if not batches:
        raise InputError("no calibration batches were given: pass at least one")
    for index, batch in enumerate(batches):
        for name in _MASKS:
            mask = batch.get(name)
            if mask is not None and mask.ndim != 2:
                raise InputError(
                    f"{name} of calibration batch {index} has shape {tuple(mask.shape)}: give (batch, sequence), "
                    "1 where a position counts"
                )


def check_finite(hidden: Tensor, what: str) -> None:
    """Raise `CalibrationError` naming ``what`` and the first position where ``hidden`` is NaN or infinite."""
    if not is_finite(hidden):
        first = tuple((~hidden.isfinite()).nonzero()[0].tolist())
        raise CalibrationError(
            f"{what} are not finite at index {first}: the model gives NaN or infinity on this data; check its weights "
            "and dtype"
        )


def working_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """Return a float32 copy of ``block`` on ``device``; the original keeps its dtype and place."""
    return copy.deepcopy(block).to(device=device, dtype=torch.float32)
