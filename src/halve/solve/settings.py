"""What to do to a matrix, checked as far as that is possible without one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from halve.errors import InputError, PatternError
from halve.maths.pattern import Pattern
from halve.solve import methods
from halve.solve import refit as refits
from halve.solve.defaults import Defaults
from halve.solve.methods import Method
from halve.solve.objective import Objective
from halve.solve.refit import Refit

FALLBACKS = ("magnitude", "wanda")
"""Methods that cannot fail for numerical reasons."""
_REFIT_PREFIX = "refit_"
OBJECTIVE_OPTIONS = tuple(field.name for field in fields(Objective))
"""What users may take for options of a method, and is asked for otherwise."""


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """What to do to a matrix.

    Attributes:
        pattern: to prune to.
        method: the row of `halve.solve.methods.METHODS`.
        method_options: of its options' class.
        refit: the row of `halve.solve.refit.REFITS`.
        refit_options: of its options' class.
        fallback: method for where the asked one fails, or None.
        objective: what is minimised.
    """

    pattern: Pattern
    method: Method
    method_options: Any
    refit: Refit
    refit_options: Any
    fallback: str | None
    objective: Objective


def validate_settings(
    method: str, refit: str, pattern: str | Pattern, *, fallback: str | None = None, **options: Any
) -> None:
    """Check names and options that will later go to ``prune_weight``, without a matrix.

    Args:
        method: a name in ``halve.solve.methods.METHODS``.
        refit: ``none``, ``cg``, ``gd``, ``swap`` or ``int4``.
        pattern: N:M or a percentage.
        fallback: ``magnitude``, ``wanda`` or None.
        **options: of the method, and of the refit with the prefix ``refit_``.

    Raises:
        InputError: a name or an option is unknown, or a value is out of range.
        PatternError: the pattern is malformed, or not one for this method.
    """
    solver_settings(method, refit, pattern, fallback, Objective(), options)


def effective_options(method: str, refit: str, **options: Any) -> dict[str, Any]:
    """Return all options of a method and a refit (with the prefix ``refit_``), those not given at their defaults.

    Args:
        method: a name in ``halve.solve.methods.METHODS``.
        refit: ``none``, ``cg``, ``gd``, ``swap`` or ``int4``.
        **options: as for ``prune_weight``.

    Raises:
        InputError: a name or an option is unknown, or a value is out of range.
    """
    of_method, of_refit = _split_options(methods.get(method), refits.get(refit), options)
    return asdict(of_method) | {f"{_REFIT_PREFIX}{name}": value for name, value in asdict(of_refit).items()}


def method_defaults(method: str, options: Mapping[str, Any]) -> Defaults:
    """Return what goes with a method and its options where the user says nothing.

    Args:
        method: a name in ``halve.solve.methods.METHODS``.
        options: as for ``prune_weight``.

    Raises:
        InputError: the method or an option of it is unknown, or a value is out of range.
    """
    row = methods.get(method)
    return row.defaults(_method_options(row, options))


def solver_settings(
    method: str,
    refit: str,
    pattern: str | Pattern,
    fallback: str | None,
    objective: Objective,
    options: Mapping[str, Any],
) -> SolverSettings:
    """Look up and check everything that `halve.prune_weight` is told besides the matrix; its arguments are those.

    Raises:
        InputError: a name or an option is unknown, or a value is out of range.
        PatternError: the pattern is malformed, or not one for this method.
    """
    pattern = Pattern.parse(pattern)
    row, refit_row = methods.get(method), refits.get(refit)
    method_options, refit_options = _split_options(row, refit_row, options)
    if fallback is not None and fallback not in FALLBACKS:
        raise InputError(f"fallback {fallback!r} is unknown: choose one of {', '.join(FALLBACKS)}, or leave it out")
    if not pattern.structured and not row.unstructured:
        takers = ", ".join(other.name for other in methods.METHODS.values() if other.unstructured)
        raise PatternError(
            f"method {row.name} prunes to N:M such as 2:4, not to {pattern}: for that choose one of {takers}"
        )
    if not pattern.structured and refit_row.changes_mask:
        raise PatternError(
            f"refit {refit_row.name} exchanges weights within the groups of N:M, not of {pattern}: use cg"
        )
    if refit_row.pattern not in {None, pattern.text}:
        raise PatternError(f"refit {refit_row.name} is for {refit_row.pattern}, not for {pattern}: use cg")
    return SolverSettings(
        pattern=pattern,
        method=row,
        method_options=method_options,
        refit=refit_row,
        refit_options=refit_options,
        fallback=fallback,
        objective=objective,
    )


def _split_options(method: Method, refit: Refit, options: Mapping[str, Any]) -> tuple[Any, Any]:
    of_method = _method_options(method, options)
    tolerance = method.defaults(of_method).refit_tolerance
    of_refit = {} if tolerance is None or refit.name not in {"cg", "int4"} else {"tolerance": tolerance}
    of_refit |= {name.removeprefix(_REFIT_PREFIX): value for name, value in options.items() if _is_of_refit(name)}
    return of_method, refits.make_options(refit, **of_refit)


def _method_options(row: Method, options: Mapping[str, Any]) -> Any:
    if stray := next((name for name in options if name in OBJECTIVE_OPTIONS), None):
        raise InputError(f"{stray} belongs to the objective: write objective=halve.Objective({stray}=…)")
    return methods.make_options(row, **{name: value for name, value in options.items() if not _is_of_refit(name)})


def _is_of_refit(name: str) -> bool:
    return name.startswith(_REFIT_PREFIX)
