"""Every way to train an N:M model, on a model so small that all of them can be compared with several seeds.

    python bench/wind_tunnel.py prepare stories260k tunnel
    python bench/wind_tunnel.py run tunnel --results wind_tunnel.jsonl --device cuda --jobs 12 --until 240 --rates 1.5
    python bench/wind_tunnel.py draw --results wind_tunnel.jsonl --picture docs/wind_tunnel.svg

``prepare`` writes all that ``run`` needs into one folder: the dense model, text that it wrote itself, and its local
solutions. ``run`` trains one cell after the other: a method, what it begins from, a number of tokens a parameter, and a
seed. A cell is a training by `halve.learning.training.course.Course`, with the divergence from the dense model as its
loss, AdamW and a cosine; what counts at the end is its perplexity, over the dense model's, on text of the dense model
that nothing was trained or chosen on. Every cell is appended to the results as one line of JSON when it ends, and cells
that are there are not trained again. Seed by seed, long trainings come before short ones, and important lines before
others; no cell is begun that would end after ``--until`` seconds, as far as those that have ended tell. ``--rates 1.5``
tries two learning rates of every line on 1.5 tokens a parameter first, and trains the others with the one that the
held-out text likes better.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

import wind_tunnel_cells as cells
from wind_tunnel_cells import LINES, Cell, Line

BATCH_TOKENS = 4096
BUDGETS = (25.0, 6.0, 1.5, 0.4)
"""Tokens a parameter, in the order in which they are trained."""
BY_NAME = {line.name: line for line in LINES}
WORKERS = "spawn"
"""How processes are started: CUDA does not survive a fork."""
FIRST_GUESS = {"cuda": 0.08, "cpu": 1.0}
"""Seconds that a step takes, where no cell has ended yet."""
BESIDES = 5.0
"""Seconds of a cell besides its steps, at most."""
HOPELESS = 3
"""So many failures for each process, and nothing else, end a run: the others would fail too."""


@dataclass(frozen=True)
class Asked:
    """What `run` is asked for.

    Attributes:
        folder: that was prepared.
        results: file of JSON lines.
        device: ``cpu`` or ``cuda``.
        jobs: processes at once.
        until: seconds after which no cell is begun.
        lines: to be trained.
        budgets: tokens a parameter, in order.
        seeds: of each.
        rates: the budget that learning rates are tried on; None tries none.
        batch_tokens: of an optimiser step.
    """

    folder: Path
    results: Path
    device: str = "cpu"
    jobs: int = 1
    until: float = float("inf")
    lines: Sequence[Line] = LINES
    budgets: Sequence[float] = BUDGETS
    seeds: Sequence[int] = (0, 1, 2)
    rates: float | None = None
    batch_tokens: int = BATCH_TOKENS


class Plan:
    """Which cell comes next, given those that have ended and those that run."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._known = cells.read_results(asked.results)
        self._begun: set[Cell] = set()
        self._speeds: dict[str, tuple[int, float]] = {}
        self._trials = [
            Cell(line.name, asked.rates, asked.seeds[0], rate)
            for line in asked.lines
            for rate in line.rates
            if asked.rates is not None
        ]
        self._cells = cells.planned(asked.lines, asked.budgets, asked.seeds)

    def next(self, left: float, steps: dict[float, int]) -> Cell | None:
        """Return the next cell that may be begun, None if there is none now.

        Args:
            left: seconds.
            steps: of each budget.
        """
        for cell in self._wanted():
            if cell not in self._begun and cell not in self._known and self.seconds(cell, steps) <= left:
                self._begun.add(cell)
                return cell
        return None

    def _wanted(self) -> Iterator[Cell]:
        yield from self._trials
        running = {cell.line for cell in self._trials if cell in self._begun and cell not in self._known}
        for line, budget, seed in self._cells:
            if line.name not in running:  # its learning rate is not known yet
                yield Cell(line.name, budget, seed, cells.best_rate(line, self._known.items()))

    def seconds(self, cell: Cell, steps: dict[float, int]) -> float:
        """Return how long a cell may take."""
        guess = (0, FIRST_GUESS[self._asked.device])
        _, speed = self._speeds.get(cell.line) or max(self._speeds.values(), default=guess)
        return BESIDES + steps[cell.budget] * speed

    def ended(self, cell: Cell, entry: dict[str, Any]) -> None:
        """Take note of what came of a cell."""
        if "error" in entry:
            self._trials = [trial for trial in self._trials if trial != cell]
            return
        self._known[cell] = entry
        # the longest training tells best: a short one spends much of its time on what is done once
        self._speeds[cell.line] = max(self._speeds.get(cell.line, (0, 0.0)), (entry["steps"], entry["seconds_a_step"]))

    @property
    def missing(self) -> int:
        """How many cells were not begun."""
        return len({cell for cell in self._wanted() if cell not in self._known and cell not in self._begun})


def work(folder: Path, device: str, batch_tokens: int, channel: Connection) -> None:
    """Train the cells that come through a channel, and send back what comes of each; None ends it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    air = cells.Air(folder, device, batch_tokens)
    while (cell := channel.recv()) is not None:
        try:
            channel.send(cells.train(cell, BY_NAME[cell.line], air))
        except Exception as error:  # noqa: BLE001 - the others are to be trained whatever happens to one
            traceback.print_exc()
            channel.send({**asdict(cell), "error": f"{type(error).__name__}: {error}"})


class Workers:
    """Processes that train cells, each one at a time; one that dies is replaced.

    Args:
        asked: what they work on.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._processes: dict[Connection, Any] = {}
        self._busy: dict[Connection, Cell] = {}
        for _ in range(asked.jobs):
            self._add()

    def _add(self) -> None:
        context = multiprocessing.get_context(WORKERS)
        mine, theirs = context.Pipe()
        arguments = (self._asked.folder, self._asked.device, self._asked.batch_tokens, theirs)
        process = context.Process(target=work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        self._processes[mine] = process

    def give(self, choose: Callable[[], Cell | None]) -> None:
        """Give those that are idle the cells that ``choose`` returns."""
        for channel in self._processes:
            if channel not in self._busy and (cell := choose()) is not None:
                channel.send(cell)
                self._busy[channel] = cell

    @property
    def busy(self) -> bool:
        """Whether a cell is being trained."""
        return bool(self._busy)

    def ended(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Wait until a cell ends, and yield all that have."""
        for ready in wait(list(self._busy)):
            channel = cast("Connection", ready)
            cell = self._busy.pop(channel)
            try:
                yield cell, channel.recv()
            except EOFError:
                process = self._processes.pop(channel)
                process.join()
                self._add()
                yield cell, {**asdict(cell), "error": f"its process ended with {process.exitcode}"}

    def close(self) -> None:
        """Let all processes end."""
        for channel, process in self._processes.items():
            channel.send(None)
            process.join()


def run(asked: Asked) -> int:
    """Train all cells that there is time for, and return how many failed."""
    began = time.monotonic()
    plan, steps, workers = Plan(asked), count_steps(asked), Workers(asked)
    failed = done = 0

    def choose() -> Cell | None:
        return plan.next(asked.until - (time.monotonic() - began), steps)

    workers.give(choose)
    with asked.results.open("a", encoding="utf-8") as file:
        while workers.busy:
            for cell, entry in workers.ended():
                entry["at"] = round(time.monotonic() - began, 1)
                file.write(json.dumps(entry) + "\n")
                file.flush()
                plan.ended(cell, entry)
                done += 1
                failed += "error" in entry
                print(f"{entry['at']:7.1f} s  {said(cell, entry)}", flush=True)
            if failed < done or failed < HOPELESS * asked.jobs:
                workers.give(choose)
    workers.close()
    print(f"{done} cells in {time.monotonic() - began:.0f} s, {failed} failed, {plan.missing} were not begun")
    return failed


def count_steps(asked: Asked) -> dict[float, int]:
    """Return the optimiser steps of every budget."""
    with safe_open(asked.folder / cells.MODEL / "model.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - it is no dict
    parameters = sum(math.prod(size) for size in sizes)
    budgets = {*asked.budgets, *([] if asked.rates is None else [asked.rates])}
    return {budget: cells.steps_of(budget, parameters, asked.batch_tokens) for budget in budgets}


def said(cell: Cell, entry: dict[str, Any]) -> str:
    """Return a line about a cell that has ended."""
    what = f"{cell.line}, {cell.budget:g} a parameter, seed {cell.seed}, rate {cell.rate:g}:"
    if "error" in entry:
        return f"{what} {entry['error']}"
    wrong = "" if entry["two_of_four"] else "  NOT 2:4"
    return f"{what} {entry['ratio']:.3f} x dense, {entry['seconds']:.0f} s{wrong}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="write the folder")
    one.add_argument("model", type=Path, help="directory of a small Llama without a tokenizer")
    one.add_argument("folder", type=Path)
    one.add_argument("--tokens", type=int, default=6_502_400, help="of text to train on; 0 leaves it for later")
    one.add_argument("--seq-len", type=int, default=256)
    one.add_argument("--samples", type=int, default=128, help="sequences that local solutions are calibrated on")
    one.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="that the text is written on")
    two = commands.add_parser("run", help="train the cells")
    two.add_argument("folder", type=Path)
    two.add_argument("--results", type=Path, required=True)
    two.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    two.add_argument("--jobs", type=int, default=1, help="processes at once, which share the device")
    two.add_argument(
        "--until", type=float, default=float("inf"), metavar="SECONDS", help="begin no cell that ends later"
    )
    two.add_argument("--lines", help="names of lines, separated by commas; all are listed by `lines`")
    two.add_argument(
        "--budgets",
        default=",".join(f"{each:g}" for each in BUDGETS),
        help="tokens a parameter, those first that matter most",
    )
    two.add_argument("--seeds", default="0,1,2")
    two.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="of an optimiser step")
    two.add_argument("--rates", type=float, metavar="BUDGET", help="try two learning rates of every line on it first")
    three = commands.add_parser("draw", help="draw the picture and print the table")
    three.add_argument("--results", type=Path, required=True)
    three.add_argument("--picture", type=Path)
    commands.add_parser("lines", help="list the lines, the most important ones first")
    given = parser.parse_args(arguments)
    if given.command == "lines":
        print("\n".join(BY_NAME))
    elif given.command == "prepare":
        from wind_tunnel_prepare import prepare

        prepare(given.model, given.folder, given.tokens, given.seq_len, given.samples, given.device)
    elif given.command == "draw":
        from wind_tunnel_picture import draw, markdown

        results = list(cells.read_results(given.results).values())
        if given.picture is not None:
            draw(results, given.picture)
        print(markdown(results))
    else:
        names = list(BY_NAME) if given.lines is None else given.lines.split(",")
        if unknown := [name for name in names if name not in BY_NAME]:
            parser.error(f"there is no line {unknown[0]!r}: see `lines`")
        asked = Asked(
            folder=given.folder,
            results=given.results,
            device=given.device,
            jobs=given.jobs,
            until=given.until,
            lines=[BY_NAME[name] for name in names],
            budgets=[float(each) for each in given.budgets.split(",")],
            seeds=[int(each) for each in given.seeds.split(",")],
            rates=given.rates,
            batch_tokens=given.batch_tokens,
        )
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        sys.exit(run(asked) > 0)


if __name__ == "__main__":
    main()
