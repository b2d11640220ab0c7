"""Counted operations, against products that are counted while they happen."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from halve.forecast import operations
from halve.forecast.operations import Counts
from halve.forecast.shapes import Bundle, Shapes
from halve.maths.gram import GramAccumulator
from halve.model.blocks import run_model
from halve.solve.matrix import prune_weights
from models import decoder, tokens

BUNDLE = Bundle((96, 32), 64)


def _of_addmm(_added, one, other, **_options):
    """Operations of a product that is added in place, which PyTorch does not count."""
    return 2 * one[0] * one[1] * other[1]


_IN_PLACE = {torch.ops.aten.addmm_: _of_addmm}


def counted(work):
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        work()
    return counter.get_total_flops()


def statistics_of(d_in, count=512):
    accumulator = GramAccumulator(d_in, halves=True)
    accumulator.add(torch.randn(count, d_in, generator=torch.Generator().manual_seed(0)))
    return accumulator.finish()


def test_a_forward_pass_takes_the_products_of_its_matrices_and_of_the_attention():
    model = decoder("llama", attn_implementation="eager")
    shapes = Shapes.of(model)
    batch = tokens(4, 24)
    found = sum(
        operations.forward(block.products, batch.numel(), 24, shapes.width, 0.0).forward for block in shapes.blocks
    )
    alone = found / operations._IN_A_MODEL
    assert alone == pytest.approx(counted(lambda: run_model(model, {"input_ids": batch})), rel=0.02)


@pytest.mark.parametrize("d_in", [64, 1000])
def test_statistics_take_the_part_of_a_product_that_is_computed(d_in):
    """What is not computed of the sum of random inputs is zero."""
    accumulator = GramAccumulator(d_in)
    accumulator.add(torch.randn(512, d_in))
    computed = int((accumulator.tensors["sum0"] != 0).sum())
    assert (computed < d_in**2) == (d_in == 1000)
    bundle = Bundle((96, 32), d_in)
    assert operations.statistics(bundle, 512, cross=False).float32 == 2 * 512 * computed
    assert operations.statistics(bundle, 512, cross=True).float32 == 2 * 512 * (computed + d_in**2)


COUNTED = [("wanda", "cg"), ("auto", "cg"), ("alps", "cg"), ("alps", "none"), ("prox-gradient", "none")]


@pytest.mark.parametrize(("method", "refit"), COUNTED)
def test_products_of_a_solver_are_of_the_counted_order(method, refit):
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in BUNDLE.rows]
    found = operations.solving(BUNDLE, method, refit, {"effort": "fast"}, shrinkage=False)
    options = {"effort": "fast"} if method == "auto" else {}
    seen = counted(lambda: prune_weights(weights, statistics_of(64), "2:4", method, refit, **options))
    assert 0.3 * seen < found.float32 + found.forward < 3.0 * seen


def test_experts_are_solved_one_by_one():
    one = operations.solving(BUNDLE, "auto", "cg", {}, shrinkage=True)
    eight = operations.solving(Bundle(BUNDLE.rows, BUNDLE.d_in, 0.25, 8), "auto", "cg", {}, shrinkage=True)
    assert eight == one.times(8)


def test_a_slower_schedule_takes_more():
    efforts = [operations.solving(BUNDLE, "auto", "cg", {"effort": each}, shrinkage=True) for each in ("fast", "best")]
    assert efforts[1].forward > 5 * efforts[0].forward
    slow = operations.solving(BUNDLE, "prox-admm", "none", {"lambda_growth": 1.05}, shrinkage=False)
    default = operations.solving(BUNDLE, "prox-admm", "none", {}, shrinkage=False)
    paper = {"lambda0": 0.001, "beta": 1.005}  # at 70B
    gradients = [operations.solving(BUNDLE, "prox-gradient", "none", each, shrinkage=False) for each in ({}, paper)]
    assert gradients[1].forward == pytest.approx(2.66 * gradients[0].forward, rel=0.02)
    assert slow.forward == pytest.approx(1.95 * default.forward, rel=0.02)


def test_what_is_not_counted_is_none():
    assert operations.solving(BUNDLE, "gblm", "cg", {}, shrinkage=False) is None
    assert operations.solving(BUNDLE, "wanda", "swap", {}, shrinkage=False) is None


def test_counts_add_up():
    assert Counts(1, 2, 3, 4) + Counts(1, 1, 1, 1).times(2) == Counts(3, 4, 5, 6)
