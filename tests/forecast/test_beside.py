"""What is counted beside collecting and solving, against the operations that are really done."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import halve
from halve.forecast.beside import damages, folds_of, forward_of, norms, order_bytes, ordering
from halve.forecast.shapes import Bundle, Shapes
from halve.maths.pattern import Pattern
from halve.model.survey import plan_model
from halve.order.choosing import choose_order
from halve.run.batch_norms import batch_norms, estimate
from halve.sensitivity.alone import damages_alone
from halve.sensitivity.budget import fewest_dense
from halve.sensitivity.quick import input_norms
from halve.sensitivity.units import units_of
from models import decoder, gemma4, resnet, tokens

PATTERN = Pattern("2:4")


def operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [lambda: decoder("llama"), gemma4])
def test_damages_take_the_products_that_are_counted(make):
    model = make()
    model.set_attn_implementation("eager")  # whose products are seen
    batches = [{"input_ids": tokens(8, 64)}]
    plan, _ = plan_model(model, batches, PATTERN)

    def measure():
        norms_of = input_norms(model, plan.matrices, batches)
        damages_alone(model, plan.blocks, units_of(plan), batches, norms_of, PATTERN)

    counted = damages(Shapes.of(model), 512, 64, 512, budget=False)
    assert (counted.forward, counted.factorisation) == (0.0, 0.0)
    assert operations(measure) == pytest.approx(counted.float32 / 1.2, rel=0.25)
    assert counted.bytes > 0.0


def test_a_budget_takes_whole_passes_besides():
    model = decoder("llama")
    model.set_attn_implementation("eager")
    batches = [{"input_ids": tokens(8, 64)}]
    plan, _ = plan_model(model, batches, PATTERN)
    units = units_of(plan)
    falling = {unit.name: float(len(units) - index) for index, unit in enumerate(units)}
    really = operations(lambda: fewest_dense(model, units, falling, batches, {}, PATTERN, 1.05))
    share, budget = (damages(Shapes.of(model), 512, 64, 512, budget=asked) for asked in (False, True))
    assert really == pytest.approx((budget.float32 - share.float32) / 1.2, rel=0.3)


def test_batch_norms_take_passes_that_end_at_them():
    model = resnet()
    block = model.resnet.encoder.stages[0]
    x = torch.randn(64, 8, 8, 8)
    shapes = Shapes.of(model).blocks[0]
    assert len(shapes.norms) == len(batch_norms(block)) > 0
    x = torch.randn(64, block.layers[0].layer[0].convolution.in_channels, 8, 8)
    with torch.no_grad():
        whole = operations(lambda: block(x))
        really = operations(lambda: estimate(block, lambda _: block(x), 1)) - whole  # the first pass looks at the order
    counted = norms(shapes, 64 * 64, forward_of(shapes, Shapes.of(model), 64 * 64, 64))
    assert really == pytest.approx(counted.forward / 1.2, rel=0.5)
    assert norms(Shapes.of(decoder("llama")).blocks[0], 64, counted).forward == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_the_folds_that_are_foreseen_are_those_that_a_run_finds(family):
    model = decoder(family)
    shapes = Shapes.of(model)
    done = halve.prune(model, calibration=tokens(8, 24), method="wanda", refit="none", permute="fold")
    found = {order.fold.width * order.fold.units * order.fold.moves[0].repeats for order in done.report.orders}
    assert found <= {bundle.d_in for block in shapes.blocks for bundle, _ in folds_of(block, shapes)}
    heads = {units for bundle, units in folds_of(shapes.blocks[0], shapes) if bundle.d_in == shapes.width}
    assert heads == {model.config.num_attention_heads}


def test_an_order_takes_the_products_that_are_counted():
    saliency = torch.rand(1, 512, 48)
    really = operations(lambda: choose_order(saliency, PATTERN, torch.Generator().manual_seed(0)))
    model = decoder("llama")
    shapes = Shapes.of(model)
    (block, *_), at_first = shapes.blocks, ordering(shapes.blocks[0], shapes)
    wider = tuple(Bundle((32,), 512) if each.d_in == 64 else each for each in block.bundles)
    assert {each.d_in for each in block.bundles if each.rows == (32,)} == {32, 64}
    later = ordering(type(block)(wider, 0, block.count, block.size), shapes)
    tried = 2.0 * 32 * 32 * (512 - 64) * (8 + 24 * 2 + 8 * 4 + 6 * 2) * 1.2  # other runs of the block, at most
    assert really * 32 / 48 <= later.float32 - at_first.float32 <= really * 32 / 48 + 3 * tried
    assert later.factorisation - at_first.factorisation == 512**3 - 64**3
    assert order_bytes(block, shapes) == 4 * (5 * 32 * 64 + 4 * 64**2)
