"""What to leave dense: perplexity over the share of prunable weights pruned, by measured damage and by uniform choices.

Everything is pruned once, and for each choice its matrices are put back dense, which takes an evaluation a choice
instead of a run; ``--runs`` prunes with the choice from the beginning, as ``--keep-dense`` does. Every figure is a JSON
line in ``results.jsonl`` as soon as it is there, so that nothing is lost when the time is up, and a second call goes
on. The table is printed at the end (`bench/keep_dense_picture.py` draws it)::

    python bench/keep_dense.py MODEL --train c4-calibration.jsonl --evaluate c4-validation.jsonl wikitext2-test.txt \
        --work DIR --choices "nothing" "all down_proj" "measured, 10 %" --runs "nothing" "measured, 10 %"
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import halve
from halve.checkpoint.load import load_model, resolve
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.model.plan import Matrix, Plan, place_of
from halve.sensitivity.alone import damages_alone
from halve.sensitivity.choose import choose
from halve.sensitivity.keep_dense import KeepDense
from halve.sensitivity.quick import input_norms
from halve.sensitivity.samples import Samples
from halve.sensitivity.units import units_of

PATTERN = "2:4"


def of_kinds(*kinds: str) -> Callable[[Sequence[Matrix]], list[str]]:
    """Choose all matrices whose kind ends with one of some names."""
    return lambda matrices: [m.parameter for m in matrices if place_of(m.name)[1].endswith(kinds)]


def of_blocks(share: float, *, last: bool) -> Callable[[Sequence[Matrix]], list[str]]:
    """Choose whole blocks from one end, as many as hold a share of the weights."""

    def choose(matrices: Sequence[Matrix]) -> list[str]:
        blocks = sorted({matrix.block for matrix in matrices}, reverse=last)
        chosen = set(blocks[: round(share * len(blocks))])
        return [matrix.parameter for matrix in matrices if matrix.block in chosen]

    return choose


def at_random(share: float, seed: int = 0) -> Callable[[Sequence[Matrix]], list[str]]:
    """Choose matrices in random order until none fits the share."""

    def choose(matrices: Sequence[Matrix]) -> list[str]:
        left = share * weights_of(matrices)
        chosen = []
        for matrix in random.Random(seed).sample(list(matrices), len(matrices)):  # noqa: S311 - no secret
            if matrix.d_out * matrix.d_in <= left:
                left -= matrix.d_out * matrix.d_in
                chosen.append(matrix.parameter)
        return chosen

    return choose


CHOICES: dict[str, Callable[[Sequence[Matrix]], list[str]]] = {
    "nothing": lambda _matrices: [],
    "all v_proj and k_proj": of_kinds("v_proj", "k_proj"),
    "all o_proj": of_kinds("o_proj"),
    "first blocks, 10 %": of_blocks(0.10, last=False),
    "last blocks, 10 %": of_blocks(0.10, last=True),
    "at random, 10 %": at_random(0.10),
    "all down_proj": of_kinds("down_proj"),
    "first blocks, 20 %": of_blocks(0.20, last=False),
    "last blocks, 20 %": of_blocks(0.20, last=True),
    "at random, 20 %": at_random(0.20),
    "all gate_proj": of_kinds("gate_proj"),
    "last blocks, 40 %": of_blocks(0.40, last=True),
}


MEASURED = {f"measured, {share} %": share / 100 for share in (5, 10, 20, 40)}
"""What stays dense by measured damage: the share of the weights by what the choice is called."""


def weights_of(matrices: Sequence[Matrix], names: Sequence[str] | None = None) -> int:
    """Return the number of weights in all matrices, or in those of some names."""
    return sum(m.d_out * m.d_in for m in matrices if names is None or m.parameter in set(names))


class Bench:
    """The runs, and what they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = self.work / "results.jsonl"
        self.method = f"auto, {options.effort}" if options.method == "auto" else options.method

    def done(self) -> list[dict[str, Any]]:
        """Return what is there."""
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        return [json.loads(line) for line in lines]

    def run(self, name: str, chosen: Sequence[str], matrices: Sequence[Matrix]) -> None:
        """Prune all but what was chosen, measure, and keep the figures; nothing if that was done before."""
        if any(entry["name"] == name and entry["method"] == self.method for entry in self.done()):
            return
        begun = time.monotonic()
        pruned = self.prune(chosen)
        seconds = time.monotonic() - begun
        kept = weights_of(matrices, chosen) / weights_of(matrices)
        self._keep(name, self.method, kept, pruned, seconds)

    def prune(self, chosen: Sequence[str] = (), out: Path | None = None) -> torch.nn.Module:
        """Return the model with everything pruned but what was chosen."""
        options: dict[str, Any] = {"method": self.options.method, "refit": "none"}
        if self.options.method == "auto":
            options = {"method": "auto", "effort": self.options.effort}
        asked = {"samples": self.options.samples, "seq_len": self.options.seq_len, "calibration": self.options.train}
        return halve.prune(self.options.model, out, pattern=PATTERN, skip=list(chosen), **asked, **options).model

    def chosen(self, name: str, matrices: Sequence[Matrix]) -> list[str]:
        """Return the parameters of a choice."""
        if name in CHOICES:
            return CHOICES[name](matrices)
        kept = choose(units_of(self.plan), self.damages(), int(MEASURED[name] * weights_of(matrices)))
        return [unit.name for unit in kept]

    @cached_property
    def plan(self) -> Plan:
        """What can be pruned of the model."""
        return make_plan(load_model(resolve(self.options.model)).model, Pattern.parse(PATTERN))

    def damages(self) -> dict[str, float]:
        """Return what `--keep-dense` measures, once."""
        kept = self.work / "damages.json"
        if not kept.exists():
            begun = time.monotonic()
            loaded = load_model(resolve(self.options.model), dtype=torch.float32)
            counts = {"samples": self.options.samples, "seq_len": self.options.seq_len}
            data = halve.Calibration(self.options.train, **counts).data(loaded)
            judging = Samples.of(data, loaded.model, KeepDense("10%").tokens, 1024).judging
            norms = input_norms(loaded.model, self.plan.matrices, judging)
            asked = (loaded.model, self.plan.blocks, units_of(self.plan), judging, norms, Pattern.parse(PATTERN))
            found = damages_alone(*asked)
            print(f"damages measured in {time.monotonic() - begun:.0f} s", flush=True)
            kept.write_text(json.dumps(found))
        return dict(json.loads(kept.read_text()))

    def put_back(self, name: str, chosen: Sequence[str], matrices: Sequence[Matrix]) -> None:
        """Prune everything, once for all choices, put back what was chosen, measure, and keep the figures."""
        method = f"{self.method}, put back"
        if any(entry["name"] == name and entry["method"] == method for entry in self.done()):
            return
        out = self.work / "pruned"
        if not (out / "halve.json").exists():
            self.prune(out=out)
        model, dense = (load_model(resolve(place)).model for place in (str(out), self.options.model))
        with torch.no_grad():
            for parameter in chosen:
                model.get_parameter(parameter).copy_(dense.get_parameter(parameter))
        self._keep(name, method, weights_of(matrices, chosen) / weights_of(matrices), model, 0.0)

    def dense(self) -> None:
        """Measure the dense model."""
        if not any(entry["name"] == "dense" for entry in self.done()):
            self._keep("dense", "", 1.0, load_model(resolve(self.options.model)).model, 0.0)

    def _keep(self, name: str, method: str, kept: float, model: Any, seconds: float) -> None:
        loaded = load_model(resolve(self.options.model))
        options = {"seq_len": self.options.seq_len, "max_windows": self.options.windows, "text_field": "text"}
        texts = evaluation_texts(loaded, self.options.evaluate, **options)
        figures = {Path(text.source).stem: perplexity(model, text).value for text in texts}
        entry = {"name": name, "method": method, "dense": kept, "perplexity": figures, "seconds": round(seconds)}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return what was measured as a table in Markdown."""
    texts = list(entries[0]["perplexity"]) if entries else []
    rows = ["| what stays dense | method | weights dense | " + " | ".join(texts) + " | seconds |"]
    rows.append("|---|---|---|" + "---|" * (len(texts) + 1))
    for entry in sorted(entries, key=lambda entry: (entry["method"], entry["dense"])):
        figures = " | ".join(f"{entry['perplexity'][text]:.2f}" for text in texts)
        rows.append(f"| {entry['name']} | {entry['method']} | {entry['dense']:.1%} | {figures} | {entry['seconds']} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--effort", default="fast", help="of auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--choices", nargs="*", choices=[*CHOICES, *MEASURED], default=[*CHOICES, *MEASURED])
    parser.add_argument("--runs", nargs="*", choices=[*CHOICES, *MEASURED], default=[])
    given = parser.parse_args(arguments)
    bench = Bench(given)
    bench.dense()
    matrices = bench.plan.matrices
    for name in given.choices:
        bench.put_back(name, bench.chosen(name, matrices), matrices)
    for name in given.runs:
        bench.run(name, bench.chosen(name, matrices), matrices)
    print(table(bench.done()))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
