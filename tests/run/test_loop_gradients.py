"""Methods that weigh gradients, in whole models."""

import copy
from functools import partial

import pytest
import torch

from gradient_oracles import double, kept, next_token_loss, root_of_squares
from halve import memory
from halve.checkpoint.load import LoadedModel
from halve.comparison import Comparison
from halve.errors import CalibrationError, InputError, LayerFailedError
from halve.maths.pattern import Pattern
from halve.model.blocks import run_model
from halve.run.contender import Contender, make_requests
from halve.run.loop import prune_blocks
from halve.text.tokens import TokenSet, hash_ids
from models import DECODERS, MIXTURES, bert, decoder, encoder_decoder, pairs, tokens, vit
from pruned_blocks import CPU, assert_pruned, batches, settings

WEIGHING = ("gblm", "pruner-zero", "wanda++")
QUICK = {"gblm": {}, "pruner-zero": {}, "wanda++": {"rounds": 1, "round_samples": 2}}
ROWS = [row for batch in batches() for row in batch["input_ids"]]


def inputs_of(model, name):
    """What enters a layer, float64, (samples, tokens, d_in)."""
    seen = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().double()))
    for batch in batches():
        run_model(model, batch)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("method", WEIGHING)
@pytest.mark.parametrize("family", DECODERS)
def test_every_family_is_pruned_and_nothing_else_is_touched(family, method):
    model = decoder(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    asked = settings(method, options=QUICK[method], min_expert_tokens=1, fallback="magnitude")
    report = prune_blocks(model, batches(), asked, device=CPU)
    reported = assert_pruned(model, report)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in reported), name
        assert parameter.grad is None
    assert all(0 <= matrix.facts["relative_loss"] < 1 for matrix in report.matrices)
    if family not in MIXTURES:
        assert not report.fallbacks
    assert report.seconds["gradients"] > 0.0


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight"])
@pytest.mark.parametrize("method", ["gblm", "pruner-zero"])
def test_scores_weigh_the_dense_models_gradients_and_the_pruned_models_inputs(method, name):
    dense, model = decoder("llama"), decoder("llama")
    prune_blocks(model, batches(), settings(method), device=CPU)
    half = copy.deepcopy(model)  # pruned up to the block, and dense from there
    for key, parameter in half.named_parameters():
        if f".{name.split('.')[2]}." in key:
            parameter.data.copy_(dense.get_parameter(key))
    x = inputs_of(half, name)
    root = root_of_squares(double(dense), [name], ROWS, next_token_loss)[name]
    weight = dense.get_parameter(name).detach().double()
    if method == "gblm":
        scores = weight.abs() * ((x.square().sum((0, 1)) / 8).sqrt() + 100.0 * root)
    else:
        scores = weight**2 * (root - root.amin()) / (root.amax() - root.amin())
    expected = kept(scores, 2, 4)
    got = model.get_parameter(name).data
    assert (((got != 0) == expected).float().mean()) > 0.999  # ties aside, rounding may decide a group in a thousand
    assert torch.equal(got[got != 0], weight.float()[got != 0])


@pytest.mark.parametrize("rounds", [0, 2])
def test_wanda_plus_plus_does_in_a_model_what_was_published(rounds):
    """The oracle runs the whole model in float64 and optimises its first block with plain autograd."""
    model, dense = decoder("llama"), decoder("llama")
    options = {"rounds": rounds, "round_samples": 3, "learning_rate": 1e-3}
    prune_blocks(model, batches(), settings("wanda++", options=options), device=CPU)
    twin, names = double(dense), [name for name, p in dense.named_parameters() if ".layers.0." in name and p.ndim > 1]

    def output(net, ids):
        states = []
        hook = net.model.layers[0].register_forward_hook(lambda _m, _args, out: states.append(out))
        net(input_ids=ids[None])
        hook.remove()
        return states[0] if isinstance(states[0], torch.Tensor) else states[0][0]

    roots = root_of_squares(twin, names, ROWS, lambda net, ids: output(net, ids).norm())
    norms = {name: (inputs_of(dense, name).square().sum((0, 1)) / 8).sqrt() for name in names}
    targets = [output(twin, ids).detach() for ids in ROWS]

    def mask(name):
        return kept(twin.get_parameter(name).abs() * (100.0 * roots[name] / 8**0.5 + norms[name]), 2, 4)

    order = torch.Generator().manual_seed(0)
    optimiser = torch.optim.RMSprop([twin.get_parameter(name) for name in names], lr=1e-3)
    for _ in range(rounds):
        for name in names:
            twin.get_parameter(name).data.mul_(mask(name))
        for i in torch.randperm(8, generator=order)[:3].tolist():
            optimiser.zero_grad()
            (output(twin, ROWS[i]) - targets[i]).square().sum().backward()
            optimiser.step()
    for name in names:
        expected = (twin.get_parameter(name) * mask(name)).detach()
        got = model.get_parameter(name).detach().double()
        assert float(((got != 0) == (expected != 0)).double().mean()) > 0.995
        both = (got != 0) & (expected != 0)
        torch.testing.assert_close(got[both], expected[both], rtol=1e-2, atol=1e-4)
        changed = float((got - dense.get_parameter(name).detach().double())[both].abs().amax())
        assert (changed > 1e-4) == (rounds > 0)


def test_steps_bring_a_block_nearer_to_the_dense_one():
    losses = []
    for rounds in (0, 5):
        model, dense = decoder("llama"), decoder("llama")
        prune_blocks(
            model, batches(), settings("wanda++", options={"rounds": rounds, "learning_rate": 1e-3}), device=CPU
        )
        states = [[], []]
        for net, seen in zip((model, dense), states, strict=True):
            net.model.layers[0].register_forward_hook(lambda _m, _args, out, seen=seen: seen.append(out))
            for batch in batches():
                run_model(net, batch)
        losses.append(float((torch.cat(states[0]) - torch.cat(states[1])).square().sum()))
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", WEIGHING)
def test_encoder_decoders_are_pruned_on_both_sides(method):
    model = encoder_decoder("t5")
    report = prune_blocks(model, [pairs("t5")], settings(method, options=QUICK[method]), device=CPU)
    assert_pruned(model, report)
    assert {m.name.partition(".")[0] for m in report.matrices} == {"encoder", "decoder"}


def test_encoders_and_images_need_a_loss_for_two_and_none_for_the_third():
    images = [{"pixel_values": torch.randn(4, 3, 16, 16)}]
    for model, data in ((bert, batches()), (vit, images)):
        report = prune_blocks(model(), data, settings("wanda++", options=QUICK["wanda++"]), device=CPU)
        assert len(report.matrices) == 18
        for method in ("gblm", "pruner-zero"):
            untouched, begun = model(), []
            before = {name: parameter.clone() for name, parameter in untouched.named_parameters()}
            with pytest.raises(InputError, match=f"{method} needs the loss of .*: give batches with labels, or use"):
                prune_blocks(untouched, data, settings(method), device=CPU, before=partial(begun.append, 1))
            assert not begun
            assert all(torch.equal(parameter, before[name]) for name, parameter in untouched.named_parameters())


def test_too_little_memory_is_refused_before_the_run_begins(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    begun = []
    with pytest.raises(InputError, match="the gradients that gblm weighs"):
        prune_blocks(decoder("llama"), batches(), settings("gblm"), device=CPU, before=partial(begun.append, 1))
    assert not begun


def test_a_matrix_that_the_loss_does_not_depend_on_fails_or_falls_back():
    dead = decoder("llama")
    dead.model.layers[1].mlp.down_proj.weight.data.zero_()  # so nothing flows back to gate and up
    with pytest.raises(
        LayerFailedError, match=r"layers\.1\.mlp\.gate_proj\.weight could not be pruned by gblm: .*zero"
    ):
        prune_blocks(copy.deepcopy(dead), batches(), settings("gblm"), device=CPU)
    report = prune_blocks(dead, batches(), settings("gblm", fallback="wanda"), device=CPU)
    assert {matrix.name.rpartition("mlp.")[2] for matrix in report.fallbacks} == {"gate_proj.weight", "up_proj.weight"}


def test_a_loss_that_is_not_finite_is_an_error_of_the_calibration():
    model = decoder("llama")
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(CalibrationError, match="calibration sample 0 gives"):
        prune_blocks(model, batches(), settings("gblm"), device=CPU)


@pytest.mark.parametrize("method", WEIGHING)
def test_bfloat16_models_keep_their_dtype_and_products_may_run_in_bfloat16(method):
    model = decoder("llama").to(torch.bfloat16)
    asked = settings(method, "cg", options=QUICK[method])
    report = prune_blocks(model, batches(), asked, device=CPU, precision=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_pruned(model, report)


def test_other_patterns_refits_and_reconstructions_go_with_them():
    for method in WEIGHING:
        model = decoder("gpt2")
        asked = settings(method, pattern="50%", options=QUICK[method])
        report = prune_blocks(model, batches(), asked, device=CPU)
        for matrix in report.matrices:
            parameter = model.get_parameter(matrix.parameter).data
            weight = parameter if matrix.layout == "out_in" else parameter.mT
            assert Pattern("50%").satisfied_by(weight)


def test_a_comparison_takes_them_by_their_names():
    def token_set(seed):
        ids = tokens(seed=seed)
        return TokenSet(ids, "text", hash_ids(ids), 1)

    names = ["wanda", "gblm", "pruner-zero", "wanda++", "wanda+++cg"]
    contenders = [Contender.parse(name) for name in names]
    requests = make_requests(contenders, {"wanda++": {"rounds": 1}}, forward_dtype="float32")
    rows = list(Comparison(LoadedModel(decoder("llama"), None, None), requests, token_set(0), [token_set(1)]))
    assert [(row.name, row.error) for row in rows] == [(name, "") for name in ("dense", *names)]
    assert len({row.perplexities[0].value for row in rows}) == 6
