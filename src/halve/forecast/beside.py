"""What a run does beside collecting, solving and replaying, counted: damages, orders of channels, batch norms."""

import math
from collections.abc import Sequence

from halve.forecast.operations import Counts, forward
from halve.forecast.shapes import BlockShape, Bundle, Shapes
from halve.order.choosing import ROUNDS

_PLANE = 4
"""Bytes of a number in float32."""
_DOUBLE = 8
_SHORT = 32
"""Tokens of a sample that blocks are tried on."""
_TRIED = {True: 24, False: 8}
"""Outputs of a layer that are tried, of one that is wider than its inputs, and of another."""
_PROVEN = 6
"""Passes that prove a fold: three on each of two samples."""
_LEVELS, _FEW = 4, 64
"""Of the sums that an order is chosen by, and the places up to which they are summed one by one."""
_EXCHANGES = 30
"""Rounds of exchanges until channels are assigned to groups."""
_QUICK = 30.0
"""Passes over a matrix that is pruned quickly, and put back."""
_COMPARED = 12.0
"""Passes over logits until a divergence is known."""


def damages(shapes: Shapes, tokens: float, length: int, logits: float, *, budget: bool) -> Counts:
    """All passes that the choice of what stays dense takes, in float32.

    Args:
        shapes: of the model.
        tokens: that damage is measured on.
        length: of a sequence, for the attention.
        logits: positions of these that have some.
        budget: whether perplexity decides, which is measured on as many tokens again, a few times.
    """
    passes = [_in_float32(forward_of(block, shapes, tokens, length)) for block in shapes.blocks]
    head = Counts(
        float32=2.0 * logits * shapes.classes * shapes.width, bytes=_COMPARED * _PLANE * logits * shapes.classes
    )
    whole = head + _sum(passes)
    counts = whole.times(2.0)  # norms of inputs, and what blocks return
    for index, block in enumerate(shapes.blocks):
        first = 0 if shapes.shares else index
        from_there = head + _sum(passes[first:])
        weights = sum(each.experts * sum(each.rows) * each.d_in for each in block.bundles)
        counts += from_there.times(block.parameters) + Counts(bytes=_QUICK * _PLANE * weights)
        counts += (head + _sum(passes[index:])).times(_SHORT / max(1.0, tokens))  # may a pass begin here?
    if budget:
        units = sum(block.parameters for block in shapes.blocks)
        pruned = Counts(bytes=_QUICK * _PLANE * shapes.count / 2.0)
        counts += whole + (whole + pruned).times(math.ceil(math.log2(units + 1)))
    return counts


def forward_of(block: BlockShape, shapes: Shapes, tokens: float, length: int, *, collecting: bool = False) -> Counts:
    """Count a pass through a block; one that collects leaves out the last matrix, unless some are experts.

    The last one that is defined stands for the last one that is called.

    Args:
        block: of the model.
        shapes: of the model.
        tokens: of the first hidden state.
        length: of a sequence, for the attention.
        collecting: whether statistics are collected.
    """
    products, outputs = block.products, float(sum(each.seen * sum(each.rows) for each in block.bundles))
    if collecting and block.bundles and all(each.experts == each.share == 1 for each in block.bundles):
        last = block.bundles[-1]
        products -= last.positions * last.rows[-1] * last.d_in
    attended = length if shapes.heads else 0
    return forward(products, tokens, round(attended * block.positions), shapes.width, outputs)


def norms(block: BlockShape, tokens: float, one_pass: Counts) -> Counts:
    """Statistics of batch norms, each by a pass that ends at it, half of the block on average.

    Args:
        block: with batch norms, or without.
        tokens: of the first hidden state.
        one_pass: of these through the block.
    """
    sums = Counts(bytes=3.0 * _DOUBLE * tokens * block.positions * sum(block.norms))
    return one_pass.times(len(block.norms) / 2.0) + sums


def ordering(block: BlockShape, shapes: Shapes) -> Counts:
    """Folds of channels found and proven on short samples, and an order chosen for each.

    Taken for folds are the inputs of the matrices that write into the hidden state alone: `folds_of`.
    """
    layers = [(rows, each.d_in) for each in block.bundles if not each.convolves for rows in each.rows]
    folds = folds_of(block, shapes)
    runs = sum(_TRIED[rows > d_in] for rows, d_in in layers) + _PROVEN * len(folds)
    one_run = _in_float32(forward_of(block, shapes, _SHORT, _SHORT)) + Counts(bytes=float(_PLANE * block.count))
    return one_run.times(runs) + _sum([_choosing(bundle, units) for bundle, units in folds])


def folds_of(block: BlockShape, shapes: Shapes) -> list[tuple[Bundle, int]]:
    """Return the bundles whose inputs may be reordered, with the number of heads that their channels must not leave."""
    inner = shapes.heads * shapes.head_dim
    return [
        (each, shapes.heads if each.d_in == inner else 1)
        for each in block.bundles
        if each.rows == (shapes.width,) and each.experts == each.share == 1 and not each.convolves
    ]


def order_bytes(block: BlockShape, shapes: Shapes) -> int:
    """Return the memory that the choice of an order takes: saliencies laid out, and what H is inverted in."""
    return max((_PLANE * (5 * sum(e.rows) * e.d_in + 4 * e.d_in**2) for e, _ in folds_of(block, shapes)), default=0)


def _choosing(bundle: Bundle, units: int) -> Counts:
    rows, d = float(bundle.rows[0]), float(bundle.d_in)
    places = d / units / 4.0  # groups of four stand for all
    if places <= _FEW:
        sums = Counts(bytes=3.0 * _PLANE * units * places**2 * rows)
    else:
        sums = Counts(
            float32=2.0 * units * places**2 * rows * _LEVELS, bytes=10.0 * _LEVELS * _PLANE * units * places * rows
        )
    assigned = Counts(bytes=_EXCHANGES * 8.0 * _PLANE * units * places**2)
    one_round = sums + assigned + Counts(bytes=8.0 * _PLANE * rows * d)
    inverted = Counts(factorisation=d**3, bytes=20.0 * _PLANE * rows * d)
    return one_round.times(ROUNDS) + inverted


def _in_float32(counts: Counts) -> Counts:
    return Counts(float32=counts.forward + counts.float32, factorisation=counts.factorisation, bytes=counts.bytes)


def _sum(parts: Sequence[Counts]) -> Counts:
    total = Counts()
    for part in parts:
        total += part
    return total
