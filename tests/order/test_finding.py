"""What folds in models of many families, found without a name, and proven against what the whole model computes."""

import copy

import pytest
import torch

from halve.order.finding import find_folds
from halve.order.folds import Move, permute, random_order
from halve.order.proving import is_proven
from models import bert, decoder, encoder_decoder, gemma4, pairs, tokens, vit
from order_trials import Scaled, first, trials


def text():
    return [{"input_ids": tokens(2)}, {"input_ids": tokens(1, seed=1)}]


def images():
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}] * 2


MODELS = {
    **{name: (lambda name=name: decoder(name), text) for name in ("llama", "gpt2", "opt", "phi3", "gpt_neox")},
    "multi-query": (lambda: decoder("qwen3", num_key_value_heads=1), text),
    "bert": (bert, text),
    "vit": (vit, images),
    "t5": (lambda: encoder_decoder("t5"), lambda: [pairs("t5")]),
}


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_both_folds_of_a_block_are_found_and_leave_the_whole_model_as_it_was(family):
    make, samples = MODELS[family]
    model, batches = make(), samples()
    before = model(**batches[0])[0]
    found = 0
    for name, trial, consumers in trials(model, batches):
        folds = find_folds(trial, consumers, (), seed=0)
        assert all(is_proven(trial, fold, torch.Generator().manual_seed(1)) for fold in folds), name
        for number, fold in enumerate(folds):
            order = random_order(fold.units, fold.width, torch.Generator().manual_seed(number))
            permute(model.get_submodule(name), fold, order)
        assert len(folds) >= 2
        found += len(folds)
    after = model(**batches[0])[0]
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert found


def test_where_the_values_of_grouped_queries_lie():
    _, folds = first(decoder("llama"), text())
    fold = folds["self_attn.o_proj.weight"]
    assert (fold.units, fold.width) == (2, 8)
    assert set(fold.moves) == {
        Move("self_attn.o_proj.weight", 1, 0, 8, repeats=2),
        Move("self_attn.v_proj.weight", 0, 0, 8),
    }


def test_where_the_values_lie_in_one_layer_with_queries_and_keys():
    _, folds = first(decoder("gpt2"), text())
    assert Move("attn.c_attn.weight", 1, 64, 8) in folds["attn.c_proj.weight"].moves
    assert Move("attn.c_attn.bias", 0, 64, 8) in folds["attn.c_proj.weight"].moves
    _, folds = first(decoder("gpt_neox"), text())
    assert Move("attention.query_key_value.weight", 0, 16, 24) in folds["attention.dense.weight"].moves
    _, folds = first(decoder("phi3"), text())
    both = {move.start for move in folds["mlp.down_proj.weight"].moves if "gate_up" in move.parameter}
    assert both == {0, 64}


def test_what_is_fixed_does_not_move():
    _, trial, consumers = next(trials(decoder("llama"), text()))
    found = find_folds(trial, consumers, {"mlp.up_proj.weight"}, seed=0)
    assert not any(move.parameter == "mlp.up_proj.weight" for fold in found for move in fold.moves)
    down = [fold for fold in found if fold.consumer == "mlp.down_proj.weight"]
    assert not any(is_proven(trial, fold, torch.Generator().manual_seed(0)) for fold in down)


def test_channels_that_something_else_tells_apart_are_not_proven():
    model = decoder("opt")
    for layer in model.model.decoder.layers:
        layer.activation_fn = Scaled(64)
    trial, folds = first(model, text())
    assert not is_proven(trial, folds["fc2.weight"], torch.Generator().manual_seed(0))
    assert is_proven(trial, folds["self_attn.out_proj.weight"], torch.Generator().manual_seed(0))


def test_values_that_later_blocks_take_over_stay():
    model = gemma4()
    shared = []
    for name, trial, consumers in trials(model, text()):
        folds = find_folds(trial, consumers, (), seed=0)
        proven = {fold.consumer for fold in folds if is_proven(trial, fold, torch.Generator().manual_seed(0))}
        shared.append((name, proven))
    assert all("mlp.down_proj.weight" in proven for _, proven in shared)
    assert not all("self_attn.o_proj.weight" in proven for _, proven in shared)


def test_one_wrong_head_is_not_proven():
    trial, folds = first(decoder("llama"), text())
    fold = folds["self_attn.o_proj.weight"]
    weights = copy.deepcopy(trial.block.state_dict())
    for wrong in (
        [fold.moves[0], Move("self_attn.v_proj.weight", 0, 0, 0)],
        [fold.moves[0], Move("self_attn.k_proj.weight", 0, 0, 8)],
        [Move("self_attn.o_proj.weight", 1, 0, 8, repeats=1), *fold.moves[1:]],
    ):
        changed = type(fold)(fold.consumer, fold.units, fold.width, tuple(wrong))
        assert not is_proven(trial, changed, torch.Generator().manual_seed(0))
    assert all(torch.equal(weights[name], value) for name, value in trial.block.state_dict().items())
