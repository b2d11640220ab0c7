"""The shapes of a model as they are foreseen, against those that a run finds."""

import pytest
import torch
from torch import nn

from halve.forecast.shapes import Bundle, Shapes
from halve.maths.pattern import Pattern
from halve.model.survey import plan_model
from models import DECODERS, convnext, decoder, encoder_decoder, llava, pairs, resnet, tokens


@pytest.mark.parametrize("family", DECODERS)
def test_a_runs_matrices_are_all_foreseen(family):
    model = decoder(family)
    found = Shapes.of(model)
    plan, _ = plan_model(model, [{"input_ids": tokens(2, 8)}], Pattern("2:4"))
    assert len(found.blocks) == len(plan.blocks)
    weights = [sum(each.experts * sum(each.rows) * each.d_in for each in block.bundles) for block in found.blocks]
    expected = [sum(matrix.d_out * matrix.d_in for matrix in plan.of_block(index)) for index in range(len(plan.blocks))]
    routers = [block.others for block in found.blocks]
    assert all(one >= other for one, other in zip(weights, expected, strict=True))
    assert sum(weights) <= sum(expected) + sum(routers) + 0.1 * sum(expected)  # what a run leaves dense is small


@pytest.mark.parametrize("model", [resnet(), convnext()])
def test_convolutions_are_foreseen_each_with_inputs_of_its_own(model):
    plan, _ = plan_model(model, [{"pixel_values": torch.randn(1, 1, 16, 16)}], Pattern("2:4"))
    for index, block in enumerate(Shapes.of(model).blocks):
        found = sorted((rows, each.d_in) for each in block.bundles for rows in each.rows)
        assert found == sorted((matrix.d_out, matrix.d_in) for matrix in plan.of_block(index))
        convolutions = sum(matrix.layout == "conv" for matrix in plan.of_block(index))
        assert sum(len(each.rows) for each in block.bundles) - len(block.bundles) <= len(found) - convolutions


def test_groups_of_a_convolution_are_bundles_and_depthwise_ones_none():
    block = nn.Sequential(nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 7, groups=32), nn.Conv2d(32, 16, 1))
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    (found,) = Shapes.of(model).blocks
    assert [(each.rows, each.d_in) for each in found.bundles] == [((16,), 72), ((16,), 72), ((16,), 32)]
    assert found.others == 32 * 49


def test_a_llamas_siblings_share_their_inputs():
    block = Shapes.of(decoder("llama")).blocks[0]
    inputs = sorted((len(each.rows), each.d_in) for each in block.bundles)
    assert inputs == [(1, 32), (1, 64), (2, 32), (3, 32)]  # output; down; gate and up; query, key and value


def test_experts_have_inputs_of_their_own_and_see_a_share_of_the_tokens():
    model = decoder("mixtral")
    experts = [each for each in Shapes.of(model).blocks[0].bundles if each.experts > 1]
    assert {(each.experts, each.share) for each in experts} == {
        (model.config.num_local_experts, model.config.num_experts_per_tok / model.config.num_local_experts)
    }


def test_experts_that_lie_the_other_way_are_read_as_they_are_multiplied():
    found = {each.d_in for each in Shapes.of(decoder("mixtral")).blocks[0].bundles if each.experts > 1}
    model = decoder("mixtral")
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            turned = torch.nn.Parameter(getattr(layer.mlp.experts, name).data.mT.contiguous())
            setattr(layer.mlp.experts, name, turned)
    assert {each.d_in for each in Shapes.of(model).blocks[0].bundles if each.experts > 1} == found


def test_bytes_are_those_of_the_loaded_dtype():
    model = decoder("llama").bfloat16()
    narrow, wide = Shapes.of(model), Shapes.of(model, dtype=torch.float32)
    assert narrow.size == sum(parameter.nbytes for parameter in model.parameters())
    assert wide.size == 2 * narrow.size
    assert narrow.width == 32


def test_what_is_skipped_is_multiplied_but_not_pruned():
    whole, fewer = (Shapes.of(decoder("llama"), skip=skip).blocks[0] for skip in ((), ("*.down_proj.*",)))
    assert Bundle((32,), 64) in whole.bundles
    assert Bundle((32,), 64) not in fewer.bundles
    assert whole.products == fewer.products


def test_only_the_stacks_that_are_pruned_count():
    text = Shapes.of(llava())
    assert text.width == 32
    assert len(Shapes.of(llava(), tower="vision").blocks) == 4
    assert len(Shapes.of(encoder_decoder("t5")).blocks) == len(pairs("t5")) * 2
