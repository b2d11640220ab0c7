import pytest
import torch

import layer_oracles as oracle
from halve.errors import FactorisationError, InputError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods import sparsegpt
from halve.solve.methods.sparsegpt import SparseGPTOptions, inverse_factor, solve


def prune(weight, gram, pattern="2:4", **options):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), SparseGPTOptions(**options))


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (6, 8), (3, 5)])
def test_matches_the_plain_loop(keep, group):
    d_in = 120
    weight, gram = oracle.layer(16, d_in, seed=group)
    expected, margins = oracle.sparsegpt(weight, gram, keep, group, damping=0.01)
    pruned = prune(weight, gram, f"{keep}:{group}", block_size=32).weight
    # A row is comparable up to a group whose choice is within float32 rounding of a tie.
    clear = (margins > 1e-3).all(-1)
    assert int(clear.sum()) >= 8
    assert torch.equal((pruned != 0)[clear], (expected != 0)[clear])
    error = (pruned - expected)[clear].abs().max() / expected.abs().max()
    assert float(error) < 1e-4


def test_unstructured_matches_the_plain_loop():
    weight, gram = oracle.layer(12, 90, seed=1)
    expected = oracle.sparsegpt_unstructured(weight, gram, 0.5, block=24, damping=0.01)
    pruned = prune(weight, gram, "50%", block_size=24).weight
    same = ((pruned != 0) == (expected != 0)).all(-1)
    assert int(same.sum()) >= 10
    assert float((pruned - expected)[same].abs().max() / expected.abs().max()) < 1e-4
    assert ((pruned == 0).sum(-1) == 45).all()


def test_blocks_do_not_change_an_n_m_result():
    weight, gram = oracle.layer(8, 96, seed=2)
    expected = prune(weight, gram, block_size=96).weight
    for block_size in (1, 5, 32, 1000):
        other = prune(weight, gram, block_size=block_size).weight
        assert torch.equal(other != 0, expected != 0)
        assert torch.allclose(other, expected, atol=1e-5)


def test_blocks_decide_an_unstructured_mask():
    weight, gram = oracle.layer(8, 96, seed=2)
    for block_size in (16, 48):
        pruned = prune(weight, gram, "25%", block_size=block_size).weight
        zeros = (pruned == 0).view(8, -1, block_size).sum(-1)
        assert (zeros == block_size // 4).all()


def test_unstructured_blocks_add_up_to_the_share_of_the_row():
    weight, gram = oracle.layer(8, 50, seed=2)
    pruned = prune(weight, gram, "30%", block_size=16).weight
    assert ((pruned == 0).sum(-1) == 15).all()


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, gram = oracle.layer(1, 40, seed=3)
    upper, factor, mean = inverse_factor(gram, torch.zeros(40, dtype=torch.bool), 0.01)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(upper.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert mean == pytest.approx(float(gram.double().diagonal().mean()))
    assert factor.damping_used == pytest.approx(0.01 * mean, rel=1e-5)


def test_dead_features_do_not_change_the_others():
    weight, gram = oracle.layer(8, 32, seed=4)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[16:20] = True
    live = ~dead
    gram[dead], gram[:, dead] = 0.0, 0.0
    pruned = prune(weight, gram).weight
    alone = prune(weight[:, live].contiguous(), gram[live][:, live].contiguous()).weight
    assert torch.allclose(pruned[:, live], alone, atol=1e-5)
    kept = pruned[:, dead] != 0
    assert torch.equal(pruned[:, dead][kept], weight[:, dead][kept])


def test_damping_is_reported_with_the_rung(monkeypatch):
    weight, gram = oracle.layer(4, 16, seed=5)
    facts = prune(weight, gram).facts
    assert facts["damping"] == pytest.approx(0.01)
    assert facts["damping_rungs"] == 0
    real = sparsegpt.damped_cholesky
    monkeypatch.setattr(sparsegpt, "damped_cholesky", lambda matrix, damping: real(matrix.double(), damping * 10))
    other = prune(weight, gram)
    assert other.facts["damping"] == pytest.approx(0.1)
    assert other.weight.dtype == torch.float32


def test_failed_factorisation_is_not_replaced_by_something_else(monkeypatch):
    def fail(matrix, damping):
        raise FactorisationError("no")

    monkeypatch.setattr(sparsegpt, "damped_cholesky", fail)
    with pytest.raises(FactorisationError):
        prune(*oracle.layer(4, 16, seed=6))


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan"), float("inf")])
def test_bad_damping_is_refused(damping):
    with pytest.raises(InputError, match="damping of sparsegpt must be a finite number above 0"):
        SparseGPTOptions(damping=damping)


@pytest.mark.parametrize("block_size", [0, -4, 1.5])
def test_bad_block_size_is_refused(block_size):
    with pytest.raises(InputError, match="block_size of sparsegpt must be a whole number of at least 1"):
        SparseGPTOptions(block_size=block_size)
