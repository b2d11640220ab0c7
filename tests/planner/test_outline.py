"""What of a model could run sparse, counted against the shapes that its configuration gives."""

import pytest
import torch
from torch import nn

from halve.errors import InputError, UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.planner.outline import LLAMA, ROUTED, outline
from halve.runtime import speed
from models import decoder, save

PATTERN, CPU = Pattern("2:4"), torch.device("cpu")


def llama_shapes(hidden, intermediate, heads, key_value_heads):
    """Rows and columns of a Llama block's matrices, from the model's definition."""
    narrow = hidden // heads * key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


@pytest.mark.parametrize(
    ("preset", "blocks", "parameters", "expected"),
    [
        ("llama-8b", 32, 8_030_261_248, llama_shapes(4096, 14336, 32, 8)),
        ("llama-70b", 80, 70_553_706_496, llama_shapes(8192, 28672, 64, 8)),
    ],
)
def test_presets_have_llama_3s_shapes_and_number_of_parameters(preset, blocks, parameters, expected):
    found = outline(preset)
    kinds, dense = found.kinds(PATTERN, torch.bfloat16, CPU)
    assert {kind.name: kind.shape for kind in kinds} == expected
    assert {kind.count for kind in kinds} == {blocks}
    assert sum(parameter.numel() for parameter in found.skeletons[0].parameters()) == parameters
    assert {(entry.name, entry.shape[0]) for entry in dense} == {
        ("model.embed_tokens.weight", 128256),
        ("lm_head.weight", 128256),
    }
    assert found.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in found.skeletons[0].parameters())


def test_the_papers_preset_is_both_models():
    kinds, _ = outline("paper").kinds(PATTERN, torch.bfloat16, CPU)
    names = {f"{model} {name}" for model in LLAMA for name in llama_shapes(64, 64, 4, 2)}
    assert {kind.name for kind in kinds} == names
    found = {kind.name: kind for kind in kinds}
    assert (found["llama-8b mlp.down_proj"].shape, found["llama-8b mlp.down_proj"].count) == ((4096, 14336), 32)
    assert (found["llama-70b self_attn.k_proj"].shape, found["llama-70b self_attn.k_proj"].count) == ((1024, 8192), 80)


def test_settings_are_enough_and_say_the_dtype(tmp_path):
    path = save(decoder("llama").to(torch.float16), tmp_path / "in")
    (path / "model.safetensors").unlink()
    found = outline(path)
    assert (found.name, found.dtype) == (str(path), torch.float16)
    kinds, _ = found.kinds(PATTERN, torch.bfloat16, CPU)
    assert {kind.name: kind.shape for kind in kinds} == llama_shapes(32, 64, 4, 2)
    assert {kind.count for kind in kinds} == {3}


def test_a_model_in_memory_is_taken_as_it_is():
    model = decoder("gpt2")
    found = outline(model)
    assert (found.name, found.skeletons, found.dtype) == ("GPT2LMHeadModel", (model,), torch.float32)
    shapes = {kind.name: kind.shape for kind in found.kinds(PATTERN, torch.bfloat16, CPU)[0]}
    assert shapes["mlp.c_fc"] == (128, 32)  # stored the other way round


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_fused_experts_are_named_and_left_dense(family):
    kinds, dense = outline(decoder(family)).kinds(PATTERN, torch.bfloat16, CPU)
    assert {kind.name for kind in kinds} >= {"self_attn.q_proj"}
    experts = {entry.name: entry for entry in dense if "experts" in entry.name}
    assert experts["mlp.experts.gate_up_proj"].count == 3
    assert experts["mlp.experts.gate_up_proj"].reason.startswith("experts in one parameter")


def test_experts_in_a_list_are_left_dense():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 16)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Linear(8, 12)
            self.experts = nn.ModuleList(Expert() for _ in range(5))

    kinds, dense = outline(nn.Sequential(Block(), Block())).kinds(PATTERN, torch.bfloat16, CPU)
    assert [(kind.name, kind.count) for kind in kinds] == [("mixer", 2)]
    assert [(entry.name, entry.count, entry.shape, entry.reason) for entry in dense] == [
        ("experts.up", 10, (16, 8), ROUTED)
    ]


def test_shapes_that_the_hardware_does_not_take_are_left_dense_with_the_reason(monkeypatch):
    monkeypatch.setattr(speed, "unfit", lambda d_out, d_in, *_: "odd" if (d_out, d_in) == (32, 64) else "")
    kinds, dense = outline(decoder("llama")).kinds(PATTERN, torch.bfloat16, CPU)
    assert "mlp.down_proj" not in {kind.name for kind in kinds}
    assert ("mlp.down_proj", 3, "odd") in {(entry.name, entry.count, entry.reason) for entry in dense}
    monkeypatch.setattr(speed, "unfit", lambda *_: "odd")
    with pytest.raises(InputError, match=r"nothing of LlamaForCausalLM could run sparse on cpu: .*odd"):
        outline(decoder("llama")).kinds(PATTERN, torch.bfloat16, CPU)


def test_what_the_pattern_does_not_fit_is_left_dense_with_the_reason():
    kinds, dense = outline(decoder("llama", intermediate_size=66)).kinds(PATTERN, torch.bfloat16, CPU)
    assert "mlp.down_proj" not in {kind.name for kind in kinds}
    assert ("mlp.down_proj", 3, "d_in = 66 is not divisible by 4") in {(e.name, e.count, e.reason) for e in dense}


def test_what_is_no_model_is_refused(tmp_path):
    for wrong in (tmp_path / "nothing", "no/such/model.gguf", str(tmp_path / "paper")):
        with pytest.raises(InputError, match="does not exist"):
            outline(wrong)
    with pytest.raises(InputError, match=r"does not exist: .*; presets are llama-8b, llama-70b, paper"):
        outline("llama-8b!")
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        outline(nn.Linear(4, 4)).kinds(PATTERN, torch.bfloat16, CPU)


def test_a_directory_comes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    save(decoder("llama"), tmp_path / "paper")
    monkeypatch.chdir(tmp_path)
    assert len(outline("paper").skeletons) == 1
