"""Run a model block by block: capture what enters the first block, then replay one block at a time.

Capture replaces each block's ``forward`` by a recorder that hands the hidden state on, so that one cheap pass of the
model's own code yields the embeddings and every argument that each block receives; no exception is thrown to stop the
model, and nothing has to be known of its family. That the replay computes what the model computes is verified on a
short sample before anything else happens.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halve.checkpoint.room import check_space
from halve.errors import CalibrationError, InputError, UnsupportedModelError
from halve.memory import check_memory

Batch = Mapping[str, Tensor]
"""Keyword arguments of one forward pass, as tensors: ``input_ids``, ``attention_mask``, ``pixel_values``, …"""

PROBE_TOKENS = 32
_REPLAY_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """The arguments of one block in one batch, except the hidden state.

    Attributes:
        args: further positional arguments.
        kwargs: keyword arguments.
        keyword: name of the hidden state's argument if it is passed by keyword, else None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None


class HiddenStates:
    """The hidden state of every batch at the current block, in memory or, given a directory, on disk.

    Args:
        directory: an existing directory for one safetensors file a batch; None keeps the tensors in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._tensors: list[Tensor | Path] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, batch: int) -> Tensor:
        stored = self._tensors[batch]
        return load_file(stored)["hidden"] if isinstance(stored, Path) else stored

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._tensors[batch] = self._store(batch, hidden)

    def copy(self, name: str) -> "HiddenStates":
        """Return a second set of the same states; on disk, in a new folder ``name``."""
        folder = None if self._directory is None else self._directory / name
        if folder is not None:
            folder.mkdir(exist_ok=True)
        other = HiddenStates(folder)
        for batch in range(len(self)):
            other.append(self[batch])
        return other

    def append(self, hidden: Tensor) -> None:
        """Add the hidden state of the next batch."""
        self._tensors.append(self._store(len(self), hidden))

    def _store(self, batch: int, hidden: Tensor) -> Tensor | Path:
        hidden = hidden.detach().to("cpu").contiguous()
        if self._directory is None:
            return hidden
        path = self._directory / f"hidden-{batch:05d}.safetensors"
        save_file({"hidden": hidden}, path)
        return path


@dataclass
class Stream:
    """The calibration set on its way through the model.

    Attributes:
        hidden: (batch, sequence, d_model) hidden states of every batch, at the input of the current block.
        calls: ``calls[block][batch]``; equal arguments share memory.
        valid: for each batch the (batch, sequence) mask of the positions that count, None when all do.
    """

    hidden: HiddenStates
    calls: list[list[Call]]
    valid: list[Tensor | None]


@dataclass
class _Recorder:
    """Stands in for a block's forward: keeps the call, passes the hidden state through."""

    returns: Any
    calls: list[tuple[Tensor, Call]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, call = args[0], Call(args[1:], kwargs, None)
        else:
            keyword = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
            rest = {key: value for key, value in kwargs.items() if key != keyword}
            hidden, call = kwargs[keyword], Call((), rest, keyword)
        self.calls.append((hidden, call))
        if not isinstance(self.returns, tuple):
            return hidden
        # Other tensors belong to the short sample: whoever needs them must not get them (`verify_replay` will tell).
        return (hidden, *(None if isinstance(value, Tensor) else value for value in self.returns[1:]))


def run_model(model: nn.Module, batch: Batch) -> None:
    """Run one batch through the model without its head and without a cache; what comes out is not needed."""
    body = getattr(model, "base_model", model)
    extra = {"use_cache": False} if "use_cache" in signature(body.forward).parameters else {}
    with torch.no_grad():
        body(**batch, **extra)


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the hidden state after ``block``, without gradients.

    Args:
        block: the block, with the device and dtype that hidden and call have.
        hidden: (batch, sequence, d_model).
        call: the block's other arguments.
    """
    with torch.no_grad():
        return apply_block(block, hidden, call)


def apply_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the hidden state after ``block``, as `run_block` does, but with whatever gradients are asked for."""
    if call.keyword is None:
        output = block(hidden, *call.args, **call.kwargs)
    else:
        output = block(**{call.keyword: hidden}, **call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def to_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move every tensor in a nest of tuples, lists and dicts; floating-point ones also change their dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Call):
        args, kwargs = to_device((value.args, value.kwargs), device, dtype)
        return Call(args, kwargs, value.keyword)
    if isinstance(value, dict):
        return {key: to_device(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [to_device(item, device, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def probe_batch(batch: Batch) -> Batch:
    """Return one short sample of ``batch``: the first row, and of token sequences the first 32 positions."""
    text = "input_ids" in batch or "inputs_embeds" in batch
    return {
        key: value[:1, :PROBE_TOKENS].contiguous() if text and value.ndim >= 2 else value[:1]
        for key, value in batch.items()
    }


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


def block_returns(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> tuple[list[Any], Tensor]:
    """Run ``batch`` through the whole model and note what each block returns.

    Args:
        model: the model.
        blocks: its blocks, in order.
        batch: a short batch (`probe_batch`).

    Returns:
        tuple[list[Any], Tensor]: what each block returned, with the hidden state at its place, and the hidden state
        after the last block.

    Raises:
        UnsupportedModelError: a block ran not once but more often or never, or returned no hidden state.
    """
    returned: list[list[Any]] = [[] for _ in blocks]
    with ExitStack() as hooks:
        for block, outputs in zip(blocks, returned, strict=True):
            hooks.enter_context(
                block.register_forward_hook(lambda _module, _args, output, outputs=outputs: outputs.append(output))
            )
        run_model(model, batch)
    for index, outputs in enumerate(returned):
        if len(outputs) != 1:
            raise UnsupportedModelError(
                f"block {index} of {type(model).__name__} ran {len(outputs)} times in one forward pass: "
                "Halve needs blocks that run exactly once"
            )
        hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        if not isinstance(hidden, Tensor):
            raise UnsupportedModelError(
                f"block {index} of {type(model).__name__} returned {type(hidden).__name__}, not a hidden state"
            )
    firsts = [outputs[0] for outputs in returned]
    last = firsts[-1]
    return firsts, last[0] if isinstance(last, tuple) else last


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    returns: Sequence[Any],
    directory: Path | None = None,
    *,
    copies: int = 1,
) -> Stream:
    """Record the hidden state that enters the first block, and every block's arguments, for all batches.

    Args:
        model: the model; the blocks themselves are not computed.
        blocks: its blocks, in order.
        batches: the calibration set.
        returns: what each block returns (`block_returns`).
        directory: where to keep hidden states on disk; None keeps them in memory.
        copies: how many sets of hidden states there are going to be, for the room they take.

    Raises:
        CalibrationError: an embedding is not finite.
        InputError: there is no room for so many hidden states; the first batch tells.
    """
    recorders = [_Recorder(value) for value in returns]
    stream = Stream(HiddenStates(directory), [[] for _ in blocks], [])
    with _replaced_forwards(blocks, recorders):
        for index, batch in enumerate(batches):
            run_model(model, batch)
            for position, recorder in enumerate(recorders):
                hidden, call = recorder.calls.pop()
                first = stream.calls[position][0] if index else call
                stream.calls[position].append(first if _same(first, call) else call)
                if position == 0:
                    if not index:
                        _check_room(copies * hidden.nbytes * _size(batches) // _size([batch]), directory)
                    check_finite(hidden, f"the embeddings of calibration batch {index}")
                    stream.hidden.append(hidden)
            stream.valid.append(_valid_positions(batch))
    return stream


def _size(batches: Sequence[Batch]) -> int:
    """Return the number of entries of the batches' first tensors, which hidden states are proportional to."""
    return sum(next(iter(batch.values())).numel() for batch in batches)


def _check_room(bytes_needed: int, directory: Path | None) -> None:
    what = "the hidden states of the calibration set"
    if directory is None:
        check_memory(what, bytes_needed, "keep them on disk (offload), or use fewer samples")
    else:
        check_space(directory, bytes_needed, what, "free some space, or use fewer samples")


@contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], recorders: Sequence[_Recorder]) -> Iterator[None]:
    # An instance attribute shadows the class's forward; deleting it restores exactly what was there.
    for block, recorder in zip(blocks, recorders, strict=True):
        block.__dict__["forward"] = recorder
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _valid_positions(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def check_batches(batches: Sequence[Batch]) -> None:
    """Refuse calibration batches whose padding could not be told from data.

    Raises:
        InputError: there is none, or an attention mask is not (batch, sequence).
    """
    if not batches:
        raise InputError("no calibration batches were given: pass at least one")
    for index, batch in enumerate(batches):
        mask = batch.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise InputError(
                f"attention_mask of calibration batch {index} has shape {tuple(mask.shape)}: give (batch, sequence), "
                "1 where a position counts"
            )


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of arguments are equal, tensors by value."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Call):
        return a.keyword == b.keyword and _same((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def check_finite(hidden: Tensor, what: str) -> None:
    """Raise `CalibrationError` naming ``what`` and the first position where ``hidden`` is NaN or infinite."""
    # A sum is finite only if every term is, and costs one pass; float64 keeps large float16 values from overflowing.
    if not bool(hidden.sum(dtype=torch.float64).isfinite()):
        bad = (~hidden.isfinite()).nonzero()
        where = f" at index {tuple(bad[0].tolist())}" if len(bad) else ""
        raise CalibrationError(
            f"{what} are not finite{where}: the model gives NaN or infinity on this data before anything is pruned; "
            "check its weights and dtype"
        )


def verify_replay(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[Any]:
    """Check on a short batch that running the blocks one after the other equals the model's own forward pass.

    Returns:
        list[Any]: what each block returns, as `capture` needs it.

    Raises:
        UnsupportedModelError: the results differ: the model does something between its blocks that a replay misses.
        CalibrationError: the dense model gives NaN or infinity.
    """
    returns, expected = block_returns(model, blocks, batch)
    stream = capture(model, blocks, [batch], returns)
    hidden = stream.hidden[0].to(expected.device)
    for index, (block, calls) in enumerate(zip(blocks, stream.calls, strict=True)):
        before = hidden._version  # noqa: SLF001 - the only way to see an in-place write
        output = run_block(block, hidden, calls[0])
        if hidden._version != before:  # noqa: SLF001
            raise UnsupportedModelError(
                f"block {index} of {type(model).__name__} writes into its own input, so it cannot be run twice on it"
            )
        hidden = output
        check_finite(hidden, f"the outputs of the dense model's block {index}")
    error = (hidden.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    if not float(error) <= _REPLAY_TOLERANCE:
        raise UnsupportedModelError(
            f"running {type(model).__name__} block by block does not reproduce its own output (relative error "
            f"{float(error):.2g}): it changes the hidden state between blocks, which Halve does not support"
        )
    return returns


def working_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """Return a float32 copy of ``block`` on ``device``; the original keeps its dtype and place."""
    return copy.deepcopy(block).to(device=device, dtype=torch.float32)
