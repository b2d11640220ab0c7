"""Slow, plain float64 versions of what the layer modules compute, written from the formulas alone."""

import torch
from torch import Tensor


def correlated_inputs(tokens: int, d_in: int, seed: int, spread: float = 1.0) -> Tensor:
    """Inputs as layers see them: a few strong common directions, features of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    strength = torch.logspace(0, -2, d_in, dtype=torch.float64)
    scales = torch.exp(spread * torch.randn(d_in, generator=generator, dtype=torch.float64))
    common = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) * strength
    own = 0.3 * torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    return ((common @ mixing) / 3 + own) * scales


def layer(d_out: int, d_in: int, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A float32 weight matrix and the float32 Gram matrix of correlated inputs."""
    x = correlated_inputs(4 * d_in if tokens is None else tokens, d_in, seed)
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed + 1)) * 0.05
    return weight, (x.mT @ x / len(x)).float()


def row_losses(weight: Tensor, original: Tensor, gram: Tensor) -> Tensor:
    losses = []
    for row, other in zip(weight.double(), original.double(), strict=True):
        difference = row - other
        losses.append(0.5 * torch.dot(difference, gram.double() @ difference))
    return torch.stack(losses)


def relative_loss(weight: Tensor, original: Tensor, gram: Tensor) -> float:
    return float(row_losses(weight, original, gram).sum() / row_losses(0 * original, original, gram).sum())


def best_on_mask(original: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """The exact optimum of every row, by a pseudo-inverse of its own submatrix."""
    best = torch.zeros_like(original, dtype=torch.float64)
    for i, keep in enumerate(mask):
        inverse = torch.linalg.pinv(gram.double()[keep][:, keep], hermitian=True, rtol=1e-13)
        best[i, keep] = inverse @ (gram.double()[keep] @ original[i].double())
    return best


def sparsegpt(weight: Tensor, gram: Tensor, keep: int, group: int, damping: float) -> tuple[Tensor, Tensor]:
    """SparseGPT one row and one column at a time, from an explicit inverse; returns weights and margins.

    The margin of a group is the gap between the score of the weakest kept and the strongest pruned weight, relative
    to the former: where it is tiny, float32 may rightly choose another mask.
    """
    d_in = weight.shape[1]
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    result = weight.double().clone()
    margins = torch.empty(weight.shape[0], d_in // group, dtype=torch.float64)
    for i, row in enumerate(result):
        pruned: list[int] = []
        for j in range(d_in):
            if j % group == 0:
                scores = row[j : j + group] ** 2 / upper.diagonal()[j : j + group] ** 2
                order = torch.argsort(scores).tolist()
                pruned = [j + k for k in order[: group - keep]]
                weakest, strongest = scores[order[group - keep]], scores[order[group - keep - 1]]
                margins[i, j // group] = (weakest - strongest) / weakest
            if j in pruned:
                error = row[j] / upper[j, j]
                row[j:] -= error * upper[j, j:]
                row[j] = 0.0
    return result, margins


def sparsegpt_unstructured(weight: Tensor, gram: Tensor, sparsity: float, block: int, damping: float) -> Tensor:
    """SparseGPT with the mask of each block of columns chosen within each row at the block's first column."""
    d_in = weight.shape[1]
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    result = weight.double().clone()
    for row in result:
        for start in range(0, d_in, block):
            stop = min(start + block, d_in)
            zeros = int(stop * sparsity) - int(start * sparsity)
            scores = row[start:stop] ** 2 / upper.diagonal()[start:stop] ** 2
            pruned = set((torch.argsort(scores)[:zeros] + start).tolist())
            for j in range(start, stop):
                if j in pruned:
                    error = row[j] / upper[j, j]
                    row[j:] -= error * upper[j, j:]
                    row[j] = 0.0
    return result


def proximal_gradient(weight: Tensor, gram: Tensor, lambda0: float, beta: float, check_every: int) -> Tensor:
    """Algorithm 2 on one row at a time in float64 for 2:4, with the exact prox of halve in float64."""
    from halve.maths.proximal import prox

    features = gram.double().diagonal().sqrt()
    target = weight.double() * features
    scale = target.abs().mean(1, keepdim=True)
    target = target / scale
    unit = gram.double() / features / features[:, None]
    lipschitz = torch.linalg.eigvalsh(unit)[-1]
    rows = []
    for start in target:
        row, lam, iteration = start.clone(), lambda0, 0
        while True:
            if iteration % check_every == 0 and bool(((row.view(-1, 4) != 0).sum(1) <= 2).all()):
                break
            step = row - (row - start) @ unit / lipschitz
            row = prox(step, float(lam / lipschitz), "2:4")
            lam, iteration = lam * beta, iteration + 1
        rows.append(row)
    return torch.stack(rows) * scale / features


def _unit(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features = gram.double().diagonal().sqrt()
    return weight.double() * features, gram.double() / features / features[:, None], features


def _largest_two(row: Tensor) -> Tensor:
    groups = row.view(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(1, groups.abs().argsort(dim=1, descending=True, stable=True)[:, :2], value=True)
    return (groups * kept).view(-1)


def alps(weight: Tensor, gram: Tensor, iterations: int = 300) -> Tensor:
    """ALPS as published, for 2:4, in float64 with one eigendecomposition; without the final conjugate gradients."""
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    dense0, unit, features = _unit(weight, damped)
    values, vectors = torch.linalg.eigh(unit)
    right = dense0 @ unit
    sparse0 = torch.stack([_largest_two(row) for row in dense0])
    dense, sparse, dual, rho, begun = dense0, sparse0, torch.zeros_like(dense0), 0.1, False
    before, kept = sparse0 != 0, int((sparse0 != 0).sum())
    for i in range(iterations):
        dense = (right - dual + rho * sparse) @ (vectors / (values + rho)) @ vectors.mT
        sparse = torch.stack([_largest_two(row) for row in dense + dual / rho])
        dual = dual + rho * (dense - sparse)
        if (i + 1) % 3:
            continue
        changed = int((before != (sparse != 0)).sum())
        before = sparse != 0
        if changed / kept > 0.1:
            begun, rho = True, rho * 1.3
        elif changed / kept > 0.005:
            begun, rho = True, rho * 1.2
        elif changed and begun:
            rho *= 1.1
        elif changed:
            rho, dense, sparse, dual = rho / 5, dense0, sparse0, torch.zeros_like(dense0)
        elif begun:
            break
        else:
            rho /= 5
        if i >= 30 and changed / kept < 0.0003:
            break
    return torch.stack([_largest_two(row) for row in dense]) / features


def prox_admm(weight: Tensor, gram: Tensor, check_every: int) -> Tensor:
    """prox-admm with its default schedule, one row at a time in float64, for 2:4."""
    from halve.maths.proximal import prox

    target, unit, features = _unit(weight, gram)
    scale = target.abs().mean(1, keepdim=True)
    target = target / scale
    eye = torch.eye(len(gram), dtype=torch.float64)
    rows = []
    for start in target:
        sparse, dual, rho, lam, seen = start, torch.zeros_like(start), 0.1, 0.01, start != 0
        for i in range(1, 1000):
            dense = torch.linalg.solve(unit + rho * eye, unit @ start + rho * (sparse - dual))
            sparse = prox(dense + dual, lam / rho, "2:4")
            dual = dual + dense - sparse
            lam *= 1.1
            if i % 5 == 0:
                rho, dual = rho * 1.2, dual / 1.2
            if i % check_every == 0:
                done = bool(((sparse.view(-1, 4) != 0).sum(1) <= 2).all()) and bool(((sparse != 0) == seen).all())
                if done:
                    break
                seen = sparse != 0
        rows.append(sparse)
    return exchanged(torch.stack(rows) * scale / features, weight, gram)


def exchanged(weight: Tensor, original: Tensor, gram: Tensor) -> Tensor:
    """Exchange a kept and a pruned weight, the latter at its best value, as long as that lowers the loss."""
    gram = gram.double()
    result = weight.double().clone()
    for row, start in zip(result, original.double(), strict=True):
        while True:
            best = (float(0.5 * (row - start) @ gram @ (row - start)) * (1 - 1e-6), row)
            for enters in range(len(row)):
                for leaves in range(enters // 4 * 4, enters // 4 * 4 + 4):
                    if row[leaves] != 0 and row[enters] == 0:
                        trial = row.clone()
                        trial[leaves] = 0.0
                        trial[enters] -= (trial - start) @ gram[enters] / gram[enters, enters]
                        loss = float(0.5 * (trial - start) @ gram @ (trial - start))
                        if loss < best[0]:
                            best = (loss, trial)
            if best[1] is row:
                break
            row.copy_(best[1])
    return result


def best_swap(row: Tensor, kept: Tensor, gram: Tensor) -> tuple[float, int, int]:
    """Try every exchange within a group of four; return the lowest loss, what enters and what leaves."""
    best = (float("inf"), -1, -1)
    for enters in range(len(row)):
        for leaves in range(enters // 4 * 4, enters // 4 * 4 + 4):
            if kept[leaves] and not kept[enters]:
                mask = kept.clone()
                mask[enters], mask[leaves] = True, False
                error = row * ~mask
                best = min(best, (float(0.5 * error @ gram @ error), enters, leaves))
    return best
