from dataclasses import fields, is_dataclass, replace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import CalibrationError, InputError
from halve.maths.gram import Gradient, Statistics
from halve.maths.pattern import Pattern
from halve.solve import methods
from halve.solve.outcome import Status

NAMES = list(methods.METHODS)
WITH_STATISTICS = [name for name in NAMES if methods.METHODS[name].needs_statistics]
PATTERNS = [
    (name, pattern)
    for name in NAMES
    for pattern in ("2:4", "1:4", "4:8", "50%", "37.5%")
    if methods.METHODS[name].unstructured or ":" in pattern
]


def gradient(weight, gram):
    """Gradients as a layer has them: larger where its inputs are."""
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(9))
    scales = gram.diagonal().double().sqrt().float() if bool(gram.any()) else 1.0
    return Gradient(0.01 * (1.0 + noise) * scales, 4)


def solve(name, weight, gram, pattern="2:4", tokens=100, tuned=None, **options):
    row = methods.get(name)
    if name == "prox-gradient":
        options.setdefault("beta", 1.1)
    taken = None if row.gradient is None else replace(gradient(weight, gram), tuned=tuned)
    stats = Statistics(gram, tokens, gradient=taken)
    return row.solve(weight, stats, Pattern(pattern), methods.make_options(row, **options))


def test_the_table_is_complete():
    assert NAMES == [
        "auto",
        "magnitude",
        "wanda",
        "ria",
        "gblm",
        "pruner-zero",
        "wanda++",
        "sparse-swaps",
        "sparsegpt",
        "alps",
        "prox-gradient",
        "prox-admm",
    ]
    for name, row in methods.METHODS.items():
        assert row.name == name
        assert is_dataclass(row.options)
        assert row.summary
        assert "arXiv" in row.reference
        assert methods.get(name) is row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_contract_dtype_pattern_and_input_untouched(name, dtype):
    weight, gram = oracle.layer(8, 32, seed=0)
    weight = weight.to(dtype)
    before = weight.clone()
    outcome = solve(name, weight, gram)
    assert outcome.status is Status.OK
    assert outcome.method == ("prox-admm" if name == "auto" else name)
    assert outcome.weight.dtype == dtype
    assert outcome.weight.shape == weight.shape
    assert outcome.weight.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert ((outcome.weight.view(8, 8, 4) != 0).sum(-1) == 2).all()


@pytest.mark.parametrize(("name", "pattern"), PATTERNS)
def test_contract_every_pattern_and_positive_zeros(name, pattern):
    slow = name.startswith("prox")  # the proximal operator is fast for 2:4 and 1:M only
    weight, gram = oracle.layer(2 if slow else 6, 48, seed=1)
    options = {"prox-gradient": {"beta": 2.0}, "prox-admm": {"lambda_growth": 1.5}}.get(name, {})
    pruned = solve(name, weight, gram, pattern, **options).weight
    assert bool(torch.isfinite(pruned).all())
    assert not bool(torch.signbit(pruned[pruned == 0]).any())
    zeros = (pruned == 0).sum(-1)
    if ":" in pattern:
        keep, group = (int(part) for part in pattern.split(":"))
        assert bool(((pruned.view(len(pruned), -1, group) != 0).sum(-1) <= keep).all())
    else:
        assert zeros.tolist() == [int(48 * float(pattern[:-1]) / 100)] * len(pruned)


@pytest.mark.parametrize("name", NAMES)
def test_contract_updates_weights_is_true(name):
    weight, gram = oracle.layer(8, 32, seed=2)
    tuned = 1.01 * weight if name == "wanda++" else None  # as the rounds in a block may leave them
    pruned = solve(name, weight, gram, tuned=tuned).weight
    kept = pruned != 0
    assert methods.get(name).updates_weights == (not torch.equal(pruned[kept], weight[kept]))


@pytest.mark.parametrize("name", [name for name in WITH_STATISTICS if name != "pruner-zero"])
def test_contract_zero_gram_is_refused(name):
    with pytest.raises(CalibrationError, match="Gram matrix is zero"):
        solve(name, torch.ones(2, 8), torch.zeros(8, 8))


@pytest.mark.parametrize("name", [name for name in NAMES if methods.METHODS[name].gradient is not None])
def test_contract_zero_or_missing_gradient_is_refused(name):
    weight, gram = oracle.layer(2, 8, seed=0)
    row = methods.get(name)
    for taken, error, message in (
        (Gradient(torch.zeros(2, 8), 4), CalibrationError, "gradients are zero"),
        (None, InputError, "statistics have no gradient"),
    ):
        with pytest.raises(error, match=message):
            row.solve(weight, Statistics(gram, 9, gradient=taken), Pattern("2:4"), methods.make_options(row))


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_contract_scale_of_the_gram_does_not_matter(name, factor):
    weight, gram = oracle.layer(8, 32, seed=3)
    expected, pruned = solve(name, weight, gram).weight, solve(name, weight, gram * factor).weight
    assert torch.equal(pruned != 0, expected != 0)
    assert torch.allclose(pruned, expected, atol=1e-4)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_contract_dead_features_lose_but_keep_their_weights(name):
    weight, gram = oracle.layer(8, 32, seed=4)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 5, 8, 9, 10, 12, 13, 14, 15]] = True
    gram[dead], gram[:, dead] = 0.0, 0.0
    weight[:, dead] *= 100
    pruned = solve(name, weight, gram).weight
    alive = (pruned != 0).float().mean(0)
    assert alive[[0, 5]].tolist() == [0.0, 0.0]
    if name == "sparse-swaps":  # it may drop a live weight where that alone lowers the loss
        return
    assert alive[11] == 1.0
    for start in (8, 12):
        group, magnitudes = pruned[:, start : start + 4], weight[:, start : start + 4].abs()
        among_dead = magnitudes[:, : 3 if start == 8 else 4]
        assert torch.equal(group.abs().amax(-1), among_dead.amax(-1))
    kept_dead = dead & (pruned != 0)
    assert torch.equal(pruned[kept_dead], weight[kept_dead])
    assert bool((kept_dead[:, 12:].sum(-1) == 2).all())


@pytest.mark.parametrize("name", NAMES)
def test_contract_awkward_weights(name):
    _, gram = oracle.layer(4, 32, seed=5)
    equal = solve(name, torch.full((4, 32), 0.5), gram).weight
    assert bool(((equal.view(4, 8, 4) != 0).sum(-1) <= 2).all())
    assert bool(torch.isfinite(equal).all())
    zero = solve(name, -torch.zeros(4, 32), gram).weight
    assert not bool(zero.any())
    assert not bool(torch.signbit(zero).any())
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 8:12] = 0.0
    some = solve(name, weight, gram).weight
    assert bool(((some.view(4, 8, 4) != 0).sum(-1) <= 2).all())
    assert bool(torch.isfinite(some).all())


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_contract_one_token(name):
    weight, gram = oracle.layer(8, 32, seed=6, tokens=1)
    outcome = solve(name, weight, gram, tokens=1)
    assert bool(torch.isfinite(outcome.weight).all())
    assert bool(((outcome.weight.view(8, 8, 4) != 0).sum(-1) <= 2).all())
    magnitude = solve("magnitude", weight, gram).weight
    assert oracle.relative_loss(outcome.weight, weight, gram) < oracle.relative_loss(magnitude, weight, gram)


def test_diagonal_gram_makes_every_data_driven_mask_wanda():
    weight, gram = oracle.layer(8, 32, seed=7)
    gram = torch.diag(gram.diagonal())
    wanda = solve("wanda", weight, gram).weight
    assert torch.equal(solve("prox-gradient", weight, gram, beta=1.05).weight != 0, wanda != 0)
    assert torch.equal(solve("sparsegpt", weight, gram, damping=1e-6).weight != 0, wanda != 0)


def test_order_of_the_methods_on_correlated_inputs():
    weight, gram = oracle.layer(32, 96, seed=8)
    losses = {name: oracle.relative_loss(solve(name, weight, gram).weight, weight, gram) for name in NAMES}
    assert losses["prox-gradient"] < losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]
    assert losses["sparse-swaps"] < losses["wanda"]
    assert losses["auto"] == losses["prox-admm"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("wandaa", "did you mean 'wanda'"), ("sparse-gpt", "did you mean 'sparsegpt'"), ("xyz", "choose")],
)
def test_unknown_method_is_refused(name, hint):
    with pytest.raises(InputError, match=rf"unknown method '{name}': .*{hint}.*auto, magnitude, wanda"):
        methods.get(name)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(InputError, match="sparsegpt has no option 'dampening': its options are damping, block_size"):
        methods.make_options("sparsegpt", dampening=1)
    with pytest.raises(InputError, match="method wanda has no option 'beta': it takes none"):
        methods.make_options("wanda", beta=1.01)


def test_options_are_frozen_and_defaults_are_those_documented():
    options = methods.make_options("prox-gradient")
    assert (options.lambda0, options.beta) == (0.01, 1.01)
    assert (methods.make_options("sparsegpt").damping, methods.make_options("sparsegpt").block_size) == (0.01, 128)
    for name in NAMES:
        made = methods.make_options(name)
        for field in fields(made):
            with pytest.raises(AttributeError):
                setattr(made, field.name, 1)
