"""Factorisations that may fail, made safe: a bounded ladder of retries that says how far it had to go."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from halve.errors import FactorisationError, InputError

_DAMPING_STEPS = (1.0, 10.0, 100.0)
_DTYPES = (torch.float32, torch.float64)
_AT_ONCE = 1 << 23
"""Weights of the rows that are looked at in one go: 32 MiB in float32, some copies of which stand at once."""
_INVERT_AT_ONCE = 64
"""Rows of a triangular matrix inverted by one call of the library."""


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor and what it took to get it.

    Attributes:
        lower: (d, d) L with L Lᵀ = H + damping_used · I, lower triangular, positive diagonal, ``dtype``.
        damping_used: what was added to the diagonal, in the units of H.
        rungs: attempts that failed before this one; 0 is the first try.
        dtype: the precision that the factorisation was done in.
        clipped: whether negative eigenvalues of H were replaced by 0 first (the last rung).
    """

    lower: Tensor
    damping_used: float
    rungs: int
    dtype: torch.dtype
    clipped: bool = False


def in_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of ``matrix`` (rows, ...) in views of bounded size, for what is done to each row by itself."""
    width = max(1, matrix[:1].numel())
    return torch.split(matrix, max(1, _AT_ONCE // width))


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry of ``tensor``, real and of any shape, is NaN or infinite; looks at parts of bounded size."""
    if not tensor.is_floating_point():
        return True
    parts = torch.split(tensor.flatten(), _AT_ONCE) if tensor.is_contiguous() or tensor.ndim < 2 else in_parts(tensor)
    return all(_part_is_finite(part) for part in parts)


def _part_is_finite(part: Tensor) -> bool:
    """Decide by the sum, a quarter of the work of looking at every entry; where it is not finite that has to be done.

    A sum of finite entries may overflow, but one with NaN or infinity among them is never finite.
    """
    part = part.float() if part.dtype.itemsize == 1 else part  # torch does not add up float8
    total = part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(part).all())


def damped_cholesky(gram: Tensor, damping: float) -> Factor:
    """Factorise ``H + δ I`` with ``δ = damping · mean(diag H)``, retrying along a bounded ladder.

    The rungs, in this order: δ in float32, δ in float64, 10 δ in float32, 10 δ in float64, 100 δ in float32,
    100 δ in float64, and last δ in float64 with the negative eigenvalues of H set to 0. More precision comes before
    more damping because it does not change the problem. Every rung factorises the same kind of matrix; no rung
    replaces H by something simpler.

    Args:
        gram: (d, d) symmetric, positive semi-definite up to rounding, float32 or float64; a mean
            diagonal between 1e-70 and 1e70.
        damping: fraction of the mean diagonal, > 0.

    Returns:
        Factor: the factor and which rung gave it.

    Raises:
        InputError: ``damping`` is not a positive finite number.
        FactorisationError: no rung worked, ``gram`` is not finite, or its mean diagonal is not positive.
    """
    if not 0.0 < damping < float("inf"):
        raise InputError(f"damping must be a positive fraction of the mean diagonal, got {damping!r}")
    mean = float(gram.diagonal().double().mean())
    if not (0.0 < mean < float("inf") and is_finite(gram)):
        raise FactorisationError(
            f"a {gram.shape[0]}x{gram.shape[1]} matrix with mean diagonal {mean:g} cannot be factorised: "
            "it must be finite with a positive mean diagonal"
        )
    # About unit mean diagonal, so that neither 1e30 nor 1e-30 overflows or underflows inside; a power of 4 is exact.
    unit = 4.0 ** round(math.log(mean, 4.0))
    rungs = list(product(_DAMPING_STEPS, _DTYPES))
    for rung, (step, dtype) in enumerate(rungs):
        lower = _cholesky(_damped((gram / unit).to(dtype), step * damping * mean / unit))
        if lower is not None:
            return Factor(lower * math.sqrt(unit), step * damping * mean, rung, dtype)
    lower = _cholesky_by_eigenvalues(gram.double() / unit, damping * mean / unit)
    if lower is None:
        raise FactorisationError(
            f"a {gram.shape[0]}x{gram.shape[1]} matrix could not be factorised with damping up to "
            f"{_DAMPING_STEPS[-1] * damping:g} of its mean diagonal, nor by its eigenvalues"
        )
    return Factor(lower * math.sqrt(unit), damping * mean, len(rungs), torch.float64, clipped=True)


@contextmanager
def full_precision() -> Iterator[None]:
    """Make float32 products and convolutions true float32 inside the block: no TF32, no bfloat16, no autocast.

    The settings of the caller are restored on the way out.
    """
    cudnn: Any = torch.backends.cudnn  # its submodules are made at run time, out of a type checker's sight
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """Add ``damping`` to the diagonal of ``matrix`` in place."""
    matrix.diagonal().add_(damping)
    return matrix


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower factor, or None if the matrix is not positive definite in its precision."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower if int(info) == 0 and is_finite(lower) else None


def _cholesky_by_eigenvalues(matrix: Tensor, damping: float) -> Tensor | None:
    """Factorise Q max(Λ, 0) Qᵀ + damping I through a QR decomposition, which needs no positive pivots."""
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        root = (eigenvalues.clamp_min(0.0) + damping).sqrt()
        upper = torch.linalg.qr(root.unsqueeze(-1) * vectors.mT).R
    except RuntimeError:  # torch.linalg.LinAlgError, which is not exported for type checkers
        return None
    lower = upper.mT * upper.diagonal().sign()
    return lower.contiguous() if is_finite(lower) else None


def lower_inverse(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix, in half the time of solving for every column of the identity.

    By halves: ``[[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹ C A⁻¹, B⁻¹]]``, nearly all of it matrix products.

    Args:
        lower: (d, d) lower triangular, float32 or float64, no zero on the diagonal.
    """
    inverse = torch.zeros_like(lower)
    _invert_into(inverse, lower)
    return inverse


def _invert_into(inverse: Tensor, lower: Tensor) -> None:
    """Fill the lower triangle of ``inverse``, zeros elsewhere."""
    d = lower.shape[0]
    if d <= _INVERT_AT_ONCE:
        identity = torch.eye(d, dtype=lower.dtype, device=lower.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = d // 2
    _invert_into(inverse[:half, :half], lower[:half, :half])
    _invert_into(inverse[half:, half:], lower[half:, half:])
    inverse[half:, :half].addmm_(inverse[half:, half:], lower[half:, :half] @ inverse[:half, :half], alpha=-1)
