"""prox-admm against loops of its own, with the operator judged by brute force."""

import pytest
import torch

import oracles
from halve.errors import InputError
from halve.learning.learner import Step
from halve.learning.methods.prox_admm import ProxADMM, ProxADMMOptions
from halve.maths.pattern import Pattern
from learned import Mixed, attached, batches, diagonals, kept_by_hand, rate_at, targets, train


def learner_of(model, prior=None, moments=None, **options):
    return ProxADMM(targets(model), Pattern("2:4"), ProxADMMOptions(**options), prior=prior, diagonals=moments)


def projected(model):
    pruned = {}
    for each in targets(model):
        weight = each.inputs_last(each.tensor.detach())
        mask = kept_by_hand(weight.abs().flatten(0, -2), 2, 4).reshape(weight.shape)
        pruned[each.name] = each.inputs_last(torch.where(mask, weight, 0.0))
    return pruned


def best_objective(groups, lam):
    strengths = torch.full((len(groups),), lam, dtype=torch.float64)
    best, _ = oracles.brute_force_prox(groups.abs(), strengths, 2, levels=7)
    return oracles.prox_objective(best, groups.abs(), lam, 2)


def one_step(model, learner, optimiser, number, total):
    step, tokens = Step(number, total), batches(1)[0]
    learner.begin_step(step)
    optimiser.zero_grad()
    model(tokens).square().mean().backward()
    learner.before_update(step)
    optimiser.step()
    moved = {each.name: each.inputs_last(each.tensor.detach().clone()) for each in targets(model)}
    learner.after_update(step, optimiser)
    return moved


@pytest.mark.parametrize("metric", ["inputs", "magnitude", "adam"])
def test_the_operator_acts_on_weights_scaled_by_the_metric_to_mean_one(metric):
    model, dense = Mixed(torch.float64), Mixed(torch.float64)
    moments = diagonals(model)
    learner = learner_of(model, moments=moments, metric=metric, lambda_start=0.1, lambda_end=0.4, fixed_from=1.0)
    optimiser = attached(learner, model)
    moved = one_step(model, learner, optimiser, 1, 4)
    lam = 0.1 * 4**0.5  # two of four steps
    assert learner.facts()["lambda"] == pytest.approx(lam)
    changed = 0
    for target in targets(model):
        at_start = target.inputs_last(dense.get_parameter(target.name).detach()).abs()
        if metric == "adam":
            squares = optimiser.state[target.tensor]["exp_avg_sq"]
            scale = target.inputs_last(torch.maximum(squares, 1e-4 * squares.mean()).sqrt())
            scale = scale / (scale * moved[target.name].abs()).mean()
        else:
            root = moments[target.name].double().sqrt() if metric == "inputs" and target.name in moments else 1.0
            scale = torch.ones_like(at_start) * root / (at_start * root).mean()
        wanted = (moved[target.name] * scale).reshape(-1, 4)
        found = (target.inputs_last(target.tensor.detach()) * scale).reshape(-1, 4)
        assert bool((oracles.prox_objective(found, wanted, lam, 2) <= best_objective(wanted, lam) + 1e-6).all())
        changed += int((found != wanted).sum())
    assert changed > 100


def test_admm_by_hand():
    """Adam on the loss plus half rho times the squared distance; copies and duals every other step."""
    total, rho, rate = 6, 0.05, 0.02
    model = Mixed(torch.float64)
    learner = learner_of(
        model, form="admm", metric="magnitude", every=2, rho=rho, lambda_start=0.2, lambda_end=2.0, fixed_from=1.0
    )
    optimiser = attached(learner, model, rate)
    found = []
    train(
        model, learner, optimiser, total, last=5, rate=rate,
        watch=lambda _: found.append({name: each.clone() for name, each in learner.state().items()}),
    )  # fmt: skip
    plain, teacher, data = Mixed(torch.float64), Mixed(torch.float64, seed=7), batches(total)
    names = [each.name for each in targets(plain)]
    lies = {each.name: each.inputs_last for each in targets(plain)}
    others = [name for name, each in plain.named_parameters() if each.ndim <= 1]
    parameters = {name: plain.get_parameter(name) for name in [*names, *others]}
    copies = {name: parameters[name].detach().clone() for name in names}
    duals = {name: torch.zeros_like(copies[name]) for name in names}
    sizes = {name: float(parameters[name].detach().abs().mean()) for name in names}
    adam = torch.optim.Adam(parameters.values(), lr=rate, betas=(0.9, 0.95))
    for number in range(5):
        loss = (plain(data[number]) - teacher(data[number]).detach()).square().mean()
        for name in names:
            loss = loss + rho / 2 * (parameters[name] - copies[name] + duals[name]).square().sum()
        for group in adam.param_groups:
            group["lr"] = rate_at(Step(number, total), rate)
        plain.zero_grad()
        loss.backward()
        adam.step()
        if number % 2 == 0:
            continue
        lam = 0.2 * 10 ** ((number + 1) / total)
        for name in names:
            wanted = parameters[name].detach() + duals[name]
            copy = found[number][f"copy.{name}"]
            groups = lies[name](wanted / sizes[name]).reshape(-1, 4)
            ours = lies[name](copy / sizes[name]).reshape(-1, 4)
            assert bool((oracles.prox_objective(ours, groups, lam, 2) <= best_objective(groups, lam) + 1e-6).all())
            assert torch.allclose(found[number][f"dual.{name}"], wanted - copy, rtol=1e-5, atol=1e-9)
            copies[name], duals[name] = copy, found[number][f"dual.{name}"]
    for name, parameter in parameters.items():
        assert torch.allclose(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("form", ["proximal", "admm"])
def test_a_fixed_mask_stays_and_pruned_weights_do_not_move_on(form):
    """Their first moments are masked with them: otherwise the optimiser would go on moving them."""
    model = Mixed()
    learner = learner_of(model, form=form, every=1, metric="magnitude", fixed_from=0.5)
    optimiser = attached(learner, model, 0.01)
    seen = []

    def watch(step):
        if step.number >= 3:
            masks = learner.choose()
            seen.append(masks)
            for target in targets(model):
                assert not bool(target.tensor[~masks[target.name]].any())
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert not bool(optimiser.state[target.tensor][moment][~masks[target.name]].any())

    train(model, learner, optimiser, 8, watch=watch)
    assert len(seen) == 5
    assert all(torch.equal(each[name], seen[0][name]) for each in seen for name in each)


def test_pruned_weights_would_move_on_if_their_moments_were_not_masked():
    """The negative control of the test above: Adam moves a weight without a gradient."""
    weight = torch.nn.Parameter(torch.ones(4))
    adam = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.ones(4)
    adam.step()
    weight.grad = torch.zeros(4)
    with torch.no_grad():
        weight.zero_()
    adam.step()
    assert bool(weight.any())


def test_it_begins_from_a_prior_with_a_share_of_the_dense_weights_beside():
    dense = Mixed()
    prior = {name: each * 1.5 for name, each in projected(dense).items()}
    for revive in (0.0, 0.25):
        model = Mixed()
        learner_of(model, prior=prior, revive=revive).attach(model)
        for target in targets(model):
            kept, before = prior[target.name] != 0, dense.get_parameter(target.name)
            assert torch.equal(target.tensor[kept], prior[target.name][kept])
            assert torch.allclose(target.tensor[~kept], revive * before[~kept])


def test_from_a_prior_the_mask_can_still_change():
    model = Mixed()
    prior = projected(model)
    learner = learner_of(model, prior=prior, metric="magnitude", lambda_start=1e-4)
    train(model, learner, attached(learner, model, 0.05), 30, rate=0.05)
    changed = sum(int((mask != (prior[name] != 0)).sum()) for name, mask in learner.masks().items())
    assert changed > 10


def test_the_metric_of_adam_needs_adam():
    model = Mixed()
    learner = learner_of(model, metric="adam")
    plain = torch.optim.SGD(list(learner.attach(model)), lr=0.01)
    with pytest.raises(InputError, match=r"needs Adam's second moments, and the optimiser has none of first\.weight"):
        one_step(model, learner, plain, 0, 4)
