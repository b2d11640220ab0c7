"""The damage of every matrix: pruned quickly and alone, how far does what the model says move?

For each batch the dense model is run once, and what every block returns is kept. For each unit the model's own code
then runs with that unit pruned, where the blocks before it return what they returned: on average half of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from halve.maths.pattern import Pattern
from halve.model.blocks import Batch, replaced_forward
from halve.sensitivity.logits import divergence, log_probabilities
from halve.sensitivity.quick import pruned_in
from halve.sensitivity.units import Unit


def damages_alone(
    model: nn.Module,
    blocks: Sequence[str],
    units: Sequence[Unit],
    batches: Sequence[Batch],
    norms: Mapping[str, Tensor],
    pattern: Pattern,
    *,
    restart: bool = True,
) -> dict[str, float]:
    """Return ``KL(dense ‖ pruned)`` of each unit pruned alone, in nats, mean over all positions that count.

    Memory besides the model: what every block returns for one batch, and three times its log-probabilities.

    Args:
        model: dense, where it is run; afterwards as before.
        blocks: names of its blocks.
        units: what to prune, one by one.
        batches: to measure on.
        norms: `halve.sensitivity.quick.input_norms`.
        pattern: to prune to.
        restart: whether blocks before the pruned one may be left out: not where blocks write into objects that later
            ones read.

    Returns:
        dict[str, float]: by the unit's name, at least 0.

    Raises:
        UnsupportedModelError, InputError: as `halve.sensitivity.logits.log_probabilities`.
    """
    members = [model.get_submodule(name) for name in blocks]
    totals = dict.fromkeys((unit.name for unit in units), 0.0)
    positions = 0
    for batch in batches:
        with _recording(members) as returned:
            dense = log_probabilities(model, batch)
        order = list(returned)
        for unit in units:
            first = min(order.index(block) for block in unit.blocks) if restart else 0
            before = {members[block]: returned[block] for block in order[:first]}
            with _returning(before), pruned_in(model, [unit], norms, pattern):
                totals[unit.name] += divergence(dense, log_probabilities(model, batch))
        positions += len(dense)
    return {name: max(0.0, total / positions) for name, total in totals.items()}


@contextmanager
def _recording(members: Sequence[nn.Module]) -> Iterator[dict[int, Any]]:
    """Yield what each block returns, by its index, in the order in which they run inside."""
    returned: dict[int, Any] = {}

    def keep(index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        returned[index] = output

    with ExitStack() as stack:
        for index, block in enumerate(members):
            stack.callback(block.register_forward_hook(partial(keep, index)).remove)
        yield returned


@contextmanager
def _returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let blocks return what they are said to, without computing it."""

    def giving(output: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: output

    with ExitStack() as stack:
        for block, output in outputs.items():
            stack.enter_context(replaced_forward(block, giving(output)))
        yield
