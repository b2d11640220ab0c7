import pytest
import torch

import layer_oracles as oracle
from halve.errors import FactorisationError
from halve.maths import resolvent
from halve.maths.resolvent import Resolvent


@pytest.fixture
def problem():
    target, gram = oracle.layer(12, 64, seed=0)
    features = gram.diagonal().sqrt()
    generator = torch.Generator().manual_seed(1)
    target = target * features
    return target, target + 0.1 * torch.randn(12, 64, generator=generator), gram / features / features[:, None]


def exact(target, point, gram, rho):
    target, point, gram = target.double(), point.double(), gram.double()
    return torch.linalg.solve(gram + rho * torch.eye(len(gram)), (target @ gram + rho * point).mT).mT


@pytest.mark.parametrize("rho", [1e-2, 0.1, 1.0, 100.0])
def test_solves_the_ridge_problem(problem, rho):
    target, point, gram = problem
    got = Resolvent(gram).solve(target, point, rho)
    assert torch.allclose(got.double(), exact(target, point, gram, rho), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_in_place_what_solving_adds(problem, dtype):
    target, point, gram = problem
    resolvent, start = Resolvent(gram, dtype), torch.ones_like(target)
    moved = resolvent.move(start, point - target, 0.5)
    assert moved is start
    tolerance = 1e-5 if dtype == torch.float32 else 0.02 * float((point - target).abs().max())
    assert torch.allclose(moved.double() - 1.0, exact(target, point, gram, 0.5) - target.double(), atol=tolerance)


def test_bfloat16_errs_by_a_share_of_the_difference(problem):
    target, point, gram = problem
    got = Resolvent(gram, torch.bfloat16).solve(target, point, 0.5)
    assert got.dtype == torch.float32
    error = (got.double() - exact(target, point, gram, 0.5)).abs().max()
    assert 0 < error < 0.02 * (point - target).abs().max()


def test_factorises_once_for_every_rho(problem, monkeypatch):
    target, point, gram = problem
    seen = []
    real = resolvent._scaled_inverse
    monkeypatch.setattr(resolvent, "_scaled_inverse", lambda gram, rho: seen.append(rho) or real(gram, rho))
    solver = Resolvent(gram)
    for rho in (0.1, 0.1, 0.2, 0.2, 0.1):
        solver.solve(target, point, rho)
    assert seen == [0.1, 0.2, 0.1]


def test_goes_to_float64_and_then_refuses():
    vectors = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    nearly = (vectors * torch.logspace(0, -12, 16, dtype=torch.float64)) @ vectors.mT
    ones = torch.ones(1, 16)
    assert bool(torch.isfinite(Resolvent(nearly.float()).solve(ones, 0 * ones, 1e-6)).all())
    with pytest.raises(FactorisationError, match=r"16x16 Gram matrix with 0\.1 added"):
        Resolvent(-torch.eye(16)).solve(ones, ones, 0.1)
