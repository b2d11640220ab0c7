"""Kept masks: nothing that trains a model moves a pruned weight, and kept ones train as they would alone."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from lion_pytorch import Lion
from torch import nn
from torch.optim import optimizer as optimizer_module

import halve
from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from kept_models import assert_kept, loss_of, pruned_decoder, train, zeros
from models import decoder
from packed_models import pruned


class Mixed:
    """Muon for the matrices of the blocks, AdamW for the rest, as it is used."""

    def __init__(self, model):
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n]
        mine = {id(p) for p in matrices}
        self.all = (
            torch.optim.Muon(matrices, lr=0.02),
            torch.optim.AdamW([p for p in model.parameters() if id(p) not in mine], lr=1e-3),
        )

    def step(self):
        for each in self.all:
            each.step()

    def zero_grad(self):
        for each in self.all:
            each.zero_grad()


OPTIMISERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "lion": lambda model: Lion(model.parameters(), lr=1e-3, weight_decay=0.1),
    "muon": Mixed,
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_optimiser_moves_a_pruned_weight(name, made):
    model = pruned_decoder()
    before, start = zeros(model), copy.deepcopy(model.state_dict())
    optimiser = OPTIMISERS[name](model) if made == "before" else None
    kept = halve.keep_masks(model)
    train(model, optimiser or OPTIMISERS[name](model))
    kept.check()
    assert_kept(model, before)
    for key, parameter in model.named_parameters():
        if key in before:
            moved = parameter.detach()[~before[key]] != start[key][~before[key]]
            assert moved.float().mean() > 0.9, key
    assert len(kept.masks.parameters) == len(before)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_without_it_they_do(name):
    model = pruned_decoder()
    before = zeros(model)
    train(model, OPTIMISERS[name](model))
    with pytest.raises(AssertionError):
        assert_kept(model, before)


def test_kept_weights_train_as_they_would_alone():
    """An oracle without hooks: the same model, its gradients and moments masked by hand around every step."""
    model, other = pruned_decoder(), pruned_decoder()
    halve.keep_masks(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=4, accumulate=2)
    pruned_at = zeros(other)
    optimiser = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for step in range(4):
        optimiser.zero_grad()
        for part in range(2):
            (loss_of(other, seed=2 * step + part) / 2).backward()
        for name, parameter in other.named_parameters():
            if name in pruned_at:
                parameter.grad[pruned_at[name]] = 0.0
        optimiser.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_clipping_sees_the_gradients_of_kept_weights_alone():
    model = pruned_decoder()
    before = zeros(model)
    halve.keep_masks(model)
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if name in before:
            assert not bool((parameter.grad[before[name]] != 0).any())
            assert bool((parameter.grad[~before[name]] != 0).any())


def test_a_kept_weight_may_pass_through_zero():
    model = pruned_decoder()
    halve.keep_masks(model)
    name, weight = next((n, p) for n, p in model.named_parameters() if "q_proj" in n)
    row, column = map(int, (weight != 0).nonzero()[5])
    with torch.no_grad():
        weight[row, column] = 0.0
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    assert float(weight[row, column].detach()) != 0.0, name


def test_a_group_with_fewer_non_zeros_does_not_fill_up():
    model = pruned_decoder()
    halve.keep_masks(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for name in ("q_proj", "down_proj"):
        weight = next(p for n, p in model.named_parameters() if name in n)
        assert (weight.detach()[0, :4] != 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("how", ["checkpointing", "autocast", "scaled", "compiled"])
def test_however_the_gradients_are_made(how):
    model = pruned_decoder()
    before = zeros(model)
    kept = halve.keep_masks(model)
    called = model
    if how == "checkpointing":
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it has another name since
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "compiled":
        called = torch.compile(model, backend="aot_eager")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaled")
    for step in range(2):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = loss_of(called, seed=step)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        for name, parameter in model.named_parameters():
            if name in before:
                assert not bool((parameter.grad[before[name]] != 0).any())
    kept.check()
    assert_kept(model, before)


def test_a_compiled_model_may_be_given_itself():
    model = pruned_decoder()
    kept = halve.keep_masks(torch.compile(model, backend="aot_eager"))
    assert halve.keep_masks(model) is kept
    assert {each.name for each in kept.masks.parameters} == set(zeros(model))


def test_moments_from_before_are_masked_with_the_weights():
    model = decoder("llama").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimiser, steps=1)
    other = pruned_decoder()
    model.load_state_dict(other.state_dict())
    before = zeros(model)
    halve.keep_masks(model)
    train(model, optimiser, steps=1)
    assert_kept(model, before)
    for name, parameter in model.named_parameters():
        if name in before:
            assert not bool((optimiser.state[parameter]["momentum_buffer"][before[name]] != 0).any())


def test_removed_hooks_keep_nothing():
    model = pruned_decoder()
    before = zeros(model)
    kept = halve.keep_masks(model)
    kept.remove()
    kept.remove()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=1)
    with pytest.raises(AssertionError):
        assert_kept(model, before)
    with pytest.raises(HalveError, match=r"pruned weights of model\.layers\.0.* and \d+ more are not zero: they were"):
        kept.check()
    kept.hold()
    kept.check()
    assert_kept(model, before)
    assert halve.keep_masks(model) is not kept


def test_what_is_written_between_steps_is_found_and_put_back():
    model = pruned_decoder()
    kept = halve.keep_masks(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = 1.0
    with pytest.raises(HalveError, match=r"^1 pruned weight of model\.layers\.0\.mlp\.up_proj\.weight is not zero"):
        kept.check()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(HalveError, match="is not zero"):
        kept.check()
    with torch.no_grad():
        weight[0, 0] = 1.0
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    kept.check()


def test_it_lives_as_long_as_the_model_and_no_longer():
    model = pruned_decoder()
    halve.keep_masks(model)  # nobody holds the handle
    before = zeros(model)
    gc.collect()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    assert_kept(model, before)
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    hooks = len(optimizer_module._global_optimizer_post_hooks)
    del model
    gc.collect()
    assert gone() is None
    assert len(optimizer_module._global_optimizer_post_hooks) == hooks - 1


def test_copies_of_a_kept_model_are_plain_models():
    model = pruned_decoder()
    kept = halve.keep_masks(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - just written
        before = zeros(other)
        train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), steps=1)
        with pytest.raises(AssertionError):
            assert_kept(other, before)
        assert halve.keep_masks(pruned_decoder()) is not kept
    kept.check()


def test_a_frozen_model_can_be_thawed_later():
    model = pruned_decoder().requires_grad_(False)
    before = zeros(model)
    halve.keep_masks(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if name in before:
            assert not bool((parameter.grad[before[name]] != 0).any())


def test_a_parameter_that_was_replaced_is_watched_again():
    model = pruned_decoder()
    before = zeros(model)
    kept = halve.keep_masks(model)
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(parameter.detach().clone()))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps=1)
    assert_kept(model, before)
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if name in before:
            assert not bool((parameter.grad[before[name]] != 0).any())
    kept.check()


def test_a_parameter_that_was_replaced_by_another_shape_is_told_at_the_first_step():
    model = pruned_decoder()
    halve.keep_masks(model)
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.detach().flatten())
    with pytest.raises(InputError, match=r"up_proj\.weight has shape \(2048,\) now, and its mask \(64, 32\)"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_parameter_that_is_none_any_more_is_told_at_the_first_step():
    model = pruned_decoder()
    halve.keep_masks(model)
    layer = model.model.layers[0].mlp.up_proj
    torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(InputError, match=r"up_proj\.weight is no parameter of its module any more"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_masks_are_stored_with_the_state_of_a_training():
    model = pruned_decoder()
    kept = halve.keep_masks(model)
    state = kept.state_dict()
    assert all(mask.dtype == torch.uint8 for mask in state.values())
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[weight.abs() < weight[weight != 0].abs().median()] = (
            0.0  # kept weights at zero, as a training may leave them
        )
    other = pruned_decoder()
    other.load_state_dict(model.state_dict())
    resumed = halve.keep_masks(other)
    assert not torch.equal(
        resumed.state_dict()["model.layers.0.mlp.up_proj.weight"], state["model.layers.0.mlp.up_proj.weight"]
    )
    resumed.load_state_dict(state)
    assert all(torch.equal(mask, state[name]) for name, mask in resumed.state_dict().items())
    with pytest.raises(InputError, match="the saved masks are of other parameters: model"):
        resumed.load_state_dict({name: mask for name, mask in state.items() if "up_proj" not in name})


def test_tied_and_shared_weights_are_held_once():
    model = pruned_decoder("llama_tied")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = zeros(model)
    kept = halve.keep_masks(model)
    names = [each.name for each in kept.masks.parameters]
    assert sum("up_proj" in name for name in names) == 2
    assert not any("embed" in name or "lm_head" in name for name in names)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert_kept(model, before)
    moved = model.model.embed_tokens.weight.detach() != decoder("llama_tied").model.embed_tokens.weight
    assert bool(moved.any())


def test_an_embedding_that_is_a_layer_of_a_block_too_is_not_held():
    model = pruned_decoder()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight
    kept = halve.keep_masks(model)
    assert "model.layers.0.mlp.up_proj.weight" not in {each.name for each in kept.masks.parameters}


@pytest.mark.parametrize(("family", "pattern"), [("gpt2", "2:4"), ("llama", "4:8"), ("llama", "7:8"), ("opt", "40%")])
def test_other_layouts_and_patterns(family, pattern):
    model = pruned_decoder(family, pattern)
    before = zeros(model)
    kept = halve.keep_masks(model, pattern)
    assert {each.name for each in kept.masks.parameters} == set(before)
    assert {each.layout for each in kept.masks.parameters} == {"in_out" if family == "gpt2" else "out_in"}
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert_kept(model, before)


def test_experts_in_one_parameter_are_held():
    model = decoder("mixtral").train()
    fused = [(n, p) for n, p in model.named_parameters() if p.ndim == 3]
    with torch.no_grad():
        for _, parameter in fused:
            parameter.copy_(Pattern("2:4").project(parameter))
    before = {name: parameter.detach() == 0 for name, parameter in fused}
    kept = halve.keep_masks(model)
    assert {each.name for each in kept.masks.parameters} == set(before)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert_kept(model, before)


def test_a_model_without_blocks_of_its_own_is_held_by_its_layers():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[2].weight.copy_(Pattern("2:4").project(model[2].weight))
    assert [each.name for each in halve.keep_masks(model).masks.parameters] == ["2.weight"]


def test_what_begins_at_zero_is_not_taken_for_pruned():
    model = pruned_decoder()
    layer = model.model.layers[0].mlp.up_proj
    nn.init.zeros_(layer.weight)
    layer.bias = nn.Parameter(torch.zeros(64))
    names = {each.name for each in halve.keep_masks(model).masks.parameters}
    assert not {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"} & names
    assert "model.layers.1.mlp.up_proj.weight" in names


def test_gradients_that_did_not_accumulate_are_masked_too():
    """Set by hand, or put together by another process: what an optimiser remembers must not have them."""
    model = pruned_decoder()
    before = zeros(model)
    halve.keep_masks(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(optimiser.state[parameter]["momentum_buffer"] == 0, before[name])


def test_narrower_masks_zero_weights_and_moments():
    model = pruned_decoder()
    kept = halve.keep_masks(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimiser, steps=1)
    name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
    state = kept.state_dict()
    state[name] = state[name] & 0x0F  # of each eight entries the last four are pruned
    kept.load_state_dict(state)
    narrower = weight.detach().unflatten(-1, (-1, 2, 4))
    assert not bool(narrower[..., 1, :].any())
    assert bool(narrower[..., 0, :].any())
    train(model, optimiser, steps=1)
    assert not bool(optimiser.state[weight]["momentum_buffer"].unflatten(-1, (-1, 2, 4))[..., 1, :].any())
    kept.check()


@pytest.mark.parametrize("train_bases", [False, True])
def test_adapters_are_not_held(train_bases):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, about what peft asks it
        model = get_peft_model(pruned_decoder(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    before = {name: mask for name, mask in zeros(model).items() if "lora_" not in name}
    with torch.no_grad():  # an adapter that looks as if it were pruned
        first = next(p for n, p in model.named_parameters() if "lora_A" in n)
        first.copy_(Pattern("2:4").project(first))
    kept = halve.keep_masks(model)
    assert {each.name for each in kept.masks.parameters} == set(before)
    if train_bases:
        model.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert_kept(model, before)
    lora = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert lora
    assert all(bool((p != 0).all()) for p in lora)


def test_the_record_says_what_is_held(tmp_path):
    directory = pruned(tmp_path, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    before = zeros(model)
    names = {each.name for each in halve.keep_masks(model).masks.parameters}
    assert names == set(before)
    alone = decoder("llama", vocab_size=320)  # loaded from nowhere, and of a pattern that no search would find
    alone.load_state_dict(model.state_dict())
    assert {each.name for each in halve.keep_masks(alone, record=directory / "halve.json").masks.parameters} == names
    with pytest.raises(InputError, match=r"halve\.json says that the matrices are 2:4, not 4:8"):
        halve.keep_masks(decoder("llama", vocab_size=320), "4:8", record=directory)
    with pytest.raises(InputError, match=r"is recorded as pruned to 2:4 in .*halve\.json, and is not"):
        halve.keep_masks(decoder("llama", vocab_size=320), record=directory)


def test_a_recorded_model_with_adapters_is_held_by_its_zeros(tmp_path):
    """The names on record are not those of a wrapped model; its pattern is taken from there."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(pruned(tmp_path, dtype=torch.float32))
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    expected = {name for name in zeros(wrapped) if "lora_" not in name}
    assert {each.name for each in halve.keep_masks(wrapped).masks.parameters} == expected


def test_the_record_is_read_by_its_names_on_disk(tmp_path):
    """Experts are matrices of their own on disk, and one parameter in memory."""
    directory = pruned(tmp_path, "mixtral", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    expected = {name for name in zeros(model) if "router" not in name and ".gate.weight" not in name}
    assert {each.name for each in halve.keep_masks(model).masks.parameters} == expected


def test_a_recorded_matrix_that_is_all_zero_is_held(tmp_path):
    directory = pruned(tmp_path, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    assert "model.layers.0.mlp.up_proj.weight" in {each.name for each in halve.keep_masks(model).masks.parameters}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda: (decoder("llama"), {}),
            r"no matrix in the blocks of LlamaForCausalLM is pruned to 2:4, so there is no",
        ),
        (lambda: (pruned_decoder(), {"pattern": "1:4"}), "is pruned to 1:4"),
        (lambda: (pruned_decoder(), {"pattern": "2-4"}), "pattern '2-4' is not understood"),
        (lambda: (pruned_decoder(), {"record": "/nowhere"}), r"/nowhere has no halve\.json and no halve\.masks"),
        (lambda: (pruned_decoder().to("meta"), {}), "is on the meta device and has no zeros yet"),
    ],
)
def test_bad_input_is_told_in_a_sentence(spoil, message):
    model, options = spoil()
    with pytest.raises(InputError, match=message):
        halve.keep_masks(model, **options)


def test_only_the_first_process_having_weights_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match=r"call keep_masks after accelerator\.prepare"):
        halve.keep_masks(pruned_decoder())


def test_deepspeed_is_refused():
    model = pruned_decoder()
    next(model.parameters()).ds_id = 0
    with pytest.raises(InputError, match="DeepSpeed ZeRO-3"):
        halve.keep_masks(model)
