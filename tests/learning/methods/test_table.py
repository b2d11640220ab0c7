"""What holds for every method that learns masks."""

from dataclasses import is_dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch.utils.checkpoint import checkpoint

from halve.errors import InputError, PatternError, UnsupportedModelError
from halve.learning import methods
from halve.maths.pattern import Pattern
from learned import Mixed, attached, bits, diagonals, saved, targets, train

NAMES = list(methods.LEARNING_METHODS)
VARIANTS = [
    ("maskllm", {}),
    ("proxsparse", {}),
    ("proxsparse", {"keep": "trained", "lam": 0.5}),
    ("ast", {"every": 3}),
    ("cast", {"every": 3}),
    ("prox-admm", {}),
    ("prox-admm", {"fixed_from": 1.0, "metric": "adam"}),
    ("prox-admm", {"form": "admm", "every": 2, "fixed_from": 0.75}),
]


def made(name, model, pattern="2:4", prior=None, **options):
    row = methods.get(name)
    given = diagonals(model) if row.takes_diagonals else None
    return methods.make_learner(
        row, targets(model), pattern, methods.make_options(row, **options), prior=prior, diagonals=given
    )


def test_the_table_is_complete():
    assert NAMES == ["maskllm", "proxsparse", "ast", "cast", "prox-admm"]
    for name, row in methods.LEARNING_METHODS.items():
        assert row.name == name
        assert is_dataclass(row.options)
        assert row.options.__dataclass_params__.frozen


def test_unknown_names_and_options_are_refused_with_a_suggestion():
    with pytest.raises(InputError, match="did you mean 'maskllm'"):
        methods.get("masklm")
    with pytest.raises(InputError, match="learning method ast has no option 'lam'"):
        methods.make_options("ast", lam=1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("maskllm", {"init_std": 0.0}),
        ("maskllm", {"keep_large": -1.0}),
        ("maskllm", {"seed": -1}),
        ("proxsparse", {"lam": 0.0}),
        ("proxsparse", {"keep": "both"}),
        ("ast", {"decay": float("nan")}),
        ("ast", {"ramp": 1.5}),
        ("ast", {"every": 0}),
        ("ast", {"metric": "adam"}),
        ("cast", {"lam": 0.0}),
        ("cast", {"every": 2.5}),
        ("prox-admm", {"form": "dual"}),
        ("prox-admm", {"metric": "hessian"}),
        ("prox-admm", {"lambda_end": 1e-9}),
        ("prox-admm", {"fixed_from": 1.1}),
        ("prox-admm", {"revive": 2.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(InputError, match=rf"{next(iter(options))} of {name}"):
        methods.make_options(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name):
    model = Mixed()
    with pytest.raises(PatternError, match="50%"):
        made(name, model, "50%")
    with pytest.raises(PatternError, match=r"3:6 does not fit first\.weight"):
        made(name, model, "3:6")
    with pytest.raises(InputError, match="no matrix"):
        methods.make_learner(name, [], "2:4")


def test_one_parameter_given_twice_is_refused():
    model = Mixed()
    with pytest.raises(InputError, match=r"first\.weight and first\.weight are one parameter"):
        methods.make_learner("ast", [*targets(model), *targets(model)], "2:4")
    model.other = model.first
    layouts = {"first.weight": "out_in", "other.weight": "out_in"}
    with pytest.raises(InputError, match=r"first\.weight and other\.weight are one parameter"):
        methods.make_learner("ast", targets(model, layouts), "2:4")


@pytest.mark.parametrize("name", [name for name, row in methods.LEARNING_METHODS.items() if not row.takes_prior])
def test_a_prior_is_refused_by_a_method_that_could_not_use_it(name):
    model = Mixed()
    with pytest.raises(InputError, match=f"method {name} takes no prior"):
        made(name, model, prior=dict(model.named_parameters()))


@pytest.mark.parametrize("name", [name for name, row in methods.LEARNING_METHODS.items() if row.takes_prior])
def test_a_prior_of_another_model_or_pattern_is_refused(name):
    model = Mixed()
    prior = {key: each.detach().clone() for key, each in model.named_parameters()}
    with pytest.raises(InputError, match=r"not 2:4 in first\.weight"):
        made(name, model, prior=prior)
    with pytest.raises(InputError, match=r"first\.weight has shape \(32, 16\), and the prior does not have it"):
        made(name, model, prior={})
    with pytest.raises(InputError, match=r"has it with shape \(32, 8\)"):
        made(name, model, prior={**prior, "first.weight": prior["first.weight"][:, :8]})


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_the_end_is_the_pattern_with_nothing_attached(name, options, pattern):
    model = Mixed()
    before, kinds = dict(model.named_parameters()), {key: type(each) for key, each in model.named_modules()}
    dense = bits(model)
    learner = made(name, model, pattern, **options)
    optimiser = attached(learner, model)
    train(model, learner, optimiser, 5)
    learner.finish()
    assert {key: type(each) for key, each in model.named_modules()} == kinds
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[key] is each for key, each in model.named_parameters())
    masks = learner.masks()
    for target in targets(model):
        weight, mask = target.inputs_last(target.tensor), target.inputs_last(masks[target.name])
        assert Pattern(pattern).satisfied_by(weight)
        assert bool((Pattern(pattern).groups(mask).sum(-1) == Pattern(pattern).keep).all())
        assert not bool(weight[~mask].any() | weight[~mask].signbit().any())
    for name_of_other in ("embedding.weight", "head.weight"):
        assert torch.equal(bits(model)[name_of_other], dense[name_of_other])


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_ended_is_what_finish_leaves_and_is_put_back(name, options):
    model = Mixed()
    learner = made(name, model, **options)
    optimiser = attached(learner, model)
    tokens = torch.arange(8)[None]
    train(model, learner, optimiser, 8, last=3)
    before = bits(model)
    with learner.ended(), torch.no_grad():
        ended = model(tokens)
        assert all(Pattern("2:4").satisfied_by(each.inputs_last(each.tensor)) for each in targets(model))
    assert bits(model).keys() == before.keys()
    assert all(torch.equal(each, before[key]) for key, each in bits(model).items())
    train(model, learner, optimiser, 8, first=3, last=4)  # gradients still reach what is trained
    assert any(not torch.equal(each, before[key]) for key, each in bits(model).items())
    with learner.ended(), torch.no_grad():
        ended = model(tokens)
    learner.finish()
    with torch.no_grad():
        assert torch.equal(model(tokens), ended)


def test_ended_puts_back_after_an_error():
    model = Mixed()
    learner = made("ast", model)
    attached(learner, model)
    before, tokens = bits(model), torch.arange(8)[None]
    with torch.no_grad():
        masked = model(tokens)
    with pytest.raises(ZeroDivisionError), learner.ended():
        raise ZeroDivisionError
    assert all(torch.equal(each, before[key]) for key, each in bits(model).items())
    with torch.no_grad():
        assert torch.equal(model(tokens), masked)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_resumed_training_ends_with_the_same_bits(name, options):
    whole = Mixed()
    learner = made(name, whole, **options)
    train(whole, learner, attached(learner, whole), 8)
    learner.finish()

    half = Mixed()
    learner = made(name, half, **options)
    optimiser = attached(learner, half)
    train(half, learner, optimiser, 8, last=4)
    parameters, moments, state = saved(half, learner, optimiser)
    state = load(save(state))

    fresh = Mixed(seed=5)  # other weights: what the saved parameters do not say must be in the learner's state
    learner = made(name, fresh, **options)
    optimiser = attached(learner, fresh)
    fresh.load_state_dict(parameters)
    optimiser.load_state_dict(moments)
    learner.load_state(state)
    train(fresh, learner, optimiser, 8, first=4)
    learner.finish()
    assert all(torch.equal(each, bits(whole)[key]) for key, each in bits(fresh).items())


class Recomputed(Mixed):
    def forward(self, tokens):
        return checkpoint(super().forward, tokens, use_reentrant=False)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradient_checkpointing_changes_no_bit(name, options):
    results = []
    for kind in (Mixed, Recomputed):
        model = kind()
        learner = made(name, model, **options)
        train(model, learner, attached(learner, model), 4)
        learner.finish()
        results.append(bits(model))
    assert all(torch.equal(each, results[1][key]) for key, each in results[0].items())


@pytest.mark.parametrize("name", ["maskllm", "ast", "cast"])
def test_masks_are_mixed_in_full_precision_under_autocast(name):
    model = Mixed()
    learner = made(name, model)
    learner.attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        effective = [each.tensor for each in targets(model)]
    for mixed, target in zip(effective, targets(model), strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, target.tensor)


@pytest.mark.parametrize("name", ["maskllm", "ast", "cast"])
def test_a_parameter_that_two_modules_hold_is_refused(name):
    model = Mixed()
    model.other = torch.nn.Linear(16, 32)
    model.other.weight = model.first.weight
    with pytest.raises(UnsupportedModelError, match=r"first\.weight, other\.weight are one parameter"):
        made(name, model).attach(model)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_what_is_returned_wants_a_gradient(name):
    model = Mixed()
    trained = made(name, model).attach(model)
    assert {id(each) for each in model.parameters() if each.requires_grad} == {id(each) for each in trained}
    assert not model.embedding.weight.requires_grad
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_finite_numbers_before_and_after(name):
    model = Mixed()
    learner = made(name, model)
    optimiser = attached(learner, model)
    train(model, learner, optimiser, 2)
    facts = learner.facts()
    assert facts
    assert all(torch.tensor(each).isfinite() for each in facts.values())


def test_targets_without_second_moments_are_named():
    model = Mixed()
    assert made("ast", model).by_magnitude == ("experts",)
    assert made("ast", model, metric="magnitude").by_magnitude == tuple(each.name for each in targets(model))
    assert made("prox-admm", model).by_magnitude == ("experts",)
    assert made("prox-admm", model, metric="adam").by_magnitude == ()


@pytest.mark.parametrize("name", ["ast", "prox-admm"])
def test_second_moments_that_do_not_fit_are_refused(name):
    model = Mixed()
    for wrong, message in ((torch.ones(3), r"\(3,\), not \(16,\)"), (torch.full((16,), -1.0), "at least 0")):
        with pytest.raises(InputError, match=message):
            methods.make_learner(name, targets(model), "2:4", diagonals={"first.weight": wrong})
