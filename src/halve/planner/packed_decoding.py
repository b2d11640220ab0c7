"""How fast packed weights decode, before there are any: a model of few blocks and random weights, run for real.

It is run as ``halve generate`` runs a packed checkpoint, all of its prunable layers sparse.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.memory import check_memory
from halve.model.classify import make_plan
from halve.model.layers import block_weight_count, is_conv1d, is_linear, layer_matrix
from halve.model.stacks import find_stack
from halve.planner.dense_engine import NEW, PROMPT, ROUNDS
from halve.planner.rest import build_random
from halve.runtime.decoding.next_token import decode_in_one_call
from halve.runtime.heads import Head, quantise_head
from halve.runtime.linear import SparseLinear
from halve.runtime.packed_matrix import pack
from halve.runtime.quantised_matrix import QUANTISED, Values, bits_of, quantise
from halve.runtime.speed import random_slab, repeated
from halve.runtime.streaming import continue_text

_CPU = torch.device("cpu")


def head_of(values: Values) -> Head:
    """Return what the output layer multiplies with: integers where the blocks do, as dense engines have it."""
    return "int8" if values in QUANTISED else "own"


def packed_name(pattern: Pattern, values: Values, dtype: torch.dtype) -> str:
    """Return what the contender is called."""
    held = str(dtype).removeprefix("torch.") if values == "own" else values
    return f"Halve {pattern} in {held}{'' if head_of(values) == 'own' else ', head in int8'}"


def packed_seconds(skeleton: nn.Module, blocks: int, pattern: Pattern, values: Values, dtype: torch.dtype) -> float:
    """Return the seconds of a token that a packed model of so many blocks decodes, on torch's threads.

    The median of `ROUNDS` times `NEW` tokens behind a `PROMPT`.

    Args:
        skeleton: a causal language model of transformers; only its class and configuration are used.
        blocks: that the timed model has.
        pattern: of its prunable matrices.
        values: what they hold.
        dtype: of everything else.

    Raises:
        InputError: there is too little memory.
        HalveError: it cannot be built, or decodes wrongly.
    """
    stack = find_stack(skeleton)[1]
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    weights = total - (len(stack) - blocks) * block_weight_count(stack[0])
    needed = int(1.5 * weights * dtype.itemsize)  # dense, and packed beside it
    check_memory(f"the weights of {blocks} blocks to decode with", needed, "free some, or leave --against out")
    model: Any = build_random(skeleton, blocks, dtype, _CPU)
    _pack(model, pattern, bits_of(values, pattern))
    if head_of(values) == "int8":
        quantise_head(model)
    decode_in_one_call(model)
    return _decoded(model)


def _pack(model: nn.Module, pattern: Pattern, bits: Bits | None) -> None:
    """Put packed layers in place of all prunable ones, each of rows that repeat: quantising all would take minutes."""
    slabs = {}
    for name in (matrix.parameter.removesuffix(".weight") for matrix in make_plan(model, pattern).matrices):
        layer = model.get_submodule(name)
        if not is_linear(layer):
            continue
        dense = layer_matrix(layer)
        d_out, d_in = dense.shape
        key = (d_out, d_in, dense.dtype)
        if key not in slabs:
            one = pack(random_slab(d_out, d_in, pattern, dense.dtype) / d_in**0.5, pattern)
            slabs[key] = one if bits is None else quantise(one, bits)
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        sparse = SparseLinear(repeated(slabs[key], d_out), bias, "in_out" if is_conv1d(layer) else "out_in")
        model.set_submodule(name, sparse.eval())


def _decoded(model: Any) -> float:
    from transformers import GenerationConfig

    ids = torch.arange(PROMPT).remainder(model.config.vocab_size).unsqueeze(0)
    settings = GenerationConfig(max_new_tokens=NEW)  # type: ignore[no-untyped-call]
    turns = []
    for _ in range(1 + ROUNDS):
        watch = _Watch()
        with torch.inference_mode():
            continue_text(model, ids, settings, watch)
        first, last = watch.moments[1], watch.moments[-1]  # after the prompt's, those of each new token
        turns.append((last - first) / (len(watch.moments) - 2))
    return statistics.median(turns[1:])


class _Watch:
    """A streamer that notes when the prompt was handed over, and when each token came."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: there is nothing to write out."""
