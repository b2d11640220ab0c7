"""The table of methods that learn masks end to end: a `Learner` and one row each, all made alike.

``learner(targets, pattern, options, prior=…, diagonals=…)``: ``targets`` are `halve.model.masked.PrunedParameter`;
``prior`` has weights of a pruned checkpoint and ``diagonals`` second moments of inputs (`halve.learning.moments`), both
by the targets' names. Weights are float32 masters of the trainer's; nothing but `finish` makes them N:M, and it does.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halve.errors import InputError, PatternError
from halve.learning.methods import adaptive_ste, cast, maskllm, prox_admm, proxsparse
from halve.learning.methods.mask_learner import MaskLearner
from halve.lookup import build_options, find_row
from halve.maths.pattern import Pattern
from halve.model.masked import PrunedParameter


@dataclass(frozen=True, kw_only=True)
class LearningMethod:
    """A row of the table.

    Attributes:
        name: what the user writes.
        learner: what is called to make the learner.
        options: the frozen dataclass that it takes.
        trains: what is trained, and therefore differs at the end.
        patterns: which patterns it takes.
        takes_prior: whether the weights of a pruned checkpoint serve as a start, or tell it of a mask.
        takes_diagonals: whether second moments of inputs serve as a metric.
        rate: the peak learning rate where none is given; None: as for fine-tuning.
        decay: the weight decay where none is given.
        summary: one line for a listing.
        reference: where the method comes from.
        most_masks: that a group may have, C(M, N); None: any number.
    """

    name: str
    learner: Callable[..., MaskLearner]
    options: type[Any]
    trains: str
    patterns: str
    takes_prior: bool
    takes_diagonals: bool
    rate: float | None
    decay: float
    summary: str
    reference: str
    most_masks: int | None = None


_ROWS = (
    LearningMethod(
        name="maskllm",
        learner=maskllm.MaskLLM,
        options=maskllm.MaskLLMOptions,
        trains="masks",
        patterns="N:M with at most 70 masks a group",
        takes_prior=True,
        takes_diagonals=False,
        rate=5e-4,
        decay=0.1,
        summary="a distribution over the masks of each group, sampled with Gumbel noise, weights frozen",
        reference="Fang et al. 2024, arXiv 2409.17481",
        most_masks=maskllm.MOST_MASKS,
    ),
    LearningMethod(
        name="proxsparse",
        learner=proxsparse.ProxSparse,
        options=proxsparse.ProxSparseOptions,
        trains="masks; weights, norms and biases with keep=trained",
        patterns="N:M",
        takes_prior=False,
        takes_diagonals=False,
        rate=None,
        decay=0.0,
        summary="the exact proximal operator after every step, its strength found as the training goes",
        reference="Liu et al. 2025, arXiv 2502.00258",
    ),
    LearningMethod(
        name="ast",
        learner=adaptive_ste.AST,
        options=adaptive_ste.ASTOptions,
        trains="masks, weights, norms and biases",
        patterns="N:M",
        takes_prior=False,
        takes_diagonals=True,
        rate=None,
        decay=0.0,
        summary="gradients straight through the mask, which is chosen again every few steps; pruned weights decay",
        reference="Huang et al. 2024, arXiv 2407.20584; Zhou et al. 2021, arXiv 2102.04010",
    ),
    LearningMethod(
        name="cast",
        learner=cast.Cast,
        options=cast.CASTOptions,
        trains="masks, weights, norms, biases, and scales of half rows",
        patterns="N:M",
        takes_prior=False,
        takes_diagonals=False,
        rate=None,
        decay=0.0,
        summary="dense forward passes, in which the optimiser pulls pruned weights to zero ever harder",
        reference="Huang et al. 2025, arXiv 2509.25996",
    ),
    LearningMethod(
        name="prox-admm",
        learner=prox_admm.ProxADMM,
        options=prox_admm.ProxADMMOptions,
        trains="masks, weights, norms and biases",
        patterns="N:M",
        takes_prior=True,
        takes_diagonals=True,
        rate=None,
        decay=0.0,
        summary="the exact proximal operator of a growing regulariser while weights train, then a fixed mask",
        reference="Halve, after Kübler et al. 2025, arXiv 2501.18015",
    ),
)

LEARNING_METHODS: dict[str, LearningMethod] = {row.name: row for row in _ROWS}


def get(name: str) -> LearningMethod:
    """Return the method called ``name``.

    Raises:
        InputError: there is none; the message suggests what may have been meant.
    """
    return find_row(LEARNING_METHODS, name, "learning method")


def make_options(method: str | LearningMethod, **options: Any) -> Any:
    """Return the options of ``method``, the ones not given at their defaults.

    Raises:
        InputError: the method is unknown or has no option of that name, or a value is out of range.
    """
    method = get(method) if isinstance(method, str) else method
    return build_options(method.options, f"learning method {method.name}", options)


def check_pattern(method: LearningMethod, pattern: Pattern) -> None:
    """Refuse a pattern that a method does not take, before anything is loaded.

    Raises:
        PatternError: it is unstructured, or has too many masks a group.
    """
    if pattern.keep is None or pattern.group is None:
        raise PatternError(f"masks are learned for N:M patterns, not for {pattern}: choose 2:4, for example")
    if method.most_masks is not None and math.comb(pattern.group, pattern.keep) > method.most_masks:
        raise PatternError(
            f"{pattern} has {math.comb(pattern.group, pattern.keep)} masks a group, and {method.name} takes at most "
            f"{method.most_masks}: choose 2:4 or 4:8, for example, or another method"
        )


def make_learner(
    method: str | LearningMethod,
    targets: Iterable[PrunedParameter],
    pattern: str | Pattern,
    options: Any = None,
    *,
    prior: Mapping[str, Tensor] | None = None,
    diagonals: Mapping[str, Tensor] | None = None,
) -> MaskLearner:
    """Make a learner, and refuse what the method could not use.

    Args:
        method: a name or a row of the table.
        targets: the parameters to prune.
        pattern: N:M.
        options: of the method's dataclass; None is its defaults.
        prior: weights of a pruned checkpoint by name, for methods that take them.
        diagonals: second moments of the targets' inputs by name, (d_in,) each; a method that takes none ignores them.

    Raises:
        InputError: the method is unknown, takes no prior, or something does not fit the targets.
        PatternError: the method does not take the pattern, or it does not fit a target.
        CalibrationError: second moments are zero.
    """
    method = get(method) if isinstance(method, str) else method
    if prior is not None and not method.takes_prior:
        able = ", ".join(row.name for row in _ROWS if row.takes_prior)
        raise InputError(
            f"method {method.name} takes no prior: give the pruned model as the model itself, to begin from its "
            f"weights, or choose a method that takes one ({able})"
        )
    chosen = method.options() if options is None else options
    return method.learner(targets, Pattern.parse(pattern), chosen, prior=prior, diagonals=diagonals)
