import pytest
import torch

from halve.errors import CalibrationError, InputError
from halve.learning.moments import NO_INPUT, NOT_LINEAR, input_moments
from halve.model.layers import EXPERTS_IN_ONE
from learned import Mixed, batches, targets


def given(tokens, mask=None):
    return {"tokens": tokens} if mask is None else {"tokens": tokens, "attention_mask": mask}


class Masked(Mixed):
    """Takes a mask, as models of transformers do."""

    def forward(self, tokens, attention_mask=None):
        return super().forward(tokens)


def by_hand(model, samples):
    """Mean squares in float64, one position after the other; what enters `first` is the embedding of a token."""
    inputs = [model.embedding.weight[token].detach() for sample in samples for token in sample]
    hidden = [torch.tanh(model.norm(model.first(each))).detach() for each in inputs]
    return {
        "first.weight": sum(each.double() ** 2 for each in inputs) / len(inputs),
        "second.weight": sum(each.double() ** 2 for each in hidden) / len(hidden),
    }


def test_mean_squares_of_all_positions():
    model, data = Mixed(), batches(3)
    found = input_moments(model, targets(model), [given(each) for each in data])
    expected = by_hand(model, [sample.tolist() for each in data for sample in each])
    assert found.diagonals.keys() == expected.keys()
    for name, diagonal in expected.items():
        assert torch.allclose(found.diagonals[name].double(), diagonal, rtol=1e-5)
        assert found.tokens[name] == 3 * 4 * 6
    assert found.without == {"experts": EXPERTS_IN_ONE}


def test_padding_does_not_count():
    model, tokens = Masked(), batches(1)[0]
    mask = torch.ones_like(tokens)
    mask[0, 2:] = mask[3, :1] = 0
    found = input_moments(model, targets(model), [given(tokens, mask)])
    kept = [[t for t, m in zip(a, b, strict=True) if m] for a, b in zip(tokens.tolist(), mask.tolist(), strict=True)]
    for name, diagonal in by_hand(model, kept).items():
        assert torch.allclose(found.diagonals[name].double(), diagonal, rtol=1e-5)
        assert found.tokens[name] == int(mask.sum())


class Flattened(Masked):
    """Its layers see all tokens in one row, as the experts of a mixture do."""

    def forward(self, tokens, attention_mask=None):
        return super().forward(tokens.flatten())


def test_padding_does_not_count_in_inputs_that_are_flattened():
    model, tokens = Flattened(), batches(1)[0]
    mask = torch.ones_like(tokens)
    mask[0, 2:] = 0
    found = input_moments(model, targets(model), [given(tokens, mask)])
    kept = [[t for t, m in zip(a, b, strict=True) if m] for a, b in zip(tokens.tolist(), mask.tolist(), strict=True)]
    for name, diagonal in by_hand(model, kept).items():
        assert torch.allclose(found.diagonals[name].double(), diagonal, rtol=1e-5)


def test_nothing_about_the_model_changes():
    model = Mixed().train()
    hooks = len(model.first._forward_pre_hooks)
    input_moments(model, targets(model), [given(batches(1)[0])])
    assert model.training
    assert len(model.first._forward_pre_hooks) == hooks


def test_layers_without_input_or_of_no_linear_kind_say_why():
    model = Mixed()
    model.idle = torch.nn.Linear(16, 8)
    layouts = {"idle.weight": "out_in", "embedding.weight": "out_in", "first.weight": "out_in"}
    found = input_moments(model, targets(model, layouts), [given(batches(1)[0])])
    assert found.without == {"idle.weight": NO_INPUT, "embedding.weight": NOT_LINEAR}
    assert list(found.diagonals) == ["first.weight"]


def test_zero_inputs_count_as_none():
    model = Mixed()
    with torch.no_grad():
        model.embedding.weight.zero_()
    found = input_moments(model, targets(model), [given(batches(1)[0])])
    assert found.without["first.weight"] == NO_INPUT


def test_no_text_and_inputs_that_are_not_finite_are_refused():
    model = Mixed()
    with pytest.raises(InputError, match="at least one batch"):
        input_moments(model, targets(model), [])
    with torch.no_grad():
        model.embedding.weight[3, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"first\.weight are not finite"):
        input_moments(model, targets(model), [given(torch.full((1, 2), 3))])
