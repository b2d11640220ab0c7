"""Before a run changes anything: what will be pruned, and how the stacks of blocks that hold it are run."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType

from torch import nn

from halve.errors import UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model import replay
from halve.model.blocks import Batch, capture, eager_experts, run_model
from halve.model.calls import Behaviour, Template
from halve.model.classify import LEAST_PRUNABLE, make_plan
from halve.model.observe import observe
from halve.model.plan import Matrix, Observed, Plan
from halve.model.stacks import DECODER, ENCODER, TEXT, Stack, choose_stacks, find_stacks
from halve.model.stream import Stream

_MASKS_OF: dict[str, tuple[str | None, str | None]] = {
    TEXT: ("attention_mask", None),
    ENCODER: ("attention_mask", None),
    DECODER: ("decoder_attention_mask", "attention_mask"),
}
"""Which masks of a batch are those of a tower; that of text says nothing of images."""


@dataclass(frozen=True)
class StackRun:
    """How to run a stack of blocks.

    Attributes:
        name: of the stack.
        blocks: its blocks, in order.
        behaviour: of the blocks.
        later: the blocks of stacks that run later, with what they return.
        short: short samples that the model takes.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    behaviour: Behaviour
    later: tuple[tuple[tuple[nn.Module, ...], tuple[Template, ...]], ...]
    short: tuple[Batch, ...] = ()

    def capture(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        directory: Path | None = None,
        *,
        beside: Path | None = None,
        reserved: int = 0,
        copies: int = 1,
    ) -> Stream:
        """Record what enters the stack in the model as it is now, as `halve.model.blocks.capture` does."""
        return capture(
            model,
            self.blocks,
            batches,
            self.behaviour,
            directory,
            beside=beside,
            reserved=reserved,
            copies=copies,
            passing=self.later,
        )


def plan_model(
    model: nn.Module,
    batches: Sequence[Batch],
    pattern: Pattern,
    skip: Sequence[str] = (),
    why_dense: Callable[[Matrix], str] | None = None,
    *,
    tower: str | None = None,
    together: Collection[Sequence[str]] = (),
    least: float = LEAST_PRUNABLE,
) -> tuple[Plan, list[StackRun]]:
    """Decide what will be pruned, and prove on short samples that the model can be run block by block.

    Args:
        model: the model, on the CPU, in evaluation mode.
        batches: the calibration set; short parts of the first and the last batch are run.
        pattern: the sparsity pattern.
        skip: shell-style patterns of parameters that stay dense.
        why_dense: as for `halve.model.classify.make_plan`.
        tower: as for `halve.model.stacks.default_stacks`; None is the text tower where the batches have tokens.
        together: as for `halve.model.classify.make_plan`, and ``least``.
        least: see ``together``.

    Returns:
        tuple[Plan, list[StackRun]]: the plan, and how to run each of its stacks.

    Raises:
        UnsupportedModelError: the model cannot be run block by block, or too little of a block can be pruned.
        InputError: nothing is left to prune, a skip pattern matches nothing, or a tower is not there or does not run.
    """
    stacks = find_stacks(model)
    with eager_experts(model):
        short, running = replay.short_samples(model, stacks, batches)
        known = {stack.name: stack for stack in running}
        others = [stack for stack in stacks if stack.name not in known]
        chosen = choose_stacks([*running, *others], type(model).__name__, tower, known)
        runs = [_stack_run(model, stack, running, short) for stack in chosen]
        members = [block for stack in chosen for block in stack.blocks]
        observed = observe(model, members, [partial(run_model, model, batch) for batch in short])
        observed = replace(observed, memory=_seeing_memory(observed, chosen, short))
    plan = make_plan(
        model,
        pattern,
        observed,
        skip,
        why_dense,
        stacks=chosen,
        together=together,
        least=least,
    )
    return plan, runs


def _stack_run(model: nn.Module, stack: Stack, running: Sequence[Stack], short: Sequence[Batch]) -> StackRun:
    """Verify that a stack can be run block by block, without those that run later if they are not needed for it."""
    members = tuple(stack.blocks)
    _refuse_closures(model, stack)
    later = []
    for other in running[running.index(stack) + 1 :]:
        try:
            templates = replay.watch_blocks(model, tuple(other.blocks), short[0])[0]
        except UnsupportedModelError:  # nothing is asked of it: it is computed, which only takes longer
            continue
        later.append((tuple(other.blocks), templates))
    masks = _MASKS_OF.get(stack.tower, (None, None))
    for passing in (tuple(later), ()) if later else ((),):
        try:
            behaviour = replay.verify_replay(model, members, short, masks=masks, passing=passing)
        except UnsupportedModelError:
            if not passing:
                raise
        else:
            return StackRun(stack.name, members, behaviour, passing, tuple(short))
    raise AssertionError


def _refuse_closures(model: nn.Module, stack: Stack) -> None:
    """Refuse a function set in place of a block's forward: a copy of the block would go on calling the original's."""
    for name, block in stack.members.items():
        if isinstance(block.__dict__.get("forward"), FunctionType):
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} has a function set in place of its forward, which a copy of the "
                "block would not follow: remove that patch, or set a bound method"
            )


def _seeing_memory(observed: Observed, stacks: Sequence[Stack], short: Sequence[Batch]) -> frozenset[str]:
    """Return the weights in a decoder whose inputs are as long as what the encoder reads, in every sample.

    None where the samples do not tell: an encoder of sounds has fewer positions than it reads.
    """
    read, fed = (
        {batch[name].shape[-1] for batch in short if name in batch} for name in ("input_ids", "decoder_input_ids")
    )
    if not read or read == fed:
        return frozenset()
    inside = tuple(f"{name}." for stack in stacks if stack.tower == DECODER for name in stack.members)
    return frozenset(name for name, lengths in observed.lengths.items() if name.startswith(inside) and lengths == read)
