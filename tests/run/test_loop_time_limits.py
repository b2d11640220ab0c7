from dataclasses import replace

import pytest

from halve.run import bundles as bundles_module
from halve.run.loop import prune_blocks
from halve.solve.matrix import prune_weight
from models import decoder
from pruned_blocks import CPU, assert_pruned, batches, settings


def record_limits(monkeypatch, takes):
    """Let `prune_weights` note its time limit and the matrices, and claim to have taken a share of that time."""
    limits = []

    def solve(weights, gram, *arguments, time_limit, **more):
        limits.append((time_limit, [tuple(weight.shape) for weight in weights]))
        real = [prune_weight(weight, None, "2:4", "magnitude", "none") for weight in weights]
        return [replace(each, facts={"seconds": takes * time_limit / len(weights)}) for each in real]

    monkeypatch.setattr(bundles_module, "prune_weights", solve)
    return limits


def operations(shapes):
    return sum(d_in**2 * (60 * d_out + 15 * d_in) for d_out, d_in in shapes)


def test_a_time_limit_is_shared_out_by_operations_and_never_exceeded(monkeypatch):
    limits = record_limits(monkeypatch, takes=1.0)
    prune_blocks(decoder("llama"), batches(), settings("auto", "cg", options={"time_limit": 60.0}), device=CPU)
    assert len(limits) == 12  # qkv, o, gate and up, down of each block
    assert all(limit > 0.0 for limit, _ in limits)
    assert sum(limit for limit, _ in limits) == pytest.approx(60.0)
    whole = sum(operations(shapes) for _, shapes in limits)
    for limit, shapes in limits:
        assert limit == pytest.approx(60.0 * operations(shapes) / whole)


@pytest.mark.parametrize(("takes", "last"), [(0.5, None), (0.0, 60.0), (100.0, None)])
def test_time_not_used_is_left_to_the_others_and_time_overdrawn_taken_from_them(monkeypatch, takes, last):
    limits = record_limits(monkeypatch, takes)
    prune_blocks(decoder("llama"), batches(), settings("auto", "cg", options={"time_limit": 60.0}), device=CPU)
    spent, ahead = 0.0, sum(operations(shapes) for _, shapes in limits)
    for limit, shapes in limits:
        assert 0.0 < limit <= 60.0
        assert limit == pytest.approx(max(1e-3, 60.0 - spent) * operations(shapes) / ahead)
        spent, ahead = spent + takes * limit, ahead - operations(shapes)
    if last is not None:
        assert limits[-1][0] == pytest.approx(last)


def test_without_a_time_limit_none_is_passed_on(monkeypatch):
    seen = []

    def note(weights, *arguments, **more):
        seen.append("time_limit" in more)
        return [prune_weight(weight, None, "2:4", "magnitude", "none") for weight in weights]

    monkeypatch.setattr(bundles_module, "prune_weights", note)
    prune_blocks(decoder("llama"), batches(), settings("auto", "cg"), device=CPU)
    assert seen == [False] * 12


@pytest.mark.parametrize("limit", [1e-9, 1000.0])
def test_a_model_is_pruned_within_a_time_limit(limit):
    model = decoder("llama")
    asked = settings("auto", "cg", options={"effort": "fast", "time_limit": limit})
    report = prune_blocks(model, batches(), asked, device=CPU)
    assert_pruned(model, report)
    assert {"swaps" in each.facts for each in report.matrices} == {limit == 1000.0}
