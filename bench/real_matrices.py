"""The matrices of a few blocks of a real model, with the statistics of their inputs."""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from halve.checkpoint import load as checkpoint
from halve.device import autocast, compute_dtype, evaluation_mode
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.model.collect import Collector
from halve.model.survey import plan_model
from halve.text.calibration import Calibration, batch_tokens, token_batches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``real_matrices`` reads, but for the model."""
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 27])


def real_matrices(arguments: argparse.Namespace) -> Iterator[tuple[str, Tensor, Statistics]]:
    """Yield name, weight and statistics of every matrix in the chosen blocks."""
    loaded = checkpoint.load_model(arguments.model)
    calibration = Calibration(arguments.calibration, arguments.samples, arguments.seq_len, arguments.seed)
    tokens = calibration.text_tokens(loaded)
    cpu = torch.device("cpu")
    model, batches = loaded.model, token_batches(tokens.ids, batch_tokens(cpu))
    with evaluation_mode(model):
        plan, (run, *_) = plan_model(model, batches, Pattern("2:4"))
        members = [model.get_submodule(name) for name in plan.blocks]
        stream = run.capture(model, batches)
        if beyond := [index for index in arguments.blocks if not 0 <= index < len(members)]:
            sys.exit(f"--blocks {beyond[0]} is not one of the model's {len(members)} blocks")
        for index, block in enumerate(members[: max(arguments.blocks) + 1]):
            chosen = index in arguments.blocks
            collector = Collector(block, plan.blocks[index], plan.of_block(index) if chosen else (), cpu)
            with autocast(block, compute_dtype(cpu)), collector.watching():
                for batch in range(len(batches)):
                    collector.start_batch(None)
                    stream.run(index, batch, block, cpu, dtype=None, keep=True)
            if chosen:
                found = collector.finish()
                for matrix in plan.of_block(index):
                    stats = found[matrix.name]
                    if stats is not None:
                        yield matrix.name, matrix.view(model.get_parameter(matrix.parameter).data), stats
