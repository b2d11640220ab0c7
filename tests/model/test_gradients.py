"""Gradients of single samples, against float64 passes that are differentiated one by one."""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, vmap

from gradient_oracles import double, next_token_loss, root_of_squares
from halve import memory
from halve.errors import CalibrationError, InputError
from halve.maths.pattern import Pattern
from halve.model.blocks import eager_experts
from halve.model.calls import Call
from halve.model.gradients import LossGradients, SquaredGradients, loss_of, one_by_one, output_gradients
from halve.model.reconstruct import Example, optimise_in_rounds
from halve.model.survey import plan_model
from models import bert, decoder, encoder_decoder, pairs, tokens, vit
from pruned_blocks import CPU, batches


def loss_roots(model, data, device=CPU, method="gblm"):
    samples = one_by_one(data)
    plan, _ = plan_model(model, samples, Pattern("2:4"))
    with eager_experts(model):
        return LossGradients(model, plan, samples, device, method).roots(torch.float32)


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, root in found.items():
        assert root.dtype == torch.float32
        assert float(expected[name].amax()) > 0.0
        error = (root.double() - expected[name]).abs().amax() / expected[name].amax()
        assert float(error) < 1e-3, name


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2", "mixtral"])
def test_the_gradients_of_the_loss_are_those_of_single_samples_in_float64(family):
    model, data = decoder(family), batches()
    found = loss_roots(model, data)
    rows = [row for batch in data for row in batch["input_ids"]]
    assert len(rows) == 8
    with eager_experts(model):
        expected = root_of_squares(double(model), list(found), rows, next_token_loss)
    assert_near(found, expected)


def test_the_gradients_of_the_loss_are_what_torch_func_makes_of_all_samples_at_once():
    model, data = decoder("llama", attn_implementation="eager"), batches()
    found = loss_roots(model, data)
    twin = double(model)
    fixed = {name: parameter.detach() for name, parameter in twin.named_parameters()}

    def loss(weights, row):
        logits = functional_call(twin, {**fixed, **weights}, kwargs={"input_ids": row[None]}).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], row[1:])

    rows = torch.cat([batch["input_ids"] for batch in data])
    each = vmap(grad(loss), in_dims=(None, 0))({name: fixed[name] for name in found}, rows)
    assert_near(found, {name: gradients.square().sum(0).sqrt() for name, gradients in each.items()})


def test_a_model_in_bfloat16_is_differentiated_in_float32_and_left_as_it_is():
    model = decoder("llama").to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = loss_roots(model, batches())
    rows = [row for batch in batches() for row in batch["input_ids"]]
    assert_near(found, root_of_squares(double(model), list(found), rows, next_token_loss))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])


def test_flags_and_gradients_of_the_caller_are_put_back():
    model = decoder("llama")
    expected = loss_roots(model, batches())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    model.model.embed_tokens.weight.requires_grad_(False)
    found = loss_roots(model, batches())
    for name, root in found.items():
        assert torch.equal(root, expected[name])
    assert all(bool((parameter.grad == 3.0).all()) for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_padding_counts_for_nothing():
    model = decoder("llama")
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    found = loss_roots(model, [{"input_ids": ids, "attention_mask": mask}])
    rows = [ids[0], ids[1, :8], ids[2]]
    assert_near(found, root_of_squares(double(model), list(found), rows, next_token_loss))


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_is_differentiated_by_what_its_decoder_says(family):
    model, batch = encoder_decoder(family), pairs(family)
    found = loss_roots(model, [batch])

    def value(twin, i):
        one = {key: each[i : i + 1] for key, each in batch.items()}
        one = {key: each.double() if each.is_floating_point() else each for key, each in one.items()}
        log_shares = twin(**one).logits[0].log_softmax(-1)
        ids = one["decoder_input_ids"][0]
        return -torch.stack([log_shares[t, ids[t + 1]] for t in range(len(ids) - 1)]).mean()

    assert_near(found, root_of_squares(double(model), list(found), range(4), value))


def test_labels_give_an_encoder_a_loss():
    model, ids = bert(), tokens(4)
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, ids, -100)
    found = loss_roots(model, [{"input_ids": ids, "labels": labels}])

    def value(twin, i):
        log_shares = twin(input_ids=ids[i : i + 1]).logits[0].log_softmax(-1)
        asked = [t for t in range(ids.shape[1]) if labels[i, t] >= 0]
        return -torch.stack([log_shares[t, labels[i, t]] for t in asked]).mean()

    assert_near(found, root_of_squares(double(model), list(found), range(4), value))


IMAGES = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (bert, batches(), "the logits of BertForMaskedLM depend on that token itself, as in an encoder: give batches"),
        (vit, [IMAGES], "calibration batch 0 has pixel_values for ViTForImageClassification: give batches with labels"),
        (lambda: decoder("llama").model, batches(), "LlamaModel gives no logits of its tokens"),
        (partial(decoder, "llama"), [{"input_ids": tokens(2, 1)}], "samples of two tokens or more"),
    ],
)
def test_what_gives_no_loss_is_refused(model, data, message):
    made = model()
    long = data if "pixel_values" in data[0] else batches()  # so that the plan is not what refuses
    plan, _ = plan_model(made, one_by_one(long), Pattern("2:4"))
    samples = one_by_one(data)
    with pytest.raises(InputError, match=message):
        LossGradients(made, plan, samples, CPU, "gblm")


def test_memory_is_asked_for_before_anything_is_run(monkeypatch):
    model, samples = decoder("llama"), one_by_one(batches())
    plan, _ = plan_model(model, samples, Pattern("2:4"))
    needed = 4 * plan.weights
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    with pytest.raises(InputError, match=r"the gradients that gblm weighs \(.* GB of sums, .* use wanda\+\+"):
        LossGradients(model, plan, samples, CPU, "gblm")
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * needed)
    LossGradients(model, plan, samples, CPU, "gblm")
    half = copy.deepcopy(model).to(torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    found = []
    monkeypatch.setattr("halve.model.gradients.check_memory", lambda _what, needed, *_: found.append(needed))
    for each in (model, half):
        LossGradients(each, plan, samples, CPU, "gblm")
    assert found[1] - found[0] == 4 * weights
    assert found[0] > needed


def test_what_a_sample_keeps_grows_with_its_tokens(monkeypatch):
    """The estimate, from a sample of 16 tokens, is close to what a pass over more of them keeps."""
    model = decoder("llama")
    found = []
    monkeypatch.setattr("halve.model.gradients.check_memory", lambda _what, needed, *_: found.append(needed))
    for length in (24, 96):
        samples = one_by_one([{"input_ids": tokens(1, length)}])
        plan, _ = plan_model(model, samples, Pattern("2:4"))
        LossGradients(model, plan, samples, CPU, "gblm")
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []  # so that no address is used again
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (held.append(tensor), pack(tensor))[1], lambda x: x):
        loss_of(model, samples[0])
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    true = sum(size for address, size in kept.items() if address not in own)
    estimated = (found[1] - found[0]) * 96 / 72
    assert 0.5 * true < estimated < 1.5 * true


def test_losses_and_gradients_that_are_not_finite_are_errors():
    model = decoder("llama")
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(CalibrationError, match="calibration sample 0 gives"):
        loss_roots(model, batches())
    layer = torch.nn.Linear(2, 2, bias=False)
    sums = SquaredGradients({"weight": layer.weight})
    sums.add(layer, iter([lambda: 1e30 * layer(torch.ones(1, 2)).sum()]))
    with pytest.raises(CalibrationError, match="the gradients of weight are not finite, or overflow float32"):
        sums.roots()


def test_batches_are_cut_into_samples():
    ids = tokens(3)
    samples = one_by_one([{"input_ids": ids[:2], "attention_mask": ids[:2] * 0 + 1}, {"input_ids": ids[2:]}])
    assert [torch.equal(sample["input_ids"], row[None]) for sample, row in zip(samples, ids, strict=True)] == [True] * 3
    assert samples[1].keys() == {"input_ids", "attention_mask"}
    whole = {"input_ids": ids[:1], "pixel_values": torch.zeros(7, 4)}
    assert one_by_one([whole])[0]["pixel_values"].shape == (7, 4)
    with pytest.raises(InputError, match=r"calibration batch 1 has tensors of \[2, 7\] rows"):
        one_by_one([whole, {"input_ids": ids[:2], "pixel_values": torch.zeros(7, 4)}])


@pytest.mark.parametrize("padded", [False, True])
def test_the_gradients_of_a_blocks_output_are_those_of_its_norm_in_the_whole_model(padded):
    model, ids = decoder("llama"), tokens(4)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, 20:] = 0
    block, seen = model.model.layers[1], []
    hook = block.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(input_ids=ids, attention_mask=mask if padded else None, use_cache=False)
    hook.remove()
    (args, kwargs), names = seen[0], ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"]

    def example(i):
        given = {k: v[i : i + 1] if isinstance(v, torch.Tensor) and len(v) == 4 else v for k, v in kwargs.items()}
        hidden = args[0][i : i + 1].detach()
        return Example(hidden, Call((), given), hidden, mask[i : i + 1].bool() if padded else None)

    found = output_gradients(block, names, example, 4, torch.float32)
    outputs = []

    def value(twin, i):
        outputs.clear()
        handle = twin.model.layers[1].register_forward_hook(lambda _m, _args, out: outputs.append(out))
        twin(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1] if padded else None)
        handle.remove()
        state = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
        return sum(entry**2 for entry in state[0, : 20 if padded else None].flatten()).sqrt()

    full = [f"model.layers.1.{name}" for name in names]
    expected = root_of_squares(double(model), full, range(4), value)
    assert_near(found, {name: expected[f"model.layers.1.{name}"] for name in names})


class Bent(torch.nn.Module):
    """A block of one matrix whose output is bent, so that its gradient depends on what it returns."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.linear.weight.data.copy_(0.3 * torch.randn(8, 8, generator=generator))

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


def test_rounds_prune_and_step_as_published():
    """The oracle: RMSprop written out, gradients of tanh by hand, in float64."""
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    block, pruned = Bent(), []
    dense = block.linear.weight.detach().double().clone()

    def prune():
        pruned.append(block.linear.weight.detach().clone())
        block.linear.weight.copy_(Pattern("2:4").project(block.linear.weight))

    def example(i):
        return Example(x[i : i + 1], Call((), {}), x[i : i + 1], None)

    settings = {"rounds": 3, "drawn": 4, "learning_rate": 1e-2, "precision": torch.float32}
    optimise_in_rounds(block, ["linear.weight"], prune, example, 6, **settings)
    weight, mean, order = dense.clone(), torch.zeros_like(dense), torch.Generator().manual_seed(0)
    for round_ in range(3):
        torch.testing.assert_close(pruned[round_].double(), weight, rtol=1e-4, atol=1e-6)
        weight = Pattern("2:4").project(weight)
        for i in torch.randperm(6, generator=order)[:4].tolist():
            inputs = x[i].double()
            ours, theirs = torch.tanh(inputs @ weight.T), torch.tanh(inputs @ dense.T)
            gradient = (2.0 * (ours - theirs) * (1.0 - ours**2)).T @ inputs
            mean = 0.99 * mean + 0.01 * gradient**2
            weight = weight - 1e-2 * gradient / (mean.sqrt() + 1e-8)
    torch.testing.assert_close(block.linear.weight.detach().double(), weight, rtol=1e-3, atol=1e-5)
    assert len(pruned) == 3
    assert bool((block.linear.weight != 0).all())  # nothing holds the mask between the rounds
