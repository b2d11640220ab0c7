"""Which units stay dense: those that cost most per weight, until a share of the weights is spent."""

from collections.abc import Mapping, Sequence

from halve.sensitivity.units import Unit


def by_cost(units: Sequence[Unit], damages: Mapping[str, float]) -> list[Unit]:
    """Return units by damage per weight, the costliest first; equal ones in their order.

    Args:
        units: in the plan's order.
        damages: of each, by name.
    """
    return sorted(units, key=lambda unit: -damages[unit.name] / unit.weights)


def choose(units: Sequence[Unit], damages: Mapping[str, float], most: int) -> list[Unit]:
    """Return the units that stay dense, in the plan's order.

    The costliest per weight comes first; one that does not fit into what is left is passed over, and smaller ones after
    it fill the rest. So the damage spared is at most that of one unit below the best possible choice.

    Args:
        units: in the plan's order.
        damages: of each, by name.
        most: weights that may stay dense.
    """
    left = most
    chosen = set()
    for unit in by_cost(units, damages):
        if unit.weights <= left:
            left -= unit.weights
            chosen.add(unit.name)
    return [unit for unit in units if unit.name in chosen]
