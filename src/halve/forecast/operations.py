"""Operations and bytes that the parts of a run take, counted from their source.

Iterations depend on the data. Where they do, the numbers are those seen on language models (`docs/large-models.md`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from halve.forecast.shapes import Bundle
from halve.maths.gram import panels
from halve.maths.grid import COLUMNS
from halve.solve.methods import prox_admm, prox_gradient
from halve.solve.methods.auto import AutoOptions
from halve.solve.refit import IntegerOptions

_PLANE = 4
"""Bytes of a number in float32."""


@dataclass(frozen=True)
class Counts:
    """What a machine has to do.

    Attributes:
        forward: operations in products of the dtype of forward passes.
        float32: operations in float32 products.
        factorisation: operations in Cholesky factorisations and inverses, float32.
        bytes: read and written by passes over memory.
    """

    forward: float = 0.0
    float32: float = 0.0
    factorisation: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def times(self, factor: float) -> "Counts":
        """Return as much as ``factor`` of this."""
        return Counts(*(factor * getattr(self, each.name) for each in fields(self)))


@dataclass(frozen=True)
class Iterations:
    """How often a method iterates.

    Attributes:
        all: until the last row has ended.
        row: until a row has, in the mean.
    """

    all: float
    row: float


_SEEN = {"fast": Iterations(21, 16), "balanced": Iterations(80, 58), "best": Iterations(158, 116)}
"""Of prox-admm with the schedules of the efforts."""
_ALPS = Iterations(60, 45)
_REACHED = 10.0
"""λ of prox-gradient at which a row has the pattern, in the mean over rows."""
_CG_STEPS = {True: 4.0, False: 15.0}
"""Of the refit, after a method that ends near the best weights on its mask, and after another."""
_LEFT = 5e-3
"""Share of the loss that the former leaves to the refit: with a larger tolerance, as of effort ``fast``, there is none.
"""
_AROUND = 140.0
"""Passes over a matrix besides its solver: checks, losses before and after, writing back, the record."""
_IN_A_MODEL = 1.2
"""How much longer the products of a forward pass take than the same alone, one after the other."""
_SHRINKAGE_REFITS, _SHRINKAGE_STEPS, _SHRINKAGE_ROWS = 6, 13, 32
"""How many fits the search for the shrinkage makes, products in each with those that judge it, and its rows."""


def forward(products: float, tokens: float, length: int, width: int, outputs: float) -> Counts:
    """One pass of the calibration tokens through a block.

    Args:
        products: multiplications that a token takes in its matrices.
        tokens: of the calibration set.
        length: of a sequence, for the attention; 0 where there is none.
        width: of the hidden state.
        outputs: of all matrices, together.
    """
    attention = 4.0 * tokens * length * width
    return Counts(
        forward=_IN_A_MODEL * (2.0 * tokens * products + attention),
        bytes=_PLANE * tokens * (16.0 * width + 4.0 * outputs),
    )


def statistics(bundle: Bundle, tokens: float, *, cross: bool) -> Counts:
    """The Gram matrix of a bundle's inputs, and with ``cross`` that between the dense and the pruned model's."""
    upper = sum((panel.stop - panel.start) * (bundle.d_in - panel.start) for panel in panels(bundle.d_in))
    return Counts(
        float32=2.0 * bundle.seen * tokens * (upper + cross * bundle.d_in**2),
        bytes=bundle.experts * 8.0 * _PLANE * bundle.d_in**2,
    )


def solving(bundle: Bundle, method: str, refit: str, options: Mapping[str, Any], *, shrinkage: bool) -> Counts | None:
    """All that is done to a bundle's matrices once there are statistics; None for a method that is not counted.

    Args:
        bundle: of matrices.
        method: a name in `halve.solve.methods.METHODS`.
        refit: a name in `halve.solve.refit.REFITS`.
        options: of method and refit, all of them.
        shrinkage: whether the shrinkage is chosen.
    """
    rows, d = float(sum(bundle.rows)), float(bundle.d_in)
    counts = _of_method(method, rows, d, options)
    if counts is None or refit not in {"none", "cg", "int4"}:
        return None
    counts += Counts(float32=4.0 * rows * d**2, bytes=_AROUND * _PLANE * rows * d)
    if refit == "int4":
        sweeps = options.get("refit_sweeps", IntegerOptions.sweeps)
        counts += Counts(float32=(sweeps + 3) * 2.0 * rows * d**2, bytes=sweeps * 4 * COLUMNS * _PLANE * rows * d)
    if refit != "none":
        near = method in {"auto", "prox-admm"}
        steps = 0.0 if near and options.get("refit_tolerance", 0.0) >= _LEFT else _CG_STEPS[near]
        products = 1.0 if not steps else steps + 5.0  # of the residual, of the output, and of three losses
        counts += Counts(float32=products * 2.0 * rows * d**2, bytes=steps * 25 * _PLANE * rows * d)
    if shrinkage:
        products = _SHRINKAGE_REFITS * _SHRINKAGE_STEPS * 2.0 * min(rows, _SHRINKAGE_ROWS) * d**2
        counts += Counts(float32=products, bytes=_SHRINKAGE_REFITS * 6.0 * _PLANE * d**2)
    return counts.times(bundle.experts)


def _of_method(method: str, rows: float, d: float, options: Mapping[str, Any]) -> Counts | None:
    if method == "auto":
        effort = options.get("effort", AutoOptions.effort)
        return _admm(rows, d, _SEEN[effort], every=prox_admm.RHO_EVERY, passes=20, forward=True)
    if method == "prox-admm":
        growth = options.get("lambda_growth", prox_admm.ProxADMMOptions.lambda_growth)
        stretched = math.log(prox_admm.ProxADMMOptions.lambda_growth) / math.log(growth)
        seen = _SEEN["balanced"]
        iterations = Iterations(stretched * seen.all, stretched * seen.row)
        return _admm(rows, d, iterations, every=prox_admm.RHO_EVERY, passes=20, forward=True)
    if method == "prox-gradient":
        defaults = prox_gradient.ProxGradientOptions()
        first, growth = options.get("lambda0", defaults.lambda0), options.get("beta", defaults.beta)
        most = options.get("max_iterations", defaults.max_iterations)
        steps = min(most, max(1.0, math.log(_REACHED / first) / math.log(growth)))
        return Counts(
            forward=steps * 2.0 * rows * d**2,
            factorisation=2.0 * d**3 / 3.0,  # of the spectral bound, one or two without an inverse
            bytes=steps * 15 * _PLANE * rows * d,
        )
    if method == "alps":
        return _admm(rows, d, _ALPS, every=3, passes=35, forward=False)
    if method in {"wanda", "ria", "magnitude"}:
        return Counts(bytes=30.0 * _PLANE * rows * d)
    if method == "sparsegpt":
        inside, blocks = 2.0 * 64 * rows * (d / 4), rows * d * (d / 128)
        return Counts(
            float32=rows * d**2,
            factorisation=d**3,
            bytes=_PLANE * (inside + blocks + 8 * d**2),
        )
    return None


def _admm(rows: float, d: float, iterations: Iterations, *, every: int, passes: int, forward: bool) -> Counts:
    """A product an iteration, and a factor with its inverse, d³, every few of them."""
    product = iterations.row * 2.0 * rows * d**2
    counts = Counts(
        factorisation=math.ceil(iterations.all / every) * d**3,
        bytes=iterations.row * passes * _PLANE * rows * d,
    )
    return replace(counts, forward=product) if forward else replace(counts, float32=product)


def backward(one_pass: Counts) -> Counts:
    """A forward and a backward pass, given what the forward pass takes."""
    return one_pass.times(3.0)


def optimiser(weights: float) -> Counts:
    """A step of Adam, in float32."""
    return Counts(bytes=12.0 * _PLANE * weights)
