"""SparseGPT: prune column by column, let the columns still to come compensate (arXiv 2301.00774).

With ``U`` the upper Cholesky factor of ``H⁻¹``, zeroing column j costs ``w_j² / U_jj²`` and is compensated by
``w_k -= (w_j / U_jj) U_jk`` for k > j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.checks import check_count, check_positive
from halve.maths.gram import Statistics
from halve.maths.linalg import Factor, damped_cholesky, lower_inverse
from halve.maths.pattern import Pattern, Tournament
from halve.maths.quadratic import dead_features, feature_scales
from halve.solve.outcome import Outcome, Status

_CHUNK = 8
"""Columns handled together where the pattern has no groups."""


@dataclass(frozen=True)
class SparseGPTOptions:
    """Options of SparseGPT.

    Attributes:
        damping: added to the diagonal of H, as a fraction of its mean; > 0.
        block_size: columns between two updates of the rest of the matrix, rounded down to a multiple of M (at least
            M); the weights do not depend on it for ``N:M``, an unstructured mask is chosen block by block.
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        check_positive("damping of sparsegpt", self.damping)
        check_count("block_size of sparsegpt", self.block_size)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: SparseGPTOptions) -> Outcome:
    """Prune ``weight`` from left to right, compensating each column's error in the columns after it.

    The mask of a group is chosen at its first column from the already compensated weights; an unstructured mask is
    chosen at the first column of each block, within each row. Dead features are decoupled from the others: they
    neither compensate nor are compensated, lose every contest, and if kept stay as they are.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M or a percentage.
        options: damping and block size.

    Returns:
        Outcome: facts ``damping`` (as a fraction of the mean diagonal) and ``damping_rungs`` (failed attempts at
            factorising).

    Raises:
        CalibrationError: the Gram matrix is zero.
        FactorisationError: the damped Gram matrix could not be factorised at any rung.
    """
    dead = dead_features(stats.gram)
    importance = feature_scales(stats.gram)
    upper, factor, mean = inverse_factor(stats.gram, dead, options.damping)
    importance = torch.where(dead, importance, 1.0 / upper.diagonal())
    # Columns become rows, so that everything below touches contiguous memory.
    columns = weight.float().mT.clone(memory_format=torch.contiguous_format)  # never the given memory itself
    _prune(columns, upper, importance, pattern, options.block_size)
    pruned = columns.mT.to(weight.dtype).contiguous().add_(0.0)
    facts = {"damping": factor.damping_used / mean, "damping_rungs": float(factor.rungs)}
    return Outcome(pruned, Status.OK, "sparsegpt", facts=facts)


def inverse_factor(gram: Tensor, dead: Tensor, damping: float) -> tuple[Tensor, Factor, float]:
    """Return the upper Cholesky factor U of ``(H + δ I)⁻¹ = Uᵀ U``, dead features decoupled.

    Reversing the order of the features turns the lower factor of H into the inverse of U: one factorisation and one
    triangular inverse, without ever forming ``H⁻¹``.

    Args:
        gram: (d, d) float32, H.
        dead: (d,) bool, features whose row and column are replaced by the mean diagonal of the others.
        damping: δ as a fraction of the mean diagonal.

    Returns:
        tuple[Tensor, Factor, float]: U (d, d) float32, the factor of the reversed matrix, and the mean diagonal.

    Raises:
        FactorisationError: see ``linalg.damped_cholesky``.
    """
    live = ~dead
    mean = float(gram.diagonal()[live].double().mean())
    coupled = gram.flip(0, 1)
    if bool(dead.any()):
        live = live.flip(0)
        coupled = torch.where(live & live.unsqueeze(-1), coupled, 0.0)
        coupled.diagonal()[~live] = mean
    factor = damped_cholesky(coupled, damping)
    inverse = lower_inverse(factor.lower)
    return inverse.flip(0, 1).float().contiguous(), factor, mean


def _prune(columns: Tensor, upper: Tensor, importance: Tensor, pattern: Pattern, block_size: int) -> None:
    """Prune ``columns`` (d_in, d_out), the transposed weights, in place.

    Args:
        columns: (d_in, d_out) float32.
        upper: (d_in, d_in) float32, U.
        importance: (d_in,) float32; the cost of zeroing w_j is ``(w_j importance_j)²``. 1 / U_jj but for dead features.
        pattern: N:M or a percentage.
        block_size: see the options.
    """
    d_in = columns.shape[0]
    keep, group = pattern.budget(d_in)
    chunk = group if pattern.structured else _CHUNK
    block = max(chunk, block_size // chunk * chunk)
    tournament = Tournament(keep, group, columns.device) if pattern.structured else None
    links = group - keep if pattern.structured else chunk
    zeros_before = 0
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        pruned = torch.zeros_like(columns[start:stop])
        if tournament is None:
            # Rounded cumulatively, so that the zeros of the blocks add up to those of the row.
            zeros = int(stop * pattern.sparsity)
            scores = (columns[start:stop] * importance[start:stop, None]).abs()
            order = torch.sort(scores, dim=0, stable=True, descending=True).indices
            pruned.scatter_(0, order[stop - start - (zeros - zeros_before) :], value=1.0)
            zeros_before = zeros
        errors = torch.empty_like(pruned)
        # How much the error of column i changes that of column j > i: U_ij / U_jj.
        couplings = (upper[start:stop, start:stop] * importance[start:stop]).triu_(1).mT
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            inside = slice(first - start, last - start)
            scores = columns[first:last] * importance[first:last, None]
            chosen = pruned[inside] if tournament is None else tournament.losers(scores.abs())
            error = _errors(scores, chosen, couplings[inside, inside], links)
            columns[first:stop].addmm_(upper[first:last, first:stop].mT, error, alpha=-1)
            columns[first:last].masked_fill_(chosen.bool(), 0.0)
            errors[inside] = error
        columns[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)


def _errors(scores: Tensor, pruned: Tensor, couplings: Tensor, links: int) -> Tensor:
    """Return the errors ``w_j / U_jj`` of the pruned weights of a chunk, each seeing those of the columns before it.

    The forward substitution ``e = p (s - N e)``, N strictly lower triangular, taken for all columns at once: after as
    many rounds as a row has pruned weights nothing changes any more.

    Args:
        scores: (k, d_out), ``s_j = w_j / U_jj`` before any column of the chunk is pruned.
        pruned: (k, d_out), 1.0 where a weight is pruned, else 0.0.
        couplings: (k, k), N.
        links: most pruned weights of a row.
    """
    errors = scores * pruned
    for _ in range(min(links, scores.shape[0]) - 1):
        errors = torch.addmm(scores, couplings, errors, alpha=-1).mul_(pruned)
    return errors
