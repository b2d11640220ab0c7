"""The damage of every matrix: pruned quickly and alone, how far does what the model says move?

For each batch the dense model is run once, and what every block returns is kept. For each unit the model's own code
then runs with that unit pruned, from its block on: on average half of the model.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from halve.errors import UnsupportedModelError, counted
from halve.maths.pattern import Pattern
from halve.model.blocks import Batch
from halve.model.replay import probe_batches
from halve.sensitivity.logits import divergence, log_probabilities
from halve.sensitivity.quick import pruned_in
from halve.sensitivity.restart import Passage, beginnings
from halve.sensitivity.units import Unit


def damages_alone(
    model: nn.Module,
    blocks: Sequence[str],
    units: Sequence[Unit],
    batches: Sequence[Batch],
    norms: Mapping[str, Tensor],
    pattern: Pattern,
    warn: Callable[[str], None] = lambda _: None,
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
        warn: called with a sentence before passes that take longer than half of the model on average.

    Returns:
        dict[str, float]: by the unit's name, at least 0.

    Raises:
        UnsupportedModelError, InputError: as `halve.sensitivity.logits.log_probabilities`; or a block did not run.
    """
    members = [model.get_submodule(name) for name in blocks]
    plain = batches[0].keys() <= {"input_ids", "attention_mask"}  # rows of anything else may belong together
    begins = beginnings(model, members, probe_batches(batches)[0] if plain else batches[0])
    if whole := [unit for unit in units if any(begins.get(block, block) != block for block in unit.blocks)]:
        warn(
            f"the damage of {len(whole)} of {counted(len(units), 'parameter')} is measured by passes through all "
            f"blocks, and not from its own block on (the first is {whole[0].name}), since blocks leave something for "
            "later ones: that takes up to twice as long, and fewer keep_dense_tokens take less"
        )
    totals = dict.fromkeys((unit.name for unit in units), 0.0)
    positions = 0
    for batch in batches:
        passage = Passage(members)
        with passage.recording():
            dense = log_probabilities(model, batch)
        for unit in units:
            if missing := sorted(unit.blocks - set(passage.order)):
                raise UnsupportedModelError(
                    f"{blocks[missing[0]]} does not run on some of the calibration data, so the damage of {unit.name} "
                    "cannot be measured: leave it dense with skip"
                )
            first = min((begins[block] for block in unit.blocks), key=passage.order.index)
            with passage.beginning_at(first), pruned_in(model, [unit], norms, pattern):
                totals[unit.name] += divergence(dense, log_probabilities(model, batch))
        positions += len(dense)
    return {name: max(0.0, total / positions) for name, total in totals.items()}
