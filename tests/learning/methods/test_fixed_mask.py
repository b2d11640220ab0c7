"""Training with a mask as it is: what is trained, what gradients clipping sees, and what is left on the model."""

import pytest
import torch

from halve.errors import InputError
from halve.learning.learner import Step
from halve.learning.methods.fixed_mask import FixedMaskLearner
from halve.learning.pruned_weights import find_pruned
from halve.maths.pattern import Pattern
from models import decoder, tokens


def pruned(**changes):
    model = decoder("llama", **changes)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            parameter.data = Pattern("2:4").project(parameter.data)
    return model


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ("all", lambda name: "embed" not in name and "lm_head" not in name),
        ("everything", lambda name: True),
        ("norms", lambda name: "norm" in name),
    ],
)
def test_what_is_asked_for_is_trained(train, wanted):
    model = pruned()
    found = FixedMaskLearner(find_pruned(model), train).attach(model)
    names = {name for name, parameter in model.named_parameters() if any(parameter is each for each in found)}
    assert names == {name for name, _ in model.named_parameters() if wanted(name)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names


def test_a_model_without_vectors_has_no_norms_to_train():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    model[0].weight.data = Pattern("2:4").project(model[0].weight.data)
    with pytest.raises(InputError, match="no norms and no biases"):
        FixedMaskLearner(find_pruned(model), "norms").attach(model)


def test_clipping_sees_the_gradients_of_kept_weights_alone():
    model = pruned()
    learner = FixedMaskLearner(find_pruned(model))
    found = learner.attach(model)
    model(tokens(), labels=tokens()).loss.backward()
    reference = pruned()
    reference(tokens(), labels=tokens()).loss.backward()
    wanted = 0.0
    for (name, parameter), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if parameter.requires_grad:
            mask = (parameter != 0) if "layers" in name and parameter.ndim == 2 else torch.ones_like(parameter)
            wanted += float((other.grad.double() * mask).square().sum())
    norm = torch.nn.utils.clip_grad_norm_(found, 1e9)
    assert float(norm) == pytest.approx(wanted**0.5, rel=1e-5)


def test_an_optimiser_that_moves_zeros_is_put_right_and_nothing_is_left_on_the_model():
    model = pruned()
    learner = FixedMaskLearner(find_pruned(model))
    optimiser = torch.optim.SGD(learner.attach(model), lr=0.1)
    weight = model.model.layers[0].mlp.up_proj.weight
    zeros = weight == 0
    weight.data += 1.0
    learner.after_update(Step(0, 1), optimiser)
    assert torch.equal(weight == 0, zeros)
    learner.finish()
    model(tokens(), labels=tokens()).loss.backward()
    assert bool(weight.grad[zeros].any())
