"""The best method for an effort or a time limit: what `halve` uses where nobody asks for a method.

``prox-admm`` wherever its proximal operator is fast (2:4 and 1:M), ``alps`` for every other pattern; see
``docs/benchmarks.md`` for the losses and times behind the choice.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.checks import check_positive
from halve.errors import InputError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.maths.proximal import has_fast_solver
from halve.maths.quadratic import row_losses
from halve.solve import exact_swaps
from halve.solve.defaults import Defaults
from halve.solve.methods import alps, prox_admm
from halve.solve.methods.alps import ALPSOptions
from halve.solve.methods.prox_admm import ProxADMMOptions
from halve.solve.outcome import Outcome
from halve.solve.refit import refit_cg

_SCHEDULES = {
    "fast": ProxADMMOptions(lambda0=1.0, lambda_growth=1.4, rho=0.4, rho_growth=1.8, exchanges=False),
    "balanced": ProxADMMOptions(),
    "best": ProxADMMOptions(lambda_growth=1.05, rho_growth=1.1),
}
EFFORTS = tuple(_SCHEDULES)
_NEXT_TAKES = {"fast": 4.0, "balanced": 2.0, "best": math.inf}
"""How many times as long the next effort takes."""
_COMPARED_TO = 1e-2
"""Tolerance of the refit after which the rows of two efforts are compared."""
_FAST_TOLERANCE = 1e-2
"""Tolerance of the refit ``cg`` after the effort ``fast``, whose iteration ends near the best weights on its mask: more
would cost as much time as the iteration itself for a thousandth of the loss."""
MATCH_DENSE = 0.25
"""How far targets are the dense model's outputs; not for ``fast``, since they take a second forward pass."""


@dataclass(frozen=True)
class AutoOptions:
    """Options of the automatic choice.

    Attributes:
        effort: for 2:4 and 1:M ``fast`` (the time of sparsegpt with a refit, for less loss; no targets from the dense
            model unless asked for), ``balanced``, or ``best``, which takes twice as many iterations and then makes
            exact swaps until none helps. For other patterns the first two differ by the refit and the targets alone,
            and for unstructured ones so do all three.
        time_limit: seconds, > 0, for the matrix or, where a model is pruned, for all of its matrices; None: no limit.
            With one, ``effort`` is where to begin: higher efforts follow as long as there is time for them, each row
            keeps the better of its results, and exact swaps use up the rest, the rows that lose most first. What is
            begun is finished, so the first effort may take longer than the limit; and results depend on the machine's
            speed.
    """

    effort: str = "balanced"
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.effort not in _SCHEDULES:
            raise InputError(f"effort must be one of {', '.join(EFFORTS)}, got {self.effort!r}")
        if self.time_limit is not None:
            check_positive("time_limit of auto", self.time_limit)


def defaults(options: AutoOptions) -> Defaults:
    """Return what goes with an effort: shrinkage always; ``best`` reconstructs blocks, ``fast`` takes no detours."""
    fast = options.effort == "fast"
    return Defaults(
        choose_shrinkage=True,
        match_dense=0.0 if fast else MATCH_DENSE,
        reconstruct=options.effort == "best",
        reorder=not fast,
        refit_tolerance=_FAST_TOLERANCE if fast else None,
    )


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: AutoOptions) -> Outcome:
    """Prune by the method that serves the pattern and the effort.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M or a percentage.
        options: the effort and the time limit.

    Returns:
        Outcome: of the method chosen, which it names; after swaps its facts include theirs.

    Raises:
        CalibrationError: the Gram matrix is zero.
        FactorisationError: the Gram matrix could not be factorised.
    """
    deadline = math.inf if options.time_limit is None else time.perf_counter() + options.time_limit
    if not has_fast_solver(pattern):
        outcome = alps.solve(weight, stats, pattern, ALPSOptions())
    elif options.time_limit is None:
        outcome = prox_admm.solve(weight, stats, pattern, _SCHEDULES[options.effort])
    else:
        outcome = _climb(weight, stats, pattern, options.effort, deadline)
    wanted = options.effort == "best" or options.time_limit is not None
    if not wanted or not pattern.structured or time.perf_counter() > deadline:
        return outcome
    limits = exact_swaps.SwapOptions()
    refined, facts = exact_swaps.refine(
        outcome.weight, weight, stats.gram, pattern, limits.max_swaps, limits.tolerance, deadline=deadline
    )
    of_swaps = {name: value for name, value in facts.items() if name.startswith("swap")}
    return replace(outcome, weight=refined, facts={**outcome.facts, **of_swaps})


def _climb(weight: Tensor, stats: Statistics, pattern: Pattern, effort: str, deadline: float) -> Outcome:
    """Take one effort after another from ``effort`` on while there is time, and keep the better rows of each."""
    best: Outcome | None = None
    for count, name in enumerate(EFFORTS[EFFORTS.index(effort) :], start=1):
        begun = time.perf_counter()
        found = prox_admm.solve(weight, stats, pattern, _SCHEDULES[name])
        fitted, _ = refit_cg(
            found.weight, weight, stats.gram, pattern.keep_mask(found.weight.abs()), tolerance=_COMPARED_TO
        )
        found = replace(found, weight=fitted)
        best = found if best is None else _better_rows(best, found, weight, stats.gram)
        best.facts["efforts"] = float(count)
        now = time.perf_counter()
        if now + _NEXT_TAKES[name] * (now - begun) > deadline:
            break
    assert best is not None  # noqa: S101 - there is at least one effort
    return best


def _better_rows(one: Outcome, other: Outcome, weight: Tensor, gram: Tensor) -> Outcome:
    """Return the later outcome with those rows of the earlier one that lose less."""
    keep = row_losses(one.weight, weight, gram) < row_losses(other.weight, weight, gram)
    return replace(other, weight=torch.where(keep.unsqueeze(-1), one.weight, other.weight))
