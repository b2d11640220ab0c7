"""The table of pruning methods: one function and one row each, under one contract.

``solve(weight, stats, pattern, options) -> Outcome``: ``weight`` is (d_out, d_in) of any float dtype, finite;
``stats`` belongs to its inputs; the outcome's weight has the same dtype and device, satisfies ``pattern``, and its
zeros are +0.0. Methods compute in float32, and trust that their input was checked (``halve.solve.matrix`` does).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halve.lookup import build_options, find_row
from halve.maths.pattern import Pattern
from halve.maths.proximal import has_fast_solver
from halve.solve.defaults import Defaults
from halve.solve.gradient_scores import GradientOf
from halve.solve.methods import (
    alps,
    auto,
    gblm,
    magnitude,
    prox_admm,
    prox_gradient,
    pruner_zero,
    ria,
    sparse_swaps,
    sparsegpt,
    wanda,
    wanda_plus_plus,
)
from halve.solve.outcome import Outcome


def _as_published(_options: Any) -> Defaults:
    return Defaults()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        name: what the user writes.
        solve: ``solve(weight, stats, pattern, options) -> Outcome``; ``stats`` may be None if not needed.
        options: the frozen dataclass that ``solve`` takes.
        needs_statistics: whether ``stats`` must be given.
        unstructured: whether it takes patterns such as ``50%`` besides ``N:M``.
        updates_weights: whether the kept weights differ from the given ones.
        independent_rows: whether a row's result depends on that row alone, given the pattern, so that matrices with
            the same inputs may be solved as one.
        summary: one line for a listing.
        reference: where the method comes from.
        defaults: from the options, what goes with the method where the user says nothing.
        gradient: of what ``stats`` must have the gradient; None where it needs none.
        by_rows: whether it does nothing but what it does to each row, so that some at a time are no more work; its
            outcome then has no facts.
    """

    name: str
    solve: Callable[..., Outcome]
    options: type[Any]
    needs_statistics: bool
    unstructured: bool
    updates_weights: bool
    independent_rows: Callable[[Pattern], bool]
    summary: str
    reference: str
    defaults: Callable[[Any], Defaults] = _as_published
    gradient: GradientOf | None = None
    by_rows: bool = False


def _always(_pattern: Pattern) -> bool:
    return True


def _never(_pattern: Pattern) -> bool:
    return False


_ROWS = (
    Method(
        name="auto",
        solve=auto.solve,
        options=auto.AutoOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=True,
        independent_rows=has_fast_solver,
        summary="the best of the below for the pattern and the effort: prox-admm, or alps; with exact swaps for best",
        reference="Halve; arXiv 2501.18015 and 2406.07831",
        defaults=auto.defaults,
    ),
    Method(
        name="magnitude",
        solve=magnitude.solve,
        options=magnitude.MagnitudeOptions,
        needs_statistics=False,
        unstructured=True,
        updates_weights=False,
        independent_rows=_always,
        by_rows=True,
        summary="keep the largest |w| of each group",
        reference="Mishra et al. 2021, arXiv 2104.08378",
    ),
    Method(
        name="wanda",
        solve=wanda.solve,
        options=wanda.WandaOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=False,
        independent_rows=_always,
        by_rows=True,
        summary="keep the largest |w| times the root mean square of its input",
        reference="Sun et al. 2024, arXiv 2306.11695",
    ),
    Method(
        name="ria",
        solve=ria.solve,
        options=ria.RIAOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=False,
        independent_rows=_never,
        summary="keep the largest share of its row's and column's |w| times the fourth root of H_jj",
        reference="Zhang et al. 2024, arXiv 2402.13485",
    ),
    Method(
        name="gblm",
        solve=gblm.solve,
        options=gblm.GBLMOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=False,
        independent_rows=_always,
        summary="keep the largest |w| times the norm of its input plus that of its gradient in the model's loss",
        reference="Das et al. 2023, arXiv 2311.04902",
        gradient=GradientOf.LOSS,
    ),
    Method(
        name="pruner-zero",
        solve=pruner_zero.solve,
        options=pruner_zero.PrunerZeroOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=False,
        independent_rows=_never,
        summary="keep the largest w² times the gradient in the model's loss, scaled to 0 … 1 in each matrix",
        reference="Dong et al. 2024, arXiv 2406.02924",
        gradient=GradientOf.LOSS,
    ),
    Method(
        name="wanda++",
        solve=wanda_plus_plus.solve,
        options=wanda_plus_plus.WandaPlusPlusOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=True,
        independent_rows=_always,
        summary="Wanda plus the gradient of the block's output, in rounds with steps towards that output",
        reference="Yang et al. 2025, arXiv 2503.04992",
        gradient=GradientOf.OUTPUT,
    ),
    Method(
        name="sparse-swaps",
        solve=sparse_swaps.solve,
        options=sparse_swaps.SparseSwapsOptions,
        needs_statistics=True,
        unstructured=False,
        updates_weights=False,
        independent_rows=_always,
        summary="Wanda's mask, then the best exchange of a kept and a pruned weight, again and again",
        reference="Zimmer et al. 2025, arXiv 2512.10922",
    ),
    Method(
        name="sparsegpt",
        solve=sparsegpt.solve,
        options=sparsegpt.SparseGPTOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=True,
        independent_rows=_always,
        summary="column by column, every error compensated by the columns still to come",
        reference="Frantar and Alistarh 2023, arXiv 2301.00774",
    ),
    Method(
        name="alps",
        solve=alps.solve,
        options=alps.ALPSOptions,
        needs_statistics=True,
        unstructured=True,
        updates_weights=True,
        independent_rows=_never,
        summary="ADMM with projections onto the pattern and a growing penalty",
        reference="Meng et al. 2024, arXiv 2406.07831",
    ),
    Method(
        name="prox-gradient",
        solve=prox_gradient.solve,
        options=prox_gradient.ProxGradientOptions,
        needs_statistics=True,
        unstructured=False,
        updates_weights=True,
        independent_rows=_always,
        summary="proximal gradient descent with a growing N:M regulariser",
        reference="Kübler et al. 2025, arXiv 2501.18015, Algorithm 2",
    ),
    Method(
        name="prox-admm",
        solve=prox_admm.solve,
        options=prox_admm.ProxADMMOptions,
        needs_statistics=True,
        unstructured=False,
        updates_weights=True,
        independent_rows=_always,
        summary="ADMM with the exact proximal operator of the growing N:M regulariser",
        reference="Halve, after Kübler et al. 2025, arXiv 2501.18015",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def get(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        InputError: there is none; the message suggests what may have been meant.
    """
    return find_row(METHODS, name, "method")


def make_options(method: str | Method, **options: Any) -> Any:
    """Return the options of ``method``, the ones not given at their defaults.

    Raises:
        InputError: the method is unknown or has no option of that name, or a value is out of range.
    """
    method = get(method) if isinstance(method, str) else method
    return build_options(method.options, f"method {method.name}", options)
