"""The exact step of ADMM on the layer objective: a ridge problem whose matrix is factorised once for every ρ."""

import torch
from torch import Tensor

from halve.errors import FactorisationError
from halve.maths.linalg import is_finite


class Resolvent:
    """Minimises ``½ (v - v0) H̃ (v - v0)ᵀ + ρ/2 |v - p|²`` for every row, one matrix product a call.

    The solution is ``v0 + (p - v0) R`` with ``R = ρ (H̃ + ρ I)⁻¹``, whose eigenvalues lie in (0, 1].

    Args:
        gram: (d, d) float32, H̃, positive semi-definite up to rounding.
        dtype: of the product; in bfloat16 the rounding is relative to ``p - v0``.
    """

    def __init__(self, gram: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._gram = gram
        self._rho = 0.0
        self._matrix = gram

    def solve(self, target: Tensor, point: Tensor, rho: float) -> Tensor:
        """Return the minimisers for v0 = ``target`` and p = ``point``, all (rows, d) float32; ``rho`` > 0.

        Raises:
            FactorisationError: ``H̃ + ρ I`` is not positive definite even in float64.
        """
        return self.move(target.clone(), point - target, rho)

    def move(self, start: Tensor, way: Tensor, rho: float) -> Tensor:
        """Add ``way`` times R to ``start``, in place, both (rows, d) float32; ``rho`` > 0.

        Raises:
            FactorisationError: as `solve`.
        """
        if rho != self._rho:
            self._matrix = _scaled_inverse(self._gram, rho).to(self.dtype)
            self._rho = rho
        if self.dtype == start.dtype:
            return start.addmm_(way, self._matrix)
        return start.add_(way.to(self.dtype) @ self._matrix)


def _scaled_inverse(gram: Tensor, rho: float) -> Tensor:
    for dtype in (torch.float32, torch.float64):
        shifted = gram.to(dtype) / rho
        shifted.diagonal().add_(1.0)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            if is_finite(inverse.diagonal()):  # no entry is larger than the largest of these
                return inverse.float()
    raise FactorisationError(
        f"a {gram.shape[0]}x{gram.shape[1]} Gram matrix with {rho:g} added to its diagonal is not positive definite: "
        "check that it is XᵀX / tokens, or use more calibration tokens"
    )
