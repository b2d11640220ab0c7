"""Matrices of a real model, with statistics of the dense model's own inputs: of a training part and a held-out part."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint import load as checkpoint
from halve.device import evaluation_mode, resolve_device
from halve.maths.gram import GramAccumulator, Statistics
from halve.maths.pattern import Pattern
from halve.model import blocks as streams
from halve.model.plan import Matrix
from halve.model.survey import plan_model
from halve.text.calibration import Calibration, batch_tokens, token_batches


@dataclass(frozen=True)
class RealMatrix:
    """A matrix and what is known of its inputs.

    Attributes:
        name: in the model.
        block: index of its block.
        kind: last part of its name, such as ``q_proj``.
        weight: (d_out, d_in) float32, rows cut where that was asked for.
        fitted: statistics of the training tokens, also by halves, so that method ``auto`` can choose its shrinkage.
        held_out: statistics of the other tokens, None if there are none.
        snapshots: statistics of the first tokens of the training part, smallest number first.
    """

    name: str
    block: int
    kind: str
    weight: Tensor
    fitted: Statistics
    held_out: Statistics | None
    snapshots: tuple[Statistics, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `matrices_of_model` reads, and the model."""
    parser.add_argument("model", help="checkpoint directory, hub id or .gguf file")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--samples", type=int, help="sequences for the statistics")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--rows", type=int, help="rows taken of every matrix, spread evenly; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")


def complete(given: argparse.Namespace, *, samples: tuple[int, int], rows: int) -> None:
    """Fill in what was not given: small size, or the paper's with ``--full``.

    Args:
        given: parsed arguments, changed in place.
        samples: number of sequences, small and full.
        rows: rows a matrix in the small size.
    """
    given.samples = given.samples or samples[given.full]
    given.seq_len = given.seq_len or (2048 if given.full else 512)
    given.rows = (0 if given.full else rows) if given.rows is None else given.rows


def load(given: argparse.Namespace) -> tuple[checkpoint.LoadedModel, Tensor]:
    """Return the model and its calibration tokens (samples, seq_len)."""
    loaded = checkpoint.load_model(given.model)
    calibration = Calibration(given.calibration, given.samples, given.seq_len, given.seed, bos="once")
    return loaded, calibration.text_tokens(loaded).ids


def matrices_of_model(
    model: nn.Module,
    ids: Tensor,
    chosen: Sequence[int],
    *,
    rows: int = 0,
    held_out: bool = False,
    snapshots: Callable[[Matrix], Sequence[int]] = lambda _matrix: (),
    device: str = "auto",
) -> Iterator[RealMatrix]:
    """Yield the matrices of the chosen blocks, block by block; the model stays dense.

    Args:
        model: a causal language model.
        ids: token ids (samples, seq_len).
        chosen: indices of blocks.
        rows: how many rows of each matrix to take, spread evenly; 0 takes all.
        held_out: whether every second batch, of at most one sequence then, is held out.
        snapshots: numbers of tokens after which a matrix's statistics are kept apart, increasing; those beyond the
            training tokens are left out.
        device: where blocks run and statistics lie.

    Yields:
        RealMatrix: on ``device``.
    """
    target = resolve_device(device)
    batches = token_batches(ids, 1 if held_out else batch_tokens(target))
    with evaluation_mode(model):
        plan, (run, *_) = plan_model(model, batches, Pattern("2:4"))
        members = [model.get_submodule(name) for name in plan.blocks]
        if beyond := [index for index in chosen if not 0 <= index < len(members)]:
            sys.exit(f"block {beyond[0]} is not one of the model's {len(members)} blocks")
        stream = run.capture(model, batches)
        for index in range(max(chosen) + 1):
            work = streams.working_copy(members[index], target)
            watches = [
                _Watch(matrix, target, snapshots(matrix))
                for matrix in plan.of_block(index)
                if index in chosen and matrix.expert is None
            ]
            with ExitStack() as stack:
                for watch in watches:
                    local = watch.matrix.parameter.removeprefix(f"{plan.blocks[index]}.").rpartition(".")[0]
                    stack.enter_context(_watching(work.get_submodule(local), watch))
                for batch in range(len(batches)):
                    for watch in watches:
                        watch.holding_out = held_out and batch % 2 == 1
                    stream.run(index, batch, work, target, keep=True)
            for watch in watches:
                weight = watch.matrix.view(model.get_parameter(watch.matrix.parameter).data).float()
                yield watch.finish(index, some_rows(weight, rows).to(target))


def some_rows(weight: Tensor, rows: int) -> Tensor:
    """Return ``rows`` rows of ``weight`` (d_out, d_in), spread evenly; all if ``rows`` is 0 or there are no more."""
    if rows == 0 or rows >= len(weight):
        return weight
    return weight[torch.arange(rows) * len(weight) // rows]


@dataclass
class _Watch:
    """What has been seen of a matrix's inputs so far."""

    matrix: Matrix
    device: torch.device
    counts: Sequence[int]
    holding_out: bool = False
    snapshots: list[Statistics] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fitted, self.other = (
            GramAccumulator(self.matrix.d_in, device=self.device, name=self.matrix.name, halves=halves)
            for halves in (True, False)
        )

    def see(self, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        if self.holding_out:
            self.other.add(flat)
            return
        while len(self.snapshots) < len(self.counts):
            missing = self.counts[len(self.snapshots)] - self.fitted.tokens
            if missing > len(flat):
                break
            self.fitted.add(flat[:missing])
            flat = flat[missing:]
            self.snapshots.append(self.fitted.finish())
        self.fitted.add(flat)

    def finish(self, block: int, weight: Tensor) -> RealMatrix:
        kind = self.matrix.parameter.removesuffix(".weight").rpartition(".")[2]
        held_out = self.other.finish() if self.other.tokens else None
        return RealMatrix(self.matrix.name, block, kind, weight, self.fitted.finish(), held_out, tuple(self.snapshots))


def _watching(module: nn.Module, watch: _Watch) -> Any:
    def before_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.see(args[0] if args else next(iter(kwargs.values())))

    return module.register_forward_pre_hook(before_forward, with_kwargs=True)
