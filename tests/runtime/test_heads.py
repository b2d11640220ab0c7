import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import models
from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.runtime.accelerate import accelerate
from halve.runtime.compiled import quantised_instruction_sets
from halve.runtime.heads import IntegerHead
from halve.runtime.linear import SparseLinear
from packed_matrices import same_bits
from packed_models import prune_layers

pytestmark = pytest.mark.skipif(not quantised_instruction_sets(), reason="the compiled kernels are not built")


def pruned(family="llama"):
    return prune_layers(models.decoder(family))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(same_bits(value, other[name]) for name, value in one.items())


def head_of(model):
    return model.get_output_embeddings()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_a_head_in_integers_multiplies_few_rows_and_leaves_the_weight_alone(family, tmp_path):
    model = pruned(family)
    before, weight = state_of(model), head_of(model).weight
    with torch.no_grad():
        hidden = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        exact = hidden.double() @ weight.double().T
    done = accelerate(model, head="int8", only_where_faster=None)
    head = head_of(model)
    assert isinstance(head, IntegerHead)
    assert head.weight is weight
    assert done.head == "int8"
    assert "the head in int8" in str(done)
    with torch.no_grad():
        got = head(hidden)
        assert 1e-5 < float((got - exact).norm() / exact.norm()) < 0.02
        many = torch.randn(70, weight.shape[1])
        assert torch.equal(head(many), torch.nn.functional.linear(many, weight))
    assert same_state(state_of(model), before)
    model.save_pretrained(tmp_path)
    assert same_state(state_of(AutoModelForCausalLM.from_pretrained(tmp_path)), before)
    model.tie_weights()
    assert head_of(model).weight is weight


def test_a_head_in_integers_follows_its_weight():
    model = pruned()
    accelerate(model, head="int8", only_where_faster=None)
    head, x = head_of(model), torch.randn(1, 32)
    with torch.no_grad():
        before = head(x)
        head.weight.mul_(2)
        assert torch.allclose(head(x), 2 * before)
        head.weight.data = head.weight.data * 2
        assert torch.allclose(head(x), 4 * before)
        head.to(torch.bfloat16)
        assert torch.allclose(head(x.bfloat16()).float(), 4 * before, atol=0.1)
    x.requires_grad_(True)
    head(x.bfloat16()).sum().backward()
    assert torch.allclose(x.grad, head.weight.float().sum(0), rtol=0.02)


def test_a_head_that_cannot_multiply_in_integers_is_refused_before_anything_is_swapped():
    for model, head, reason in (
        (pruned(), "int4", "head is 'int4': give own or int8"),
        (pruned("phi"), "int8", "the output layer of this PhiForCausalLM has a bias"),
        (pruned().model, "int8", "has no plain linear output layer"),
    ):
        with pytest.raises(InputError, match=reason):
            accelerate(model, head=head, only_where_faster=None)
        assert not any(isinstance(layer, SparseLinear | IntegerHead) for layer in model.modules())


def test_a_pruned_head_is_no_head_in_integers():
    model = pruned()
    model.lm_head.weight.data = Pattern("2:4").project(model.lm_head.weight.data)
    with pytest.raises(InputError, match="is pruned and runs sparse"):
        accelerate(model, head="int8", only_where_faster=None)


def test_where_something_fails_the_head_is_put_back(monkeypatch):
    model = pruned()
    head = head_of(model)
    before = state_of(model)
    monkeypatch.setattr(IntegerHead, "forward", lambda _self, x: torch.zeros(*x.shape[:-1], head.out_features))
    with pytest.raises(HalveError, match="output differs from the dense one's"):
        accelerate(model, head="int8", only_where_faster=None)
    assert type(head_of(model)) is nn.Linear
    assert head_of(model).weight is head.weight
    assert same_state(state_of(model), before)
