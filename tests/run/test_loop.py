from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from halve.errors import CalibrationError, InputError, LayerFailedError, UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model.blocks import HiddenStates, run_model
from halve.model.layers import find_stack
from halve.model.reconstruct import Reconstruction, Tuned
from halve.run import bundles as bundles_module
from halve.run import loop as run_module
from halve.run.loop import plan_model, prune_blocks
from halve.run.settings import Settings
from halve.solve.matrix import prune_weight
from halve.solve.methods import METHODS
from halve.solve.objective import Objective
from halve.solve.outcome import Status
from models import DECODERS, MIXTURES, bert, decoder, tokens, vit

CPU = torch.device("cpu")


def settings(method="wanda", refit="none", pattern="2:4", **changes):
    return Settings(pattern=Pattern(pattern), method=method, refit=refit, **changes)


def batches(count=2, rows=4):
    return [{"input_ids": tokens(rows, seed=seed)} for seed in range(count)]


def assert_pruned(model, report):
    """Every reported matrix is in the pattern, every other parameter is exactly as before."""
    reported = {matrix.parameter for matrix in report.matrices}
    for matrix in report.matrices:
        parameter = model.get_parameter(matrix.parameter).data
        weight = parameter if matrix.layout == "out_in" else parameter.mT
        assert Pattern("2:4").satisfied_by(weight), matrix.name
        assert weight.isfinite().all()
        assert 0.2 < (weight == 0).float().mean() < 0.8
    return reported


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", ["wanda", "prox-gradient"])
def test_every_family_is_pruned_and_nothing_else_is_touched(family, method):
    model = decoder(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options = {"beta": 1.3} if method == "prox-gradient" else {}
    report = prune_blocks(model, batches(), settings(method, "cg", options=options, min_expert_tokens=1), device=CPU)
    reported = assert_pruned(model, report)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in reported), name
    assert report.blocks == 3
    assert all(0 <= m.facts["relative_loss"] < 1 for m in report.matrices if m.status is Status.OK)


@pytest.mark.parametrize(
    ("model", "data"),
    [(bert(), batches()), (vit(), [{"pixel_values": torch.randn(4, 3, 16, 16)}])],
)
def test_encoders_and_vision_transformers(model, data):
    report = prune_blocks(model, data, settings("sparsegpt", "cg"), device=CPU)
    assert_pruned(model, report)
    assert len(report.matrices) == 18


def test_later_blocks_see_what_the_pruned_earlier_ones_give():
    """The oracle prunes the second block by hand, from the inputs that a model with a pruned first block feeds it."""
    model, reference = decoder("llama"), decoder("llama")
    report = prune_blocks(model, batches(), settings("sparsegpt"), device=CPU)
    stack = list(find_stack(reference)[1])
    for matrix in report.matrices:
        if ".layers.0." in matrix.parameter:
            reference.get_parameter(matrix.parameter).data.copy_(model.get_parameter(matrix.parameter))
    seen = []
    hook = stack[1].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    for batch in batches():
        run_model(reference, batch)
    hook.remove()
    x = torch.cat(seen).double()
    gram = (x.T @ x / len(x)).float()
    expected = prune_weight(stack[1].self_attn.o_proj.weight.data, gram, "2:4", "sparsegpt", "none")
    got = model.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(got == 0, expected.weight == 0)
    torch.testing.assert_close(got.data, expected.weight, rtol=1e-3, atol=1e-4)


def test_two_runs_give_the_same_bytes_in_memory_or_on_disk(tmp_path):
    models = [decoder("gemma3") for _ in range(3)]
    for model, folder in zip(models, (None, None, tmp_path), strict=True):
        prune_blocks(model, batches(), settings("sparsegpt", "cg"), device=CPU, offload=folder)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name))
        assert torch.equal(parameter, models[2].get_parameter(name))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bytes_twice(method):
    options = {"beta": 1.3} if method == "prox-gradient" else {}
    asked = settings(method, "cg", options=options, reconstruction=Reconstruction(epochs=1))
    first, second = decoder("llama"), decoder("llama")
    for model in (first, second):
        prune_blocks(model, batches(4), asked, device=CPU)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_bfloat16_models_keep_their_dtype_and_products_may_run_in_bfloat16():
    model = decoder("llama").to(torch.bfloat16)
    report = prune_blocks(model, batches(), settings("wanda", "cg"), device=CPU, precision=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_pruned(model, report)


def test_experts_with_few_tokens_are_pruned_by_magnitude_and_listed():
    model = decoder("mixtral")
    data = [{"input_ids": tokens(1, length=6)}]
    asked = settings("sparsegpt", min_expert_tokens=1000)
    with pytest.raises(
        LayerFailedError, match=r"this expert \(at least 1000 are needed\): use more samples or a smaller"
    ):
        prune_blocks(decoder("mixtral"), data, asked, device=CPU)
    assert not prune_blocks(decoder("mixtral"), data, replace(asked, method="magnitude"), device=CPU).fallbacks
    report = prune_blocks(model, data, replace(asked, fallback="magnitude"), device=CPU)
    assert_pruned(model, report)
    experts = [matrix for matrix in report.matrices if "experts" in matrix.name]
    assert experts
    assert report.fallbacks == tuple(experts)
    assert {matrix.method for matrix in experts} == {"magnitude"}
    assert "calibration tokens reached this expert (at least 1000 are needed)" in experts[0].reason
    assert any("fell back to another method" in warning for warning in report.warnings)


def test_fewer_tokens_than_inputs_is_a_warning():
    report = prune_blocks(decoder("llama"), [{"input_ids": tokens(1, 8)}], settings(), device=CPU)
    assert any("fewer calibration tokens than they have inputs" in warning for warning in report.warnings)
    report = prune_blocks(decoder("llama"), batches(4, 8), settings(), device=CPU)
    assert report.warnings == ()


def test_a_layer_that_fails_stops_the_run_or_falls_back_visibly():
    def dead(model):
        # An attention whose values are zero: the output projection's inputs are all zero.
        model.model.layers[1].self_attn.v_proj.weight.data.zero_()
        return model

    with pytest.raises(LayerFailedError, match=r"layers\.1\.self_attn\.o_proj\.weight could not be pruned by wanda"):
        prune_blocks(dead(decoder("llama")), batches(), settings(), device=CPU)
    report = prune_blocks(dead(decoder("llama")), batches(), settings(fallback="magnitude"), device=CPU)
    assert [matrix.name for matrix in report.fallbacks] == ["model.layers.1.self_attn.o_proj.weight"]
    assert report.fallbacks[0].method == "magnitude"
    assert report.fallbacks[0].asked == "wanda"


@pytest.mark.parametrize(
    ("parameter", "value", "dtype", "message"),
    [
        ("model.embed_tokens.weight", float("nan"), None, "the embeddings of calibration batch 0 are not finite"),
        ("model.layers.1.mlp.up_proj.weight", float("inf"), None, "dense model's block 1 are not finite"),
        ("model.layers.1.input_layernorm.weight", float("nan"), None, "dense model's block 1 are not finite"),
        ("model.layers.1.mlp.up_proj.weight", 6e4, torch.float16, "dense model's block 1 are not finite"),
        ("model.layers.1.mlp.up_proj.weight", 1e30, None, r"layers\.1\.mlp\.down_proj\.weight overflowed float32"),
    ],
)
@pytest.mark.parametrize("fallback", [None, "magnitude"])
def test_values_that_are_not_finite_stop_the_run_where_they_began(parameter, value, dtype, message, fallback):
    model = decoder("llama").to(dtype)
    model.get_parameter(parameter).data.fill_(value)
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(CalibrationError, match=message):
        prune_blocks(model, batches(), settings(fallback=fallback), device=CPU)
    changed = [
        name for name, each in model.named_parameters() if not torch.equal(each.nan_to_num(), before[name].nan_to_num())
    ]
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_progress_counts_every_matrix_once():
    steps = []
    report = prune_blocks(decoder("llama"), batches(), settings(), device=CPU, listen=steps.append)
    solved = [step.matrix.name for step in steps if step.matrix is not None]
    assert solved == [matrix.name for matrix in report.matrices]
    assert steps[0].phase == "plan"
    assert len(steps[0].plan.matrices) == len(solved)
    assert steps[-1].phase == "done"
    assert steps[-1].finished == steps[-1].matrices == len(solved)


def test_bad_settings_are_refused_before_any_work():
    for bad in (
        {"method": "wandda"},
        {"refit": "sgd"},
        {"options": {"betta": 1}},
        {"fallback": "nothing"},
        {"min_expert_tokens": 0},
        {"method": "prox-gradient", "pattern": "50%"},
    ):
        with pytest.raises(InputError):
            settings(**bad)
    with pytest.raises(InputError, match="no calibration batches"):
        prune_blocks(decoder("llama"), [], settings(), device=CPU)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_plan_of_a_mixture_has_both_kinds_of_experts(family):
    plan, _ = plan_model(decoder(family), batches()[0], Pattern("2:4"))
    assert {m.parameter.rpartition(".")[2] for m in plan.matrices if m.expert} == {"gate_up_proj", "down_proj"}


def test_hidden_states_come_back_from_disk_unchanged(tmp_path):
    states = HiddenStates(tmp_path)
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    states.append(first)
    assert torch.equal(states[0], first)
    states[0] = second
    assert torch.equal(states[0], second)


def test_nothing_is_changed_when_a_layer_turns_out_not_to_be_called():
    model = decoder("llama")
    attention = model.model.layers[2].self_attn
    hidden = attention.o_proj
    attention.o_proj = None
    attention.register_module("hidden_projection", hidden)
    attention.o_proj = torch.nn.Identity()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.self_attn\.hidden_projection\.weight without calling"):
        prune_blocks(model, batches(), settings(), device=CPU)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_products_that_fail_in_bfloat16_say_what_to_do():
    model = decoder("llama")

    class Picky(torch.nn.Identity):
        def forward(self, x):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("index_add_(): Float and BFloat16")
            return x

    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda _m, _a, output: Picky()(output))
    prune_blocks(model, batches(), settings(), device=CPU)
    with pytest.raises(UnsupportedModelError, match="use forward_dtype float32"):
        prune_blocks(model, batches(), settings(), device=CPU, precision=torch.bfloat16)


def test_settings_know_all_their_options():
    assert settings("prox-gradient", "cg", options={"beta": 1.2}).all_options["lambda0"] == 0.01
    assert settings("prox-gradient", "cg", options={"beta": 1.2}).all_options["beta"] == 1.2
    assert "refit_tolerance" in settings("wanda", "cg").all_options
    assert settings("magnitude", "cg").needs_calibration
    assert settings("wanda").needs_calibration
    assert not settings("magnitude").needs_calibration


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_reconstruction_brings_the_output_closer_and_keeps_the_pattern(family):
    data = batches(4, rows=8)
    plain, tuned, dense = (decoder(family) for _ in range(3))
    prune_blocks(plain, data, settings("wanda", min_expert_tokens=1), device=CPU)
    options = Reconstruction(epochs=8, learning_rate=3e-3)
    report = prune_blocks(tuned, data, settings("wanda", min_expert_tokens=1, reconstruction=options), device=CPU)
    assert_pruned(tuned, report)
    blocks = plan_model(dense, data[0], Pattern("2:4"))[0].blocks
    assert tuple(block.name for block in report.reconstructions) == blocks
    assert all(block.tuned.after < block.tuned.before for block in report.reconstructions)
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)) == (name not in report.changed), name
    with torch.no_grad():
        target = dense(**data[0]).logits
        errors = [float((model(**data[0]).logits - target).square().mean()) for model in (plain, tuned)]
    assert errors[1] < errors[0]


def test_reconstruction_with_hidden_states_on_disk_is_the_same(tmp_path):
    models = [decoder("llama") for _ in range(2)]
    for model, folder in zip(models, (None, tmp_path), strict=True):
        asked = settings("magnitude", reconstruction=Reconstruction(epochs=1))
        prune_blocks(model, batches(4), asked, device=CPU, offload=folder)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
    assert (tmp_path / "dense").is_dir()


def test_the_first_block_that_gains_chooses_the_learning_rate_for_the_rest(monkeypatch):
    stuck, gained = (
        Tuned(before=1.0, after=1.0, epoch=0, learning_rate=None, steps=1, held_out=1),
        Tuned(before=1.0, after=0.5, epoch=1, learning_rate=4e-3, steps=1, held_out=1),
    )
    asked, answers = [], [stuck, gained, gained]

    def tune(_work, _masks, _example, _count, options, *_rest):
        asked.append(options)
        return answers[len(asked) - 1]

    monkeypatch.setattr(run_module, "reconstruct", tune)
    prune_blocks(decoder("llama"), batches(4), settings(reconstruction=Reconstruction(epochs=2)), device=CPU)
    assert asked == [Reconstruction(2), Reconstruction(2), Reconstruction(2, 4e-3)]


def test_reconstruction_needs_calibration():
    assert settings("magnitude", reconstruction=Reconstruction()).needs_calibration


def test_reconstruction_leaves_shared_and_skipped_vectors_alone():
    model = decoder("llama")
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    asked = settings("wanda", skip=("*.post_attention_layernorm.*",), reconstruction=Reconstruction(epochs=2))
    report = prune_blocks(model, batches(4), asked, device=CPU)
    assert all(block.tuned.epoch for block in report.reconstructions)
    for name, parameter in model.named_parameters():
        alone = "post_attention" in name or name.endswith("layers.0.input_layernorm.weight")
        if "layernorm" in name:
            assert torch.equal(parameter, before[name]) == alone, name


@pytest.mark.parametrize("method", ["auto", "sparsegpt", "alps"])
def test_solving_together_changes_next_to_nothing(monkeypatch, method):
    together, alone = decoder("llama"), decoder("llama")
    report = prune_blocks(together, batches(), settings(method, "cg"), device=CPU)
    monkeypatch.setattr(run_module, "bundles", lambda matrices, statistics: ([each] for each in matrices))
    other = prune_blocks(alone, batches(), settings(method, "cg"), device=CPU)
    assert [each.name for each in report.matrices] == [each.name for each in other.matrices]
    for one, two in zip(report.matrices, other.matrices, strict=True):
        assert one.facts["relative_loss"] == pytest.approx(two.facts["relative_loss"], rel=0.05)
    for name, parameter in together.model.layers[0].named_parameters():  # later blocks see rounding
        twin = alone.model.layers[0].get_parameter(name)
        assert torch.equal(parameter != 0, twin != 0), name
        assert float((parameter.data - twin.data).norm() / twin.data.norm()) < 5e-3, name


def record_limits(monkeypatch, takes):
    """Let `prune_weights` note its time limit and the matrices, and claim to have taken a share of that time."""
    limits = []

    def solve(weights, gram, *arguments, time_limit, **more):
        limits.append((time_limit, [tuple(weight.shape) for weight in weights]))
        real = [prune_weight(weight, None, "2:4", "magnitude", "none") for weight in weights]
        return [replace(each, facts={"seconds": takes * time_limit / len(weights)}) for each in real]

    monkeypatch.setattr(bundles_module, "prune_weights", solve)
    return limits


def operations(shapes):
    return sum(d_in**2 * (60 * d_out + 15 * d_in) for d_out, d_in in shapes)


def test_a_time_limit_is_shared_out_by_operations_and_never_exceeded(monkeypatch):
    limits = record_limits(monkeypatch, takes=1.0)
    prune_blocks(decoder("llama"), batches(), settings("auto", "cg", options={"time_limit": 60.0}), device=CPU)
    assert len(limits) == 12  # qkv, o, gate and up, down of each block
    assert all(limit > 0.0 for limit, _ in limits)
    assert sum(limit for limit, _ in limits) == pytest.approx(60.0)
    whole = sum(operations(shapes) for _, shapes in limits)
    for limit, shapes in limits:
        assert limit == pytest.approx(60.0 * operations(shapes) / whole)


@pytest.mark.parametrize(("takes", "last"), [(0.5, None), (0.0, 60.0), (100.0, None)])
def test_time_not_used_is_left_to_the_others_and_time_overdrawn_taken_from_them(monkeypatch, takes, last):
    limits = record_limits(monkeypatch, takes)
    prune_blocks(decoder("llama"), batches(), settings("auto", "cg", options={"time_limit": 60.0}), device=CPU)
    spent, ahead = 0.0, sum(operations(shapes) for _, shapes in limits)
    for limit, shapes in limits:
        assert 0.0 < limit <= 60.0
        assert limit == pytest.approx(max(1e-3, 60.0 - spent) * operations(shapes) / ahead)
        spent, ahead = spent + takes * limit, ahead - operations(shapes)
    if last is not None:
        assert limits[-1][0] == pytest.approx(last)


def test_without_a_time_limit_none_is_passed_on(monkeypatch):
    seen = []

    def note(weights, *arguments, **more):
        seen.append("time_limit" in more)
        return [prune_weight(weight, None, "2:4", "magnitude", "none") for weight in weights]

    monkeypatch.setattr(bundles_module, "prune_weights", note)
    prune_blocks(decoder("llama"), batches(), settings("auto", "cg"), device=CPU)
    assert seen == [False] * 12


@pytest.mark.parametrize("limit", [1e-9, 1000.0])
def test_a_model_is_pruned_within_a_time_limit(limit):
    model = decoder("llama")
    asked = settings("auto", "cg", options={"effort": "fast", "time_limit": limit})
    report = prune_blocks(model, batches(), asked, device=CPU)
    assert_pruned(model, report)
    assert {"swaps" in each.facts for each in report.matrices} == {limit == 1000.0}


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


@pytest.mark.parametrize(("copies", "asked"), [(1, {}), (2, {"reconstruction": Reconstruction(epochs=1)})])
def test_hidden_states_that_cannot_fit_are_refused_before_anything_is_pruned(tmp_path, monkeypatch, copies, asked):
    data = batches(3)
    needed = copies * sum(batch["input_ids"].numel() for batch in data) * 32 * 4
    model = decoder("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr("halve.memory.available_memory", lambda: needed - 1)
    with pytest.raises(InputError, match=r"hidden states .* of memory are available: keep them on disk \(offload\)"):
        prune_blocks(model, data, settings(**asked), device=CPU)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    monkeypatch.setattr("halve.checkpoint.room.shutil.disk_usage", lambda _path: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"hidden states .* volume has .* free: free some space, or use fewer samples"):
        prune_blocks(model, data, settings(**asked), device=CPU, offload=tmp_path)
    monkeypatch.setattr("halve.memory.available_memory", lambda: needed)
    prune_blocks(model, data, settings(**asked), device=CPU)


@pytest.mark.parametrize("changes", [{}, {"reconstruction": Reconstruction(epochs=1, learning_rate=1e-3)}])
def test_nothing_is_run_beyond_the_last_pruned_block(changes):
    steps = []
    asked = settings(skip=("model.layers.1.*", "model.layers.2.*"), **changes)
    model = decoder("llama")
    report = prune_blocks(model, batches(), asked, device=CPU, listen=steps.append)
    assert {matrix.name.split(".")[2] for matrix in report.matrices} == {"0"}
    assert {step.block for step in steps if step.phase in {"collect", "replay", "reconstruct"}} == {0}
    assert report.blocks == 3
