"""The best method for an effort: what `halve` uses where nobody asks for a method.

``prox-admm`` wherever its proximal operator is fast (2:4 and 1:M), ``alps`` for every other pattern; see
``docs/benchmarks.md`` for the losses and times behind the choice.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from halve import swap
from halve.errors import InputError
from halve.gram import Statistics
from halve.methods import alps, prox_admm
from halve.methods.alps import ALPSOptions
from halve.methods.prox_admm import ProxADMMOptions
from halve.outcome import Outcome
from halve.pattern import Pattern
from halve.proximal import has_fast_solver

_SCHEDULES = {
    "fast": ProxADMMOptions(lambda0=0.05, lambda_growth=1.3, rho=0.2, rho_growth=1.6),
    "balanced": ProxADMMOptions(),
    "best": ProxADMMOptions(lambda_growth=1.05, rho_growth=1.1),
}
EFFORTS = tuple(_SCHEDULES)


@dataclass(frozen=True)
class AutoOptions:
    """Options of the automatic choice.

    Attributes:
        effort: for 2:4 and 1:M ``fast`` (faster than alps, and as good), ``balanced``, or
            ``best``, which takes twice as many iterations and then makes exact swaps until none helps. For other
            patterns the first two are the same, and for unstructured ones all three.
    """

    effort: str = "balanced"

    def __post_init__(self) -> None:
        if self.effort not in _SCHEDULES:
            raise InputError(f"effort must be one of {', '.join(EFFORTS)}, got {self.effort!r}")


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: AutoOptions) -> Outcome:
    """Prune by the method that serves the pattern and the effort.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M or a percentage.
        options: the effort.

    Returns:
        Outcome: of the method chosen, which it names; with ``best`` its facts include those of the swaps.

    Raises:
        CalibrationError: the Gram matrix is zero.
        FactorisationError: the Gram matrix could not be factorised.
    """
    if has_fast_solver(pattern):
        outcome = prox_admm.solve(weight, stats, pattern, _SCHEDULES[options.effort])
    else:
        outcome = alps.solve(weight, stats, pattern, ALPSOptions())
    if options.effort != "best" or not pattern.structured:
        return outcome
    limits = swap.SwapOptions()
    refined, facts = swap.refine(outcome.weight, weight, stats.gram, pattern, limits.max_swaps, limits.tolerance)
    of_swaps = {name: value for name, value in facts.items() if name.startswith("swap")}
    return replace(outcome, weight=refined, facts={**outcome.facts, **of_swaps})
