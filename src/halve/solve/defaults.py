"""What goes with a method where the user says nothing about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """What goes with a method and its options; as published methods have it, nothing does.

    Attributes:
        choose_shrinkage: whether H is shrunk by as much as held-out loss asks for.
        match_dense: how far targets are the dense model's outputs, where both models' inputs are known.
        reconstruct: whether the blocks of a model are tuned after it.
        reorder: whether channels are reordered, where that folds into neighbouring weights.
        refit_tolerance: of the refit ``cg``; None leaves its own.
    """

    choose_shrinkage: bool = False
    match_dense: float = 0.0
    reconstruct: bool = False
    reorder: bool = False
    refit_tolerance: float | None = None
