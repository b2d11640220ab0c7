"""What sparsity does not touch: how long a model takes besides its prunable linear layers, measured.

The model is built anew with random weights, with fewer blocks where not all of them fit, and run. What is measured is
kept apart for one block and for what lies outside of the blocks, so that it can be put together to the whole model.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

from halve.device import on_device
from halve.errors import HalveError
from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.model.layers import block_weight_count
from halve.model.stacks import find_stack
from halve.planner.outline import why_dense
from halve.runtime.timing import CACHES, last_level_cache
from halve.text.generation import text_config
from halve.text.limits import longest
from halve.torch_internals import keep_gpu_busy
from halve.transformers_internals import build, skipped_initialisation

DECODED = 64
"""Batches up to this are decoding steps, larger ones prompts."""
PROMPT = 2048
"""Tokens of a prompt, at most."""
_GPU_BLOCKS = 8
"""Blocks that are run on a GPU at most: more work than it can hold waiting would let launches into its time."""
_LEAST_BLOCKS = 2
_LONG = 5.0
"""Seconds of a first pass, which is not counted, from which on one more is enough."""
_NOISE = 1 << 20
_CYCLES = 4e9
"""For each second that Python takes to launch a pass, twice the cycles of a GPU's clock."""


@dataclass(frozen=True, kw_only=True)
class Rest:
    """Seconds of one forward pass, by where they go; medians.

    Attributes:
        batch: rows of the linear layers' products.
        sequences: run at once.
        length: tokens in each: 1 is a decoding step at an empty context, more are a prompt.
        measured_blocks: blocks of the model that was run.
        blocks: blocks of the whole model.
        outside_seconds: outside the blocks: embeddings, last norm, head.
        block_seconds: of one block without its prunable linear layers, mean over the blocks.
        linear_seconds: of one block's prunable linear layers, dense, mean over the blocks.
    """

    batch: int
    sequences: int
    length: int
    measured_blocks: int
    blocks: int
    outside_seconds: float
    block_seconds: float
    linear_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole model without its prunable linear layers."""
        return self.outside_seconds + self.blocks * self.block_seconds

    @property
    def forward_seconds(self) -> float:
        """Of the whole dense model."""
        return self.seconds + self.blocks * self.linear_seconds


def as_sequences(batch: int, limit: int | None) -> tuple[int, int]:
    """Return how many sequences of how many tokens give a linear layer ``batch`` rows, or just above.

    Args:
        batch: wanted rows.
        limit: tokens that the model takes at most, None for any number.
    """
    if batch <= DECODED:
        return batch, 1
    sequences = -(-batch // min(PROMPT, limit or PROMPT))
    return sequences, -(-batch // sequences)


def measure_rest(
    skeleton: nn.Module,
    batches: Sequence[int],
    *,
    pattern: Pattern,
    dtype: torch.dtype,
    device: torch.device,
    free: int | None,
    seconds: float = 1.0,
    listen: Callable[[int], None] | None = None,
) -> dict[int, Rest | str]:
    """Measure a model's time besides its prunable linear layers, at every batch.

    Args:
        skeleton: the model, with or without values: only its class and configuration are used.
        batches: rows of the linear layers' products.
        pattern: decides which linear layers are prunable.
        dtype: of the weights.
        device: where; on a GPU its own time is measured, without what launches cost.
        free: bytes of memory there; half of them are used at most. None does not limit them.
        seconds: for one batch, at least 3 passes, or 1 where a pass takes long.
        listen: called with every batch before it is measured.

    Returns:
        dict[int, Rest | str]: by batch; a reason, as half a sentence, where it cannot be measured.
    """
    try:
        model, total = _runnable(skeleton, dtype, device, free)
        watched = _Watched.of(model, pattern, dtype, device)
    except HalveError as error:
        return dict.fromkeys(batches, str(error))
    found: dict[int, Rest | str] = {}
    for batch in batches:
        if listen is not None:
            listen(batch)
        sequences, length = as_sequences(batch, longest(model))
        try:
            with on_device(device):
                outside, block, linears = _time(model, watched, sequences, length, seconds)
            found[batch] = Rest(
                batch=batch,
                sequences=sequences,
                length=length,
                measured_blocks=len(watched.blocks),
                blocks=total,
                outside_seconds=outside,
                block_seconds=block,
                linear_seconds=linears,
            )
        except (RuntimeError, MemoryError, TypeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            found[batch] = f"{type(model).__name__} could not be run on {sequences} x {length} tokens: {reason}"
    return found


@dataclass(frozen=True)
class _Watched:
    """The modules of a model whose time is taken."""

    blocks: tuple[nn.Module, ...]
    linears: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module, pattern: Pattern, dtype: torch.dtype, device: torch.device) -> "_Watched":
        plan = make_plan(model, pattern)
        names = [
            matrix.parameter.removesuffix(".weight") for matrix in plan.matrices if not why_dense(matrix, dtype, device)
        ]
        return cls(
            tuple(model.get_submodule(name) for name in plan.blocks), tuple(model.get_submodule(name) for name in names)
        )


def _runnable(skeleton: nn.Module, dtype: torch.dtype, device: torch.device, free: int | None) -> tuple[nn.Module, int]:
    """Return a model to run, and the number of blocks of the whole one.

    Raises:
        HalveError: there can be none.
    """
    from transformers import PreTrainedModel

    if not isinstance(skeleton, PreTrainedModel):
        raise HalveError(
            f"{type(skeleton).__name__} is no transformers model, so it cannot be built with other weights"
        )
    if not isinstance(getattr(text_config(skeleton), "vocab_size", None), int):
        raise HalveError(f"{type(skeleton).__name__} has no vocabulary, so there are no tokens to run it on")
    stack = find_stack(skeleton)[1]
    everything = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    in_blocks = sum(block_weight_count(block) for block in stack) * dtype.itemsize
    one = in_blocks // len(stack)
    room = None if free is None else free // 2 - (everything - in_blocks)
    count = _affordable(len(stack), one, room, device)
    if count < 1:
        raise HalveError(
            f"one block and what lies outside of the blocks need {(everything - in_blocks + one) / 1e9:.1f} GB, more "
            f"than half of the {(free or 0) / 1e9:.1f} GB of memory that are free"
        )
    return build_random(skeleton, count, dtype, device), len(stack)


def _affordable(total: int, block_bytes: int, room: int | None, device: torch.device) -> int:
    """Return how many blocks to run: all if they fit, else as few as no cache can hold; 0 if there is no room."""
    most = total if device.type == "cpu" else min(total, _GPU_BLOCKS)
    if room is None or most * block_bytes <= room:
        return most
    beyond_cache = -(-CACHES * last_level_cache() // block_bytes)
    return min(max(_LEAST_BLOCKS, beyond_cache), max(0, room // block_bytes), most)


def build_random(skeleton: Any, count: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a model like another one, of so many blocks and with random weights, to run.

    Args:
        skeleton: of transformers, with or without values: only its class and configuration are used.
        count: blocks.
        dtype: of the weights.
        device: where they are.

    Raises:
        HalveError: it cannot be built with so many.
    """
    config = copy.deepcopy(skeleton.config)
    config.get_text_config().num_hidden_layers = count
    try:
        with torch.device(device), skipped_initialisation():
            model = build(type(skeleton), config, dtype=dtype)
        model.tie_weights()
        _fill(model)
        built = len(find_stack(model)[1])
    except Exception as error:  # a foreign config can provoke any error in there
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HalveError(f"{type(skeleton).__name__} cannot be built with {count} blocks: {reason}") from error
    if built != count:
        raise HalveError(f"{type(skeleton).__name__} cannot be built with {count} blocks: it has {built} all the same")
    model.eval()
    return cast("nn.Module", model)


def _fill(model: nn.Module) -> None:
    """Give weights that no number overflows with; where the values repeat does not change the time."""
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        if parameter.ndim < 2:
            flat.fill_(1.0)
            continue
        values = noise.to(flat)
        for start in range(0, len(flat), _NOISE):
            part = flat[start : start + _NOISE]
            part.copy_(values[: len(part)])


def _time(
    model: nn.Module, watched: _Watched, sequences: int, length: int, seconds: float
) -> tuple[float, float, float]:
    """Return the seconds outside the blocks, of a block's rest, and of a block's linear layers."""
    device = next(model.parameters()).device
    vocabulary = text_config(model).vocab_size
    tokens = (torch.arange(sequences * length, device=device) % vocabulary).view(sequences, length)
    known = signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}  # of a prompt, only the last token's logits are of use
    given = {name: value for name, value in wanted.items() if name in known}
    turn = _gpu_turn if device.type == "cuda" else _cpu_turn
    turns: list[tuple[float, float, float]] = []
    begin = time.perf_counter()
    with torch.inference_mode():
        turn(lambda: model(tokens, **given), watched)
        least = 3 if time.perf_counter() - begin < _LONG else 1
        deadline = time.perf_counter() + seconds
        while len(turns) < least or (time.perf_counter() < deadline and len(turns) < 50):
            turns.append(turn(lambda: model(tokens, **given), watched))
    count = len(watched.blocks)
    outside = statistics.median(whole - blocks for whole, blocks, _ in turns)
    block = statistics.median((blocks - linears) / count for _, blocks, linears in turns)
    return max(0.0, outside), max(0.0, block), statistics.median(linears / count for _, _, linears in turns)


def _cpu_turn(call: Callable[[], object], watched: _Watched) -> tuple[float, float, float]:
    """Return the seconds of a pass, of its blocks, and of their linear layers."""
    spans: dict[str, list[tuple[float, float]]] = {"blocks": [], "linears": []}
    with _marking(watched.blocks, spans["blocks"], time.perf_counter), ExitStack() as stack:
        stack.enter_context(_marking(watched.linears, spans["linears"], time.perf_counter))
        begin = time.perf_counter()
        call()
        whole = time.perf_counter() - begin
    blocks, linears = (sum(end - begin for begin, end in spans[name]) for name in ("blocks", "linears"))
    return whole, blocks, linears


def _gpu_turn(call: Callable[[], object], watched: _Watched) -> tuple[float, float, float]:
    """Return the same in the GPU's time; marks around linear layers take time too, so they have a pass of their own."""
    whole, blocks = _gpu_pass(call, watched.blocks)
    _, linears = _gpu_pass(call, watched.linears)
    return whole, blocks, linears


def _gpu_pass(call: Callable[[], object], modules: Sequence[nn.Module]) -> tuple[float, float]:
    """Return the GPU's seconds of a pass, and within some modules."""

    def mark() -> torch.Event:
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        return event

    start = time.perf_counter()
    call()
    launching = time.perf_counter() - start
    torch.cuda.synchronize()
    spans: list[tuple[torch.Event, torch.Event]] = []
    keep_gpu_busy(int(_CYCLES * launching))  # Python gets ahead: launches cost no device time
    with _marking(modules, spans, mark):
        begin = mark()
        call()
        end = mark()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, sum(first.elapsed_time(last) for first, last in spans) / 1e3


@contextmanager
def _marking(modules: Sequence[nn.Module], spans: list[tuple[Any, Any]], mark: Callable[[], Any]) -> Iterator[None]:
    """Note when each module begins and ends; hooks would cost more than small layers take."""

    def marked(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            begin = mark()
            output = forward(*arguments, **keywords)
            spans.append((begin, mark()))
            return output

        return call

    for module in modules:
        module.__dict__["forward"] = marked(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def as_json(found: Mapping[int, Rest | str]) -> list[dict[str, Any]]:
    """Return what was measured as plain JSON values, in the order of the batches."""
    return [
        {"batch": batch, "reason": rest}
        if isinstance(rest, str)
        else vars(rest) | {"seconds": rest.seconds, "forward_seconds": rest.forward_seconds}
        for batch, rest in found.items()
    ]
