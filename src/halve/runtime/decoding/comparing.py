"""Whether blocks computed in one call give what their modules give, before the one takes the place of the other."""

from typing import Any

import torch
from torch import Tensor, nn

from halve.device import evaluation_mode
from halve.errors import HalveError
from halve.runtime.decoding.blocks import Compiled, blocks_of, layers_of
from halve.runtime.decoding.room import Room
from halve.runtime.linear import SparseLinear
from halve.transformers_internals import DynamicCache, cache_keyword

_COMPARED = 8
"""Tokens that one call is compared with the modules on."""
_ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Share of what a block adds to its input that rounding explains, by dtype."""
_QUANTISED_ALLOWED = 0.1
"""The same where inputs are rounded to integers, of which the last bits of a sum decide now and then."""


def compare(inner: Any) -> str:
    """Hold every block, computed for one token of two sequences in one call, to its module.

    Block by block, since what rounding changes in one can grow to anything in those that follow. Of one sequence
    the first token is padding.

    Args:
        inner: a stack of blocks, of which `why_not` has nothing to say.

    Returns:
        str: why there is nothing to compare with; empty where they agree.

    Raises:
        HalveError: one differs by more than rounding explains.
    """
    ordinary = type(inner).forward
    name = cache_keyword(ordinary)
    blocks = blocks_of(inner)
    with evaluation_mode(inner), torch.no_grad(), torch.autocast("cpu", enabled=False):
        ids = torch.arange(2 * _COMPARED).mul(inner.config.vocab_size).floor_divide(2 * _COMPARED).view(2, -1)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        cache = DynamicCache(config=inner.config)
        ordinary(inner, **{"input_ids": ids[:, 1:], "attention_mask": mask[:, :-1], name: cache})
        x = inner.embed_tokens(ids).std().clamp_min(1e-3) * _noise(2, inner.embed_tokens.weight)
        position = torch.full((1, 1), _COMPARED - 1)
        cosines, sines = inner.rotary_emb(x, position)
        hidden = torch.zeros(2, 1, 1, _COMPARED, dtype=x.dtype)
        hidden[0, :, :, 0] = torch.finfo(x.dtype).min
        for number, block in enumerate(blocks):
            given = x, cosines, sines, mask
            got = _alone(block, None, cache.layers[number], given)
            normed = _alone(block, inner, cache.layers[number], given) if block is blocks[-1] else None
            asked = {"position_embeddings": (cosines, sines), "position_ids": position, name: cache}
            expected = block(x, attention_mask=hidden, **asked)
            if not bool(expected.isfinite().all()):
                return f"block {number} returns no finite numbers"
            _check(f"block {number}", _off(x, expected, got, block))
            if normed is not None:
                _check("the last norm", _off(torch.zeros_like(x), inner.norm(got), normed, block))
            x = expected
    return ""


def _noise(sequences: int, weight: Tensor) -> Tensor:
    """Return normal numbers, (sequences, 1, hidden), the same each time, as an embedding's weight holds them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sequences, 1, weight.shape[1], generator=generator).to(weight.dtype)


def _alone(block: Any, inner: nn.Module | None, layer: Any, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return what one block, and the norm of a stack, make of a token; a cache's layer stays as it is."""
    x, cosines, sines, mask = given
    return Compiled([block], inner).run(x, Room([layer]), cosines, sines, mask)


def _off(x: Tensor, expected: Tensor, got: Tensor, block: Any) -> float:
    """Return how far a block's output is from what is expected, 1 for as far as rounding explains."""
    quantised = any(isinstance(layer, SparseLinear) and layer.bits for layer in layers_of(block))
    share = max(_ALLOWED[x.dtype], _QUANTISED_ALLOWED if quantised else 0.0)
    before, after = x.double(), expected.double()
    allowed = share * (after - before).norm() + 2 * torch.finfo(x.dtype).eps * after.norm()
    return float((got.double() - after).norm() / allowed)


def _check(what: str, off: float) -> None:
    if not off <= 1:
        raise HalveError(
            f"{what} computed in one call differs from the modules' by {off:.2g} times what rounding explains"
        )
