from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from halve.errors import CalibrationError, InputError, LayerFailedError, UnsupportedModelError
from halve.model.reconstruct import Reconstruction
from halve.run.loop import prune_blocks
from models import decoder, tokens
from pruned_blocks import CPU, assert_pruned, batches, settings


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


def without_output_projection():
    """A model in which one layer of the last block is never called."""
    model = decoder("llama")
    attention = model.model.layers[2].self_attn
    attention.register_module("hidden_projection", attention.o_proj)
    attention.o_proj = torch.nn.Identity()
    return model


def test_a_layer_that_turns_out_not_to_be_called_stays_dense():
    model = without_output_projection()
    report = prune_blocks(model, batches(), settings(), device=CPU)
    unseen = "its layer did not run on the calibration data, so its inputs cannot be seen"
    assert {entry.name: entry.reason for entry in report.excluded if "layers.2" in entry.name} == {
        "model.layers.2.self_attn.hidden_projection.weight": unseen
    }
    assert_pruned(model, report)


def test_nothing_is_changed_where_less_of_a_block_can_be_pruned_than_asked():
    model = without_output_projection()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=r"only 8\d% of the matrix weights in model\.layers\.2 .*--least"):
        prune_blocks(model, batches(), settings(least_prunable=0.9), device=CPU)
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
