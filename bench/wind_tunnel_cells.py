"""The cells of the wind tunnel: what is compared, and how one of them is trained and judged."""

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from halve.learning.learner import Learner
from halve.learning.methods import LEARNING_METHODS, make_learner, make_options
from halve.learning.methods.fixed_mask import FixedMaskLearner
from halve.learning.moments import input_moments
from halve.learning.options import Finetuning, Machine, Schedule, Shape, TrainingText
from halve.learning.training.course import Course
from halve.learning.training.text import TrainingRows
from halve.maths.pattern import Pattern
from halve.model.masked import FixedMasks, PrunedParameter, pruned_parameters
from halve.text.rows import IGNORED, Rows

PATTERN = Pattern("2:4")
LOOKS = 4
"""How often the held-out text is looked at while a cell is trained, besides the look before."""
MODEL, SPARED, TRAIN, STARTS = "model", "spared.safetensors", "train.safetensors", "starts"
"""In the prepared folder."""
DENSE = "dense"
FIXED, NORMS = "fixed", "norms"
"""Methods that are no rows of the table of learned masks: the kept weights, or norms alone, with the mask as it is."""
_AT_ONCE = 64
"""Sequences of a forward pass that judges, or that second moments are taken of."""


@dataclass(frozen=True)
class Line:
    """A line of the picture: a method, what it begins from, and its settings.

    Attributes:
        method: `FIXED`, `NORMS`, or a row of `halve.learning.methods.LEARNING_METHODS`.
        start: `DENSE`, or the name of a local solution.
        rates: peak learning rates; the first one, where several were not tried.
        options: of the method.
    """

    method: str
    start: str
    rates: tuple[float, ...] = (6e-3, 3e-3)
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def name(self) -> str:
        """What the line is called."""
        said = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.method}{said} from {self.start}"


LINES = (
    Line(FIXED, "auto+block"),
    Line("prox-admm", DENSE),
    Line("prox-admm", "auto+block"),
    Line("ast", "auto+block"),
    Line(FIXED, "auto"),
    Line(FIXED, "wanda"),
    Line("ast", DENSE),
    Line("cast", DENSE),
    Line("cast", "auto+block"),
    Line("prox-admm", "auto"),
    Line("proxsparse", DENSE, rates=(1e-2, 3e-3), options={"keep": "trained"}),
    Line("proxsparse", DENSE, rates=(1e-2, 3e-3)),
    Line("maskllm", "auto", rates=(1e-2, 3e-3)),
    Line("maskllm", DENSE, rates=(1e-2, 3e-3)),
    Line(FIXED, "magnitude"),
    Line("prox-admm", DENSE, options={"form": "admm"}),
    Line("prox-admm", DENSE, options={"metric": "adam"}),
    Line(NORMS, "auto+block", rates=(1e-2, 3e-2)),
)
"""All lines, the most important ones first."""


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        line: its name.
        budget: tokens a parameter.
        seed: of the order of the text, and of what the method draws.
        rate: peak learning rate.
    """

    line: str
    budget: float
    seed: int
    rate: float


class Air:
    """What a prepared folder holds, on a device: the dense model, its text, and its local solutions.

    Args:
        folder: that was prepared.
        device: to compute on.
        batch_tokens: of an optimiser step.

    Attributes:
        dense: the model, float32.
        length: tokens in a sequence.
    """

    def __init__(self, folder: Path, device: str, batch_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.device = torch.device(device)
        dense: nn.Module = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32)
        self.dense = dense.to(self.device).eval().requires_grad_(requires_grad=False)
        self.batch_tokens = batch_tokens
        spared = load_file(folder / SPARED)
        self._calibration, self._held_out, self._judging = (
            spared[name].long() for name in ("calibration", "held_out", "evaluation")
        )
        self._train = load_file(folder / TRAIN)["ids"]
        self.length = self._train.shape[1]
        self._starts = {path.stem: load_file(path) for path in sorted((folder / STARTS).glob("*.safetensors"))}
        self._before: dict[str, float] = {}

    @cached_property
    def dense_loss(self) -> float:
        """The dense model's mean loss on the text for evaluation, in nats a token."""
        return mean_loss(self.dense, self._judging)

    @cached_property
    def diagonals(self) -> Mapping[str, Tensor]:
        """Second moments of the inputs of all targets, in the dense model."""
        batches = [{"input_ids": part} for part in torch.split(self._calibration, _AT_ONCE)]
        return input_moments(self.dense, targets(self.dense), batches).diagonals

    def ratio(self, model: nn.Module) -> float:
        """Return a model's perplexity on the text for evaluation over the dense model's."""
        return float(torch.tensor(mean_loss(model, self._judging) - self.dense_loss).exp())

    def start(self, name: str) -> Mapping[str, Tensor]:
        """Return the weights of a local solution, by name; none for the dense model."""
        return {} if name == DENSE else self._starts[name]

    def student(self, start: str, *, matrices: bool = True) -> nn.Module:
        """Return a new model with the parameters of a start, or with its norms and the dense model's matrices."""
        model = copy.deepcopy(self.dense)
        with torch.no_grad():
            for name, weight in self.start(start).items():
                if matrices or weight.ndim == 1:
                    model.get_parameter(name).copy_(weight)
        return model

    def ratio_before(self, start: str) -> float:
        """Return the ratio of a start as it is."""
        if start not in self._before:
            self._before[start] = self.ratio(self.student(start))
        return self._before[start]

    def steps(self, budget: float) -> int:
        """Return the optimiser steps of a budget in tokens a parameter."""
        return steps_of(budget, sum(each.numel() for each in self.dense.parameters()), self.batch_tokens)

    def rows(self, steps: int, seed: int) -> TrainingRows:
        """Return the text of a training: sequences drawn at random, each once while there are enough of them."""
        wanted = steps * self.batch_tokens // self.length
        generator = torch.Generator().manual_seed(seed)
        readings = [
            torch.randperm(len(self._train), generator=generator) for _ in range(-(-wanted // len(self._train)))
        ]
        chosen = torch.cat(readings)[:wanted]
        return TrainingRows(
            rows_of_sequences(self._train[chosen].long()),
            torch.arange(wanted),
            rows_of_sequences(self._held_out),
            (),
            {},
            apart=True,
        )


def steps_of(budget: float, parameters: int, batch_tokens: int) -> int:
    """Return the optimiser steps of a budget in tokens a parameter, at least one."""
    return max(1, round(budget * parameters / batch_tokens))


def rows_of_sequences(ids: Tensor) -> Rows:
    """Return rows (rows, seq_len) as `halve.text.rows.rows_of` does for passages of one BOS and seq_len - 1 tokens."""
    labels = ids.clone()
    labels[:, :2] = IGNORED
    return Rows(ids, torch.arange(ids.shape[1]).expand_as(ids), labels)


def targets(model: nn.Module) -> tuple[PrunedParameter, ...]:
    """Return the weights of all linear layers in the blocks."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    ]
    return tuple(pruned_parameters(model, {f"{name}.weight": "out_in" for name in names}))


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor) -> float:
    """Return the mean cross-entropy of all tokens but the first of each sequence (rows, seq_len), in nats."""
    place = next(model.parameters()).device
    total = 0.0
    for part in torch.split(ids, _AT_ONCE):
        fed = part.to(place)
        logits = model(input_ids=fed, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), fed[:, 1:].flatten(), reduction="sum").double())
    return total / ids[:, 1:].numel()


def maker(line: Line, air: Air, student: nn.Module, seed: int) -> Callable[[], Learner]:
    """Return what makes the learner of a line for a student, who has matrices as `takes_prior` says."""
    found = targets(student)
    if line.method in {FIXED, NORMS}:
        masks = FixedMasks(found)
        return lambda: FixedMaskLearner(masks, "all" if line.method == FIXED else NORMS)
    options = dict(line.options) | ({"seed": seed} if line.method == "maskllm" else {})
    prior = air.start(line.start) if takes_prior(line) else None
    return lambda: make_learner(
        line.method, found, PATTERN, make_options(line.method, **options), prior=prior, diagonals=air.diagonals
    )


def takes_prior(line: Line) -> bool:
    """Whether a line gives its start as a prior to a method, whose student has the dense model's matrices."""
    row = LEARNING_METHODS.get(line.method)
    return row is not None and row.takes_prior and line.start != DENSE


def train(cell: Cell, line: Line, air: Air) -> dict[str, Any]:
    """Train one cell and return what is known of it, as JSON values.

    Raises:
        HalveError: the loss is not finite.
    """
    began = time.perf_counter()
    device = air.device.type
    steps = air.steps(cell.budget)
    student = air.student(line.start, matrices=not takes_prior(line))
    rows = air.rows(steps, cell.seed)
    request = Finetuning(
        text=TrainingText(tokens=steps * air.batch_tokens, seq_len=air.length, seed=cell.seed),
        schedule=Schedule(
            batch_tokens=air.batch_tokens,
            forward_tokens=air.batch_tokens,
            learning_rate=cell.rate,
            evaluations=LOOKS,
        ),
        machine=Machine(device=device, forward_dtype="float32"),
    )
    course = Course(student, air.dense, rows, request, Shape.of(request))
    prepared = time.perf_counter()
    trained = course.run(maker(line, air, student, cell.seed))
    ended = time.perf_counter()
    looks = [point for point in trained.curve if point.kl is not None]
    return {
        "line": cell.line,
        "method": line.method,
        "options": dict(line.options),
        "start": line.start,
        "budget": cell.budget,
        "seed": cell.seed,
        "rate": cell.rate,
        "steps": trained.steps,
        "tokens": trained.steps * air.batch_tokens,
        "ratio": air.ratio(student),
        "ratio_before": air.ratio_before(line.start),
        "dense_perplexity": float(torch.tensor(air.dense_loss).exp()),
        "held_out_kl": looks[-1].kl,
        "curve": [[point.tokens, round(point.kl or 0.0, 5)] for point in looks],
        "two_of_four": all(PATTERN.satisfied_by(each.inputs_last(each.tensor)) for each in targets(student)),
        "seconds": round(time.perf_counter() - began, 2),
        "seconds_a_step": round((ended - prepared) / max(1, trained.steps), 5),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """Read results, one JSON object a line, by cell; lines of cells that failed are left out."""
    if not path.exists():
        return {}
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {
        Cell(entry["line"], entry["budget"], entry["seed"], entry["rate"]): entry
        for entry in entries
        if "error" not in entry
    }


def best_rate(line: Line, results: Iterable[tuple[Cell, Mapping[str, Any]]]) -> float:
    """Return the learning rate of a line: the one that held-out text likes best, where several were tried on it.

    They are compared on the largest budget and the first seed that have been tried with all of them.
    """
    tried: dict[tuple[float, int], dict[float, float]] = {}
    for cell, entry in results:
        if cell.line == line.name and cell.rate in line.rates:
            tried.setdefault((cell.budget, cell.seed), {})[cell.rate] = entry["held_out_kl"]
    whole = [key for key, found in tried.items() if len(found) == len(line.rates)]
    if not whole:
        return line.rates[0]
    losses = tried[max(whole, key=lambda key: (key[0], -key[1]))]
    return min(line.rates, key=lambda rate: losses[rate])


def planned(lines: Sequence[Line], budgets: Sequence[float], seeds: Sequence[int]) -> list[tuple[Line, float, int]]:
    """Return line, budget and seed of all cells in their order: seeds, then budgets, then lines, each as given.

    Long trainings that come first leave the short ones to fill what time is left.
    """
    return [(line, budget, seed) for seed in seeds for budget in budgets for line in lines]
