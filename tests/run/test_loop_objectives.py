import pytest
import torch

from halve.errors import InputError
from halve.model.blocks import run_model
from halve.model.reconstruct import Reconstruction
from halve.run.loop import prune_blocks
from halve.solve.matrix import prune_weight
from halve.solve.objective import Objective
from models import MIXTURES, decoder, tokens
from pruned_blocks import CPU, assert_pruned, batches, settings


def output_error(model, dense, data):
    with torch.no_grad():
        return sum(float((model(**batch).logits - dense(**batch).logits).square().mean()) for batch in data)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matching_the_dense_model_changes_later_blocks_and_not_matching_changes_nothing(family):
    data = batches()
    plain, zero, matched = (decoder(family) for _ in range(3))
    prune_blocks(plain, data, settings("wanda", "cg"), device=CPU)
    prune_blocks(zero, data, settings("wanda", "cg", objective=Objective(match_dense=0.0)), device=CPU)
    asked = settings("wanda", "cg", objective=Objective(match_dense=1.0))
    report = prune_blocks(matched, data, asked, device=CPU)
    assert_pruned(matched, report)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), zero.parameters(), strict=True))
    pruned = {each.parameter for each in report.matrices}
    changed = {
        name for name, parameter in matched.named_parameters() if not torch.equal(parameter, plain.get_parameter(name))
    }
    assert changed <= pruned
    assert len(changed) >= 2 * len(pruned) // 3


def test_targets_are_made_of_the_inputs_of_both_models():
    """The oracle: float64 inputs of one matrix in the dense model and in one whose earlier blocks are pruned."""
    dense, model, half = (decoder("llama") for _ in range(3))
    asked = settings("sparsegpt", "none", objective=Objective(match_dense=0.7, match_ridge=0.05))
    prune_blocks(model, batches(), asked, device=CPU)
    for name, parameter in half.model.layers[0].named_parameters():
        parameter.data.copy_(model.model.layers[0].get_parameter(name))
    streams = []
    for each in (dense, half):
        seen = []
        place = each.model.layers[1].self_attn.o_proj
        hook = place.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        for batch in batches():
            run_model(each, batch)
        hook.remove()
        streams.append(torch.cat(seen).double())
    x, noisy = streams
    weight = dense.model.layers[1].self_attn.o_proj.weight.data.double()
    gram, scales = noisy.T @ noisy / len(x), noisy.square().mean(0)
    pull = 0.7 * weight @ (x.T @ noisy / len(x) - gram)
    target = weight + torch.linalg.solve(gram + 0.05 * torch.diag(scales), pull.T).T
    expected = prune_weight(target.float(), gram.float(), "2:4", "sparsegpt", "none").weight
    got = model.model.layers[1].self_attn.o_proj.weight.data
    assert float(((got != 0) != (expected != 0)).double().mean()) < 0.01
    assert float((got - expected).norm() / expected.norm()) < 0.02
    plain = prune_weight(weight.float(), gram.float(), "2:4", "sparsegpt", "none").weight
    assert float((plain - expected).norm() / expected.norm()) > 0.05


def test_auto_aims_at_the_dense_model_unasked_where_it_can():
    for family, asked, expected in (("llama", None, 0.25), ("llama", 0.0, None), ("mixtral", None, None)):
        wanted = settings("auto", "cg", objective=Objective(match_dense=asked), min_expert_tokens=1)
        report = prune_blocks(decoder(family), batches(), wanted, device=CPU)
        assert {matrix.facts.get("match_dense") for matrix in report.matrices} == {expected}


@pytest.mark.parametrize("family", MIXTURES)
def test_matching_the_dense_model_is_refused_for_mixtures(family):
    model = decoder(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    asked = settings("auto", "cg", objective=Objective(match_dense=0.5))
    with pytest.raises(InputError, match=r"match_dense pairs the tokens .* set it to 0 for mixtures of experts$"):
        prune_blocks(model, batches(), asked, device=CPU)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_matching_the_dense_model_goes_with_reconstruction_in_memory_or_on_disk(tmp_path):
    data, dense = batches(4), decoder("llama")
    asked = settings("wanda", "cg", objective=Objective(match_dense=0.5), reconstruction=Reconstruction(epochs=2))
    models = [decoder("llama") for _ in range(3)]
    for model, folder in zip(models, (None, tmp_path), strict=False):
        report = prune_blocks(model, data, asked, device=CPU, offload=folder)
        assert_pruned(model, report)
        assert len(report.reconstructions) == 3
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
    prune_blocks(models[2], data, settings("wanda", "cg", objective=Objective(match_dense=0.5)), device=CPU)
    assert output_error(models[0], dense, data) < output_error(models[2], dense, data)


def test_shrinkage_is_chosen_for_auto_and_reported():
    few = [{"input_ids": tokens(2, length=12)}]
    report = prune_blocks(decoder("llama"), few, settings("auto", "cg"), device=CPU)
    assert all(each.facts.get("shrinkage", 0.0) > 0.0 for each in report.matrices)
    for asked in (settings("auto", "cg", objective=Objective(0.0)), settings("prox-admm", "cg")):
        report = prune_blocks(decoder("llama"), few, asked, device=CPU)
        assert all("shrinkage" not in each.facts for each in report.matrices)
    report = prune_blocks(decoder("llama"), few, settings("wanda", "cg", objective=Objective(0.2)), device=CPU)
    assert {each.facts["shrinkage"] for each in report.matrices} == {0.2}
