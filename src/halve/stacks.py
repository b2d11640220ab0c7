"""Which matrices of a block are solved together, and what that costs."""

from collections.abc import Iterator, Mapping, Sequence

from halve.gram import Statistics
from halve.layers import Matrix

_STACK_WEIGHTS = 1 << 28
"""Most weights of matrices that are solved together: 1 GiB in float32, several of which a solver needs."""


def stacks(
    matrices: Sequence[Matrix], statistics: Mapping[str, Statistics | None], most: int = _STACK_WEIGHTS
) -> Iterator[list[Matrix]]:
    """Yield groups of neighbours that share their statistics.

    Args:
        matrices: of one block, in order.
        statistics: of each matrix's inputs, by name.
        most: weights that a group of several may have.
    """
    stack: list[Matrix] = []
    for matrix in matrices:
        shared = statistics.get(matrix.name)
        size = sum(other.d_out * other.d_in for other in (*stack, matrix))
        if stack and (shared is None or shared is not statistics.get(stack[0].name) or size > most):
            yield stack
            stack = []
        stack.append(matrix)
    if stack:
        yield stack


def operations(matrix: Matrix) -> float:
    """About how many multiplications the default solver takes: products of every row, and factorisations."""
    return float(matrix.d_in**2 * (60 * matrix.d_out + 15 * matrix.d_in))
