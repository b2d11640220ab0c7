"""Adapters read from files that nobody here wrote: standard ones are what peft makes of them, others are refused."""

import json
import pickle
import warnings
from copy import deepcopy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from halve.errors import CorruptFileError, InputError, UnsupportedModelError
from halve.learning.adapter import read_adapter, write_adapter
from models import edit_json
from pruned_for_learning import pruned_decoder, stock, targets


def adapter_of_peft(model, path, config):
    """Save an adapter that stock peft made, with values in it as a training leaves them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(deepcopy(model), config)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(1 + 0.2 * noise if "magnitude" in name else 0.2 * noise)
        wrapped.save_pretrained(path)
    return path


@pytest.fixture
def saved(tmp_path):
    model, _ = pruned_decoder()
    return adapter_of_peft(model, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 24},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"a": 2}, "alpha_pattern": {"a": 40, "b": 1}},
        {"use_dora": True, "lora_alpha": 12},
        {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
    ],
    ids=str,
)
def test_a_standard_adapter_is_what_peft_merges(family, options, tmp_path):
    model, layouts = pruned_decoder(family)
    modules = ["q_proj", "up_proj"] if family == "llama" else ["c_attn", "c_proj"]
    names = {"a": rf"^.*\.{modules[0]}", "b": modules[1]}
    options = {"target_modules": modules, **options}
    for field in ("rank_pattern", "alpha_pattern"):
        if field in options:
            options[field] = {names[key]: value for key, value in options[field].items()}
    adapter_of_peft(model, tmp_path / "adapter", peft.LoraConfig(**options))
    adapter = read_adapter(tmp_path / "adapter")
    assert not adapter.masked
    merged = stock(deepcopy(model), tmp_path / "adapter").merge_and_unload()
    changed = 0
    for old, new in zip(targets(model, layouts), targets(merged, layouts), strict=True):
        update = adapter.updates.get(old.name.removesuffix(".weight"))
        if update is None:
            assert torch.equal(old.tensor, new.tensor)
            continue
        weight = old.inputs_last(old.tensor.data)
        assert update.shape == weight.shape
        torch.testing.assert_close(update.merged(weight, masked=False), new.inputs_last(new.tensor.data))
        masked = update.merged(weight, masked=True)
        torch.testing.assert_close(masked, new.inputs_last(new.tensor.data) * (weight != 0))
        changed += 1
    assert changed == len(adapter.updates) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A"),
        ({"bias": "all"}, "trains biases too"),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, "sets lora_bias"),
        ({"init_lora_weights": "pissa"}, "began with init_lora_weights 'pissa'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_trains_more_than_matrices_is_refused(options, message, tmp_path):
    model, _ = pruned_decoder("gpt2" if "c_attn" in str(options) else "llama")
    options = {"target_modules": ["q_proj"], **options}
    adapter_of_peft(model, tmp_path / "adapter", peft.LoraConfig(**options))
    with pytest.raises(UnsupportedModelError, match=message):
        read_adapter(tmp_path / "adapter")


def test_another_tuner_is_refused(tmp_path):
    model, _ = pruned_decoder()
    adapter_of_peft(model, tmp_path / "adapter", peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="is an adapter of type LOHA"):
        read_adapter(tmp_path / "adapter")


def test_pickles_are_never_read(saved):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Boom()))
    read_adapter(saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="only pickled weights"):
        read_adapter(saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        read_adapter(saved)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_adapter(saved)
    with pytest.raises(InputError, match="is not a directory"):
        read_adapter(saved / "nowhere")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": 3}, CorruptFileError, "is malformed: `peft_type`"),
        ({"peft_type": "\x1b[31mred"}, UnsupportedModelError, r"of type \?\[31mred"),
        ({"lora_alpha": "many"}, CorruptFileError, "is malformed: `lora_alpha`"),
        ({"lora_alpha": float("nan")}, CorruptFileError, "has an alpha of nan"),
        ({"alpha_pattern": {"(a+)+": 1}}, UnsupportedModelError, "is too involved to be tried"),
        ({"alpha_pattern": {"(.*.*.*.*)x": 1}}, UnsupportedModelError, "is too involved to be tried"),
        ({"alpha_pattern": {"(((": 1}}, CorruptFileError, "is no regular expression"),
        ({"halve_mask": "blocks"}, UnsupportedModelError, "has the mask 'blocks'"),
        ({"a_new_field_of_peft": {"deep": 1}}, UnsupportedModelError, "sets a_new_field_of_peft"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_trusted_is_refused(changes, error, message, saved):
    edit_json(saved / "adapter_config.json", **changes)
    with pytest.raises(error, match=message):
        read_adapter(saved)


def _transposed(tensors, name):
    tensors[name] = tensors[name].mT.contiguous()


def _without(tensors, name):
    del tensors[name]


def _infinite(tensors, name):
    tensors[name][0, 0] = float("inf")


def _integers(tensors, name):
    tensors[name] = tensors[name].int()


def _twice(tensors, name):
    tensors[name.removeprefix("base_model.model.")] = tensors[name].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_transposed, "whose ranks must be the same"),
        (_without, "a part of the update of .* only"),
        (_infinite, "is not of finite floating-point numbers"),
        (_integers, "is not of finite floating-point numbers"),
        (_twice, "twice"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if "lora_A" in name))
    save_file(tensors, path)
    with pytest.raises(CorruptFileError, match=message):
        read_adapter(saved)


def test_damaged_files_and_links_are_refused(saved, tmp_path):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CorruptFileError, match="is corrupt"):
        read_adapter(saved)
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CorruptFileError, match="is a link that leaves"):
        read_adapter(saved)


def test_what_is_written_is_read_and_nothing_is_written_over(tmp_path):
    tensors = {
        "base_model.model.x.lora_A.weight": torch.ones(2, 8),
        "base_model.model.x.lora_B.weight": torch.ones(4, 2),
    }
    write_adapter(tmp_path / "new", {"peft_type": "LORA", "lora_alpha": 6}, tensors, "a card")
    update = read_adapter(tmp_path / "new").updates["x"]
    assert update.scaling == 3.0
    assert torch.equal(update.merged(torch.zeros(4, 8), masked=False), torch.full((4, 8), 6.0))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["lora_alpha"] == 6
    with pytest.raises(InputError, match="is not an empty directory"):
        write_adapter(tmp_path / "new", {}, tensors, "")
