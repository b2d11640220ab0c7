"""Block reconstruction: after a block's matrices are pruned, tune what survived against the dense block's output.

The loss of one matrix says nothing of how the errors of a block's matrices add up, nor of those that earlier blocks
have left in its input. Here a block sees the pruned model's hidden states and is trained, masks fixed, to return what
the dense model's block returned on its own: ``Σ |B(x̃) - B₀(x)|²`` over the calibration tokens. As in AdaRound's and
BRECQ's reconstruction for quantisation (Nagel et al. 2020, arXiv 2004.10568; Li et al. 2021, arXiv 2102.05426).
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from halve.checks import check_count, check_positive, is_number
from halve.errors import CalibrationError, InputError
from halve.lookup import build_options
from halve.model.calls import Call, hidden_of
from halve.model.masked import FixedMasks, pruned_parameters
from halve.model.stream import call_block

RATES = (1e-3, 2e-3, 4e-3)
"""The learning rates that are tried where none is given."""


@dataclass(frozen=True)
class Reconstruction:
    """How to tune a block.

    Attributes:
        epochs: passes over the calibration set, >= 1.
        learning_rate: of Adam at the start, > 0; it falls to zero along a cosine. Where nobody says, the first block
            chooses among 0.001, 0.002 and 0.004 (`RATES`) by the error on the held-out batches; without any it is
            the first of them.
        held_out: share of the batches, at least one if above 0, that are not trained on but decide which learning rate
            and which epoch's weights stay, in [0, 0.5]; a set of fewer than four batches is trained on whole.
    """

    epochs: int = 6
    learning_rate: float | None = None
    held_out: float = 0.125

    def __post_init__(self) -> None:
        check_count("epochs of the reconstruction (--reconstruct-epochs)", self.epochs)
        if self.learning_rate is not None:
            check_positive("learning_rate of the reconstruction (--reconstruct-learning-rate)", self.learning_rate)
        if not is_number(self.held_out) or not 0.0 <= self.held_out <= 0.5:
            raise InputError(
                "held_out of the reconstruction (--reconstruct-held-out) must lie between 0 and 0.5, "
                f"got {self.held_out!r}"
            )


BLOCK = "block"
"""What users write to ask for a reconstruction with the defaults."""


def parse_reconstruction(asked: "Reconstruction | str | None", **options: Any) -> "Reconstruction | None":
    """Return the options of the reconstruction that was asked for.

    Args:
        asked: ``block``, ready options, or ``none`` or None for no reconstruction.
        **options: of `Reconstruction`, where ``asked`` is ``block``.

    Raises:
        InputError: ``asked`` or an option is not understood.
    """
    if asked == BLOCK:
        return cast("Reconstruction", build_options(Reconstruction, "the reconstruction", options))
    if asked is not None and asked != "none" and not isinstance(asked, Reconstruction):
        raise InputError(f"reconstruct {asked!r} is not understood: write {BLOCK} or none")
    if options:
        raise InputError(
            f"{next(iter(options))!r} is an option of the reconstruction: it goes with reconstruct {BLOCK} "
            f"(--reconstruct {BLOCK})"
        )
    return asked if isinstance(asked, Reconstruction) else None


@dataclass(frozen=True)
class Example:
    """One batch for a block.

    Attributes:
        hidden: (batch, sequence, d_model), what enters the pruned block.
        call: the block's other arguments.
        target: (batch, sequence, d_model), what the dense model's block returned.
        valid: (batch, sequence) bool of the positions that count, None when all do.
    """

    hidden: Tensor
    call: Call
    target: Tensor
    valid: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a reconstruction achieved.

    Attributes:
        before: relative error of the block's output, ``Σ|e|² / Σ|target|²``, on the held-out batches (on all of them
            where none was held out).
        after: the same afterwards, with the weights rounded to the model's dtype; never larger.
        epoch: the epoch whose weights stay, 0 if none was better than what was there.
        learning_rate: with which they were reached; None if ``epoch`` is 0.
        steps: optimiser steps taken, with all learning rates.
        held_out: number of batches held out.
    """

    before: float
    after: float
    epoch: int
    learning_rate: float | None
    steps: int
    held_out: int


def reconstruct(
    block: nn.Module,
    masks: Mapping[str, Tensor],
    examples: Callable[[int], Example],
    count: int,
    options: Reconstruction,
    precision: torch.dtype,
    stored: Mapping[str, torch.dtype],
) -> Tuned:
    """Tune parameters of a block in place; pruned weights stay exactly zero. Batches come in a fixed random order.

    Args:
        block: in float32.
        masks: for each pruned parameter, by its name in ``block``, where it may differ from zero.
        examples: gives batch number i, on the device of ``block``.
        count: number of batches.
        options: how to tune.
        precision: dtype of the products in forward and backward passes; weights and updates are float32.
        stored: the parameters to tune, by name, and the dtype that each is kept in by the model (`trainable`).

    Returns:
        Tuned: the errors before and after.

    Raises:
        CalibrationError: the error is not finite before anything was tuned.
    """
    spared = max(1, round(options.held_out * count)) if count >= 4 and options.held_out > 0.0 else 0
    training = range(count - spared)
    judged = range(count - spared, count) if spared else training
    tried = RATES if spared else RATES[:1]
    rates = tried if options.learning_rate is None else (options.learning_rate,)
    trained = {name: block.get_parameter(name) for name in stored}
    fixed = FixedMasks(pruned_parameters(block, dict.fromkeys(masks, "out_in")), masks)

    def error() -> float:
        return _error(block, (examples(i) for i in judged), precision)

    with requiring_gradients(block, trained.values()):
        before = best = error()
        if not math.isfinite(before):
            raise CalibrationError("the output of the pruned block is not finite")
        given = kept = _snapshot(trained)
        epoch_kept, rate_kept = 0, None
        for rate in rates:
            _put(trained, given)
            for epoch in _epochs(block, fixed, trained, examples, training, options.epochs, rate, precision):
                found = error()
                if found < best:  # false for NaN
                    best, kept, epoch_kept, rate_kept = found, _snapshot(trained), epoch, rate
        if epoch_kept:
            _put(trained, {name: kept[name].to(dtype) for name, dtype in stored.items()})
            best = error()
        if not best < before:  # nothing was gained, or rounding has cost it
            best, epoch_kept, rate_kept = before, 0, None
            _put(trained, given)
    return Tuned(
        before=before,
        after=best,
        epoch=epoch_kept,
        learning_rate=rate_kept,
        steps=options.epochs * len(training) * len(rates),
        held_out=spared,
    )


def _epochs(
    block: nn.Module,
    fixed: FixedMasks,
    trained: Mapping[str, nn.Parameter],
    examples: Callable[[int], Example],
    training: Sequence[int],
    epochs: int,
    rate: float,
    precision: torch.dtype,
) -> Iterator[int]:
    """Train for one epoch after the other, giving the number of each as it ends, from 1."""
    total = epochs * len(training)
    optimiser = torch.optim.Adam(trained.values(), lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))
    )
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        for place in torch.randperm(len(training), generator=generator).tolist():
            optimiser.zero_grad(set_to_none=True)
            _loss(block, examples(training[place]), precision).backward()  # type: ignore[no-untyped-call]
            fixed.mask_gradients()
            optimiser.step()
            schedule.step()
        yield epoch


def trainable(block: nn.Module, pruned: Collection[str], frozen: Collection[str] = ()) -> dict[str, torch.dtype]:
    """Choose what a reconstruction tunes: pruned matrices, norms, and biases of modules that were pruned.

    Args:
        block: the block, in the model's own dtype.
        pruned: names in ``block`` of the pruned parameters.
        frozen: names that must stay as they are.

    Returns:
        dict[str, torch.dtype]: names in ``block``, each with the parameter's dtype. A vector beside a matrix that was
            left dense (a router's bias) is not among them.
    """
    dense = {
        name.rpartition(".")[0]
        for name, parameter in block.named_parameters()
        if parameter.ndim > 1 and name not in pruned
    }
    return {
        name: parameter.dtype
        for name, parameter in block.named_parameters()
        if parameter.is_floating_point()
        and name not in frozen
        and (name in pruned or (parameter.ndim <= 1 and name.rpartition(".")[0] not in dense))
    }


@contextmanager
def requiring_gradients(block: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only ``trained`` require gradients inside, none accumulated yet; put flags and gradients back after."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in block.parameters()}
    wanted = set(trained)
    for parameter in before:
        parameter.requires_grad = parameter in wanted
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad = flag
            parameter.grad = gradient


def optimise_in_rounds(
    block: nn.Module,
    names: Collection[str],
    prune: Callable[[], None],
    examples: Callable[[int], Example],
    count: int,
    *,
    rounds: int,
    drawn: int,
    learning_rate: float,
    precision: torch.dtype,
) -> None:
    """Let a block's matrices be pruned, and step towards what it returned before, in turns: Wanda++'s optimisation.

    Yang et al. 2025, arXiv 2503.04992: RMSprop, one step a sample, no mask. A pruned weight may move away from zero,
    and is as a rule pruned again in the next round. The last round ends with steps: what is pruned afterwards is final.

    Args:
        block: in float32, dense; tuned in place.
        names: of the parameters of ``block`` to tune.
        prune: prunes the matrices in ``block`` as they are.
        examples: gives sample number i, with what enters the block; the target is the dense block's, computed here.
        count: number of samples.
        rounds: how often.
        drawn: samples that a round draws, at most.
        learning_rate: of RMSprop.
        precision: dtype of the products in forward and backward passes; weights and updates are float32.
    """
    dense = copy.deepcopy(block)
    tuned = [block.get_parameter(name) for name in names]
    optimiser = torch.optim.RMSprop(tuned, lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    with requiring_gradients(block, tuned):
        for _ in range(rounds):
            with torch.no_grad():
                prune()
            for index in torch.randperm(count, generator=generator)[:drawn].tolist():
                example = examples(index)
                with torch.no_grad():
                    target = _output(dense, example, precision).float()
                # The arguments anew: a block may write into its objects.
                example = replace(examples(index), target=target)
                optimiser.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    error, _ = _squares(_output(block, example, precision), example)
                    error.sum().backward()  # type: ignore[no-untyped-call]
                optimiser.step()


def _output(block: nn.Module, example: Example, precision: torch.dtype) -> Tensor:
    with torch.autocast(example.hidden.device.type, precision, enabled=precision != torch.float32):
        state: Tensor = hidden_of(call_block(block, example.hidden, example.call))
        return state


def _squares(output: Tensor, example: Example) -> tuple[Tensor, Tensor]:
    """Return ``|e|²`` and ``|target|²`` of every position, (batch, sequence) float32."""
    error = (output.float() - example.target).square().sum(-1)
    size = example.target.square().sum(-1)
    if example.valid is None:
        return error, size
    return error * example.valid, size * example.valid


def _loss(block: nn.Module, example: Example, precision: torch.dtype) -> Tensor:
    with torch.enable_grad():
        error, size = _squares(_output(block, example, precision), example)
        return error.sum() / size.sum()


@torch.no_grad()
def _error(block: nn.Module, examples: Iterator[Example], precision: torch.dtype) -> float:
    lost = total = 0.0
    for example in examples:
        error, size = _squares(_output(block, example, precision), example)
        lost, total = lost + float(error.sum()), total + float(size.sum())
    return lost / total if total else 0.0


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
