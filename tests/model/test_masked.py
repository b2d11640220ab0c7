"""Fixed masks, against masks that are applied by hand."""

import pytest
import torch
from torch import nn

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.masked import FixedMasks, PrunedParameter, pack_mask, pruned_parameters, unpack_mask

NAMES = {"0.weight": "out_in", "1.weight": "out_in"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 5), nn.Linear(8, 3, dtype=torch.bfloat16))
    with torch.no_grad():
        for layer in made:
            layer.weight.copy_(Pattern("2:4").project(layer.weight))
    return made


def fixed(model, masks=None):
    return FixedMasks(pruned_parameters(model, NAMES), masks)


def test_parameters_are_found_by_name(model):
    first, _ = pruned_parameters(model, NAMES)
    assert first.tensor is model[0].weight
    assert (first.name, first.leaf, first.owner) == ("0.weight", "weight", model[0])


def test_matrices_that_lie_the_other_way_round():
    parameter = PrunedParameter(name="weight", owner=nn.Linear(3, 2), leaf="weight", layout="in_out")
    assert parameter.inputs_last(parameter.tensor).shape == (3, 2)
    assert torch.equal(parameter.inputs_last(parameter.inputs_last(parameter.tensor)), parameter.tensor)


def test_weights_are_held_where_they_were_not_zero(model):
    masks, before = fixed(model), [layer.weight.detach().clone() for layer in model]
    with torch.no_grad():
        for layer in model:
            layer.weight.sub_(1.0)
    expected = [torch.where(b != 0, layer.weight, 0.0) for b, layer in zip(before, model, strict=True)]
    assert masks.broken() == {"0.weight": 30, "1.weight": 12}
    masks.hold()
    assert masks.broken() == {}
    for layer, weight in zip(model, expected, strict=True):
        assert torch.equal(layer.weight, weight)
        assert not bool(torch.signbit(layer.weight[layer.weight == 0]).any())


def test_the_mask_is_that_of_the_beginning(model):
    masks = fixed(model)
    with torch.no_grad():
        model[0].weight.zero_()
        masks.hold()
        model[0].weight.fill_(1.0)
    masks.hold()
    assert int(model[0].weight.sum()) == 30


def test_gradients_are_masked_and_may_be_absent(model):
    masks = fixed(model)
    model[0].weight.grad = torch.ones(5, 12)
    masks.mask_gradients()
    assert torch.equal(model[0].weight.grad, (model[0].weight.detach() != 0).float())
    assert model[1].weight.grad is None


@pytest.mark.parametrize(
    ("optimiser", "names"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), ["exp_avg", "exp_avg_sq"]),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
    ],
)
def test_moments_are_masked_and_factored_ones_left(model, optimiser, names):
    made = optimiser([model[0].weight])
    model[0].weight.grad = torch.ones(5, 12)
    pruned = model[0].weight.detach() == 0
    made.step()
    made.state[model[0].weight]["row"] = torch.ones(5)
    fixed(model, {"0.weight": ~pruned, "1.weight": torch.ones(3, 8)}).mask_moments(made)
    for name in names:
        moment = made.state[model[0].weight][name]
        assert torch.equal(moment == 0, pruned)
    assert torch.equal(made.state[model[0].weight]["row"], torch.ones(5))


def test_masks_are_saved_bit_by_bit(model):
    masks = fixed(model)
    state = masks.state_dict()
    assert {name: tuple(packed.shape) for name, packed in state.items()} == {"0.weight": (5, 2), "1.weight": (3, 1)}
    other = fixed(model, {"0.weight": torch.ones(5, 12), "1.weight": torch.ones(3, 8)})
    other.load_state_dict(state)
    for name, layer in zip(NAMES, model, strict=True):
        assert torch.equal(other.mask_for(name, layer.weight), layer.weight != 0)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 9), (2, 3, 16), (2, 0), (0, 8)])
def test_packed_masks_come_back(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpack_mask(packed, shape, "it"), mask)


def test_the_first_entry_is_the_lowest_bit():
    mask = torch.tensor([True, False, False, True, False, False, False, False, True])
    assert pack_mask(mask).tolist() == [9, 1]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0.weight": torch.ones(5, 12)}, r"there is no mask for 1\.weight"),
        (
            {"0.weight": torch.ones(12, 5), "1.weight": torch.ones(3, 8)},
            r"has shape \(5, 12\) now, and its mask \(12, 5\)",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(model, masks, message):
    with pytest.raises(InputError, match=message):
        fixed(model, masks)


def test_saved_masks_that_do_not_fit_are_refused(model):
    masks = fixed(model)
    state = masks.state_dict()
    with pytest.raises(InputError, match=r"other parameters: 0\.weight"):
        masks.load_state_dict({"1.weight": state["1.weight"]})
    with pytest.raises(InputError, match=r"is torch\.uint8 \(5, 3\), and should be uint8 \(5, 2\)"):
        masks.load_state_dict(state | {"0.weight": torch.zeros(5, 3, dtype=torch.uint8)})
    with pytest.raises(InputError, match=r"is torch\.int64 \(5, 2\)"):
        masks.load_state_dict(state | {"0.weight": state["0.weight"].long()})


def test_a_model_without_weights_is_refused(model):
    with pytest.raises(InputError, match=r"0\.weight is on the meta device"):
        fixed(model.to("meta"))


def test_a_mask_is_of_any_dtype_and_does_not_go_where_it_would_be_lost(model):
    masks = fixed(model)
    with pytest.raises(InputError, match=r"0\.weight is on the meta device"):
        masks.mask_for("0.weight", torch.empty(5, 12, device="meta"))
    model.double()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    masks.hold()
    assert masks.broken() == {}


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_a_mask_follows_its_parameter(model):
    masks = fixed(model)
    model.to(torch.accelerator.current_accelerator())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    masks.hold()
    assert masks.broken() == {}
