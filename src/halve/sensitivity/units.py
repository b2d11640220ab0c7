"""What stays dense or is pruned as one: a parameter with all matrices in it, or parameters stored in one tensor."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from halve.model.plan import Matrix, Plan


@dataclass(frozen=True)
class Unit:
    """Matrices that stay dense all or none.

    Attributes:
        matrices: in the plan's order.
    """

    matrices: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """Name of its first parameter."""
        return self.matrices[0].parameter

    @cached_property
    def parameters(self) -> Mapping[str, tuple[Matrix, ...]]:
        """The matrices of each of its parameters, by full name."""
        names = dict.fromkeys(matrix.parameter for matrix in self.matrices)
        return {name: tuple(matrix for matrix in self.matrices if matrix.parameter == name) for name in names}

    @property
    def weights(self) -> int:
        """Number of weights in all of them."""
        return sum(matrix.d_out * matrix.d_in for matrix in self.matrices)

    @property
    def blocks(self) -> frozenset[int]:
        """Indices of the blocks that they are in."""
        return frozenset(matrix.block for matrix in self.matrices)


def units_of(plan: Plan, together: Collection[Sequence[str]] = ()) -> tuple[Unit, ...]:
    """Return the units of a plan, in its order.

    Args:
        plan: what would be pruned.
        together: names of parameters that are stored in one tensor.
    """
    leader = {name: group[0] for group in together for name in group}
    members: dict[str, list[Matrix]] = {}
    for matrix in plan.matrices:
        members.setdefault(leader.get(matrix.parameter, matrix.parameter), []).append(matrix)
    return tuple(Unit(tuple(matrices)) for matrices in members.values())
