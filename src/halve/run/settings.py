"""What to do to every matrix of a model, checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halve.checks import check_count, is_number
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.classify import LEAST_PRUNABLE
from halve.model.plan import Matrix
from halve.model.reconstruct import BLOCK, Reconstruction
from halve.option_groups import group, internal
from halve.order.reordering import FOLD, NONE, ORDERS
from halve.planner.where_faster import WhereFaster
from halve.run.batch_norms import ESTIMATE, KEEP
from halve.sensitivity.keep_dense import KeepDense
from halve.solve import methods
from halve.solve.defaults import Defaults
from halve.solve.objective import AUTO, Objective
from halve.solve.settings import effective_options, method_defaults, validate_settings

MIN_EXPERT_TOKENS = 32
"""Below this many calibration tokens an expert's statistics are not used; it is pruned by magnitude, if any
fallback is allowed, and listed."""


def default_reconstruction(method: str, options: Mapping[str, Any]) -> str:
    """Return what becomes of the blocks where nobody says: ``block`` or ``none``.

    Raises:
        InputError: the method or an option of it is unknown, or a value is out of range.
    """
    return BLOCK if method_defaults(method, options).reconstruct else "none"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do to every matrix.

    Attributes:
        pattern: ``N:M`` keeps N of every M consecutive weights; ``S%`` zeroes S percent of each row.
        method: what chooses the weights to keep; see ``halve methods``.
        refit: re-adjustment of the kept weights: ``none``, ``cg``, ``gd``, ``swap`` or ``int4``.
        options: further options of method and refit.
        skip: shell-style patterns of parameters that stay dense, such as ``*.down_proj.*``.
        fallback: ``magnitude`` or ``wanda``, where the asked method fails; without one the run stops there, also at an
            expert that saw too few tokens.
        min_expert_tokens: with a fallback, an expert that saw fewer tokens is pruned by magnitude, and reported.
        reconstruction: how to tune each block once its matrices are pruned; None leaves it at that.
        objective: shrinkage of the statistics, and targets from the dense model.
        tower: the part of a model that is pruned, where it has several: ``text``, ``vision``, ``audio`` or another, or
            ``all`` that run on the calibration data. Text where nobody says; of an
            encoder-decoder, whose parts are ``encoder`` and ``decoder``, both.
        least_prunable: refuse a model where less than this share of a block's matrix weights can be pruned, 0 to 1.
        permute: ``fold`` reorders channels before they are grouped, where that folds exactly into neighbouring
            weights (`halve.order`); ``none`` leaves them where they are; ``auto`` does what goes with the method, where
            the pattern has groups and something looks at statistics.
        only_where_faster: which matrices stay dense for their speed; None leaves that out of account.
        batch_norm: running statistics of the batch norms in pruned blocks: ``estimate`` them anew on the calibration
            data, where there is any, or ``keep`` the dense model's. Models without batch norms are not concerned.
        keep_dense: which of the others stay dense for what pruning them costs; None leaves none.
    """

    pattern: Pattern = Pattern("2:4")
    method: str = "auto"
    refit: str = "cg"
    options: Mapping[str, Any] = internal(factory=dict)
    skip: tuple[str, ...] = ()
    fallback: str | None = None
    min_expert_tokens: int = MIN_EXPERT_TOKENS
    reconstruction: Reconstruction | None = group(None, prefix="reconstruct_")
    objective: Objective = group(factory=Objective)
    tower: str | None = None
    least_prunable: float = LEAST_PRUNABLE
    permute: str = AUTO
    only_where_faster: WhereFaster | None = group(None)
    batch_norm: str = ESTIMATE
    keep_dense: KeepDense | None = group(None)

    def why_dense(self, matrix: Matrix) -> str:
        """Return why a matrix that could be pruned stays dense, as half a sentence; empty if it is pruned."""
        slow = "" if self.only_where_faster is None else self.only_where_faster.why_dense(matrix, self.pattern)
        return slow or ("" if self.keep_dense is None else self.keep_dense.why_dense(matrix))

    @property
    def matches_dense(self) -> bool:
        """Whether targets are to come from the dense model, where its inputs can be paired with the pruned model's."""
        return self.objective.blend(self.defaults) > 0.0

    @property
    def uses_statistics(self) -> bool:
        """Whether the method, the refit or targets from the dense model look at H."""
        return methods.get(self.method).needs_statistics or self.refit != "none" or self.matches_dense

    @property
    def reorders(self) -> bool:
        """Whether channels are reordered before they are grouped."""
        if self.permute != AUTO:
            return self.permute == FOLD
        return self.defaults.reorder and self.pattern.structured and self.uses_statistics

    @property
    def defaults(self) -> Defaults:
        """What goes with the method where nothing else was said."""
        return method_defaults(self.method, self.options)

    @property
    def all_options(self) -> dict[str, Any]:
        """The options of method and refit, those not given at their defaults."""
        return effective_options(self.method, self.refit, **self.options)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method, the refit, the reconstruction or the choice of what stays dense looks at it."""
        return self.uses_statistics or self.reconstruction is not None or self.keep_dense is not None

    def check_objective(self) -> None:
        """Refuse an objective of which a part would have no effect.

        Raises:
            InputError: shrinkage or an order of channels where nothing looks at H, an order for a pattern without
                groups, a ridge where no target comes from the dense model, or a reconstruction that would move weights
                off the grid that a refit has put them on.
        """
        if self.refit == "int4" and self.reconstruction is not None:
            raise InputError(
                "refit int4 makes integers of the kept weights, and reconstructing blocks would move them: prune with "
                "refit cg and the reconstruction, then what comes out once more with method magnitude and refit int4"
            )
        if self.permute == FOLD and not self.pattern.structured:
            raise InputError(
                f"permute {FOLD} puts channels into other groups, and {self.pattern} has none: leave it out"
            )
        if self.permute == FOLD and not self.uses_statistics:
            raise InputError(
                f"permute {FOLD} weighs channels by statistics, and {self.method} with refit {self.refit} uses none: "
                "leave it out, or give refit cg"
            )
        if self.objective.shrinkage and not self.uses_statistics:
            raise InputError(
                f"shrinkage acts on statistics, which {self.method} with refit {self.refit} does not use: leave it out"
            )
        if self.objective.match_ridge != Objective().match_ridge and not self.matches_dense:
            raise InputError("match_ridge goes with targets from the dense model: give match_dense too")

    @property
    def as_followed(self) -> "Settings":
        """The same with every default filled in that depends on the method.

        ``match_dense`` is what is done where the dense model's inputs can be paired with the pruned model's, which is
        not so in mixtures of experts.
        """
        objective, defaults = self.objective, self.defaults
        shrinkage = AUTO if objective.chooses_shrinkage(defaults) else objective.shrinkage or 0.0
        followed = replace(objective, shrinkage=shrinkage, match_dense=objective.blend(defaults))
        order = FOLD if self.reorders else NONE
        return replace(self, options=self.all_options, objective=followed, permute=order)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, Sequence) or not all(isinstance(each, str) for each in skip):
            raise InputError(f"skip must be names of parameters, in a list, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(skip))
        Objective.of(self.objective)
        check_count("min_expert_tokens", self.min_expert_tokens)
        if self.batch_norm not in (ESTIMATE, KEEP):
            raise InputError(f"batch_norm = {self.batch_norm!r} is not known: choose one of {ESTIMATE}, {KEEP}")
        if not is_number(self.least_prunable) or not 0.0 <= self.least_prunable <= 1.0:
            raise InputError(f"least_prunable must be a share between 0 and 1, got {self.least_prunable!r}")
        if self.permute not in (AUTO, *ORDERS):
            raise InputError(f"permute = {self.permute!r} is not known: choose one of {', '.join((AUTO, *ORDERS))}")
        if self.tower is not None and not isinstance(self.tower, str):
            raise InputError(f"tower must be the name of a part of the model, such as 'text', got {self.tower!r}")
        validate_settings(self.method, self.refit, self.pattern, fallback=self.fallback, **self.options)
