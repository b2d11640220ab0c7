"""Prune a tiny random model of every class that transformers can build, and judge the result by full forward passes.

    python bench/sweep.py --results sweep.jsonl
    python bench/sweep.py --results sweep.jsonl --kind causal,seq2seq --only llama,t5
    python bench/sweep.py --results sweep.jsonl --sample 24 --seed 1
    python bench/sweep.py --results sweep.jsonl --table docs/models.md

Each class is a process of its own, forked from one that has imported everything. Classes that the results have already
are not judged again. `sweep_oracle.py` is the judge; it shares no code with what it judges. A class is

- right: the hidden states that every block was fed are those of a full forward pass, of the pruned model and of the
  dense one; wanda's masks are those computed from such passes; plain transformers loads what was written, with
  nothing missing; every tensor that was not pruned is what it was, bit for bit; packing and unpacking gives the same
  bytes;
- refused: Halve says in an error of its own why it does not prune it;
- wrong: something of the above does not hold;
- a crash: an error that is not Halve's own;
- not built: there is no tiny model to judge here, and why.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers

import tiny_models
from sweep_judge import VERDICTS, Result, judge
from tiny_models import KINDS, Case

SECONDS = 90.0
"""What one class may take."""
MEMORY = 10 << 30
"""Bytes of address space that one class may have."""


def warm_up() -> None:
    """Judge one class in this process, so that what is imported on the way is not imported in each one forked from it.

    Call it where PyTorch has one thread: a forked process has only that.
    """
    judge(Case("causal", "llama", "LlamaForCausalLM"))


def _child(case: Case, sender: Connection, log: Path) -> None:
    with log.open("w") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sender.send(judge(case))
        sender.close()


def judge_all(todo: Sequence[Case], workers: int, seconds: float) -> Iterable[Result]:
    """Judge classes, each in a process forked from this one, and yield what comes of them as they finish.

    Args:
        todo: the classes.
        workers: how many at once.
        seconds: what one may take.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(todo)
    running: dict[Any, tuple[Case, Any, float]] = {}
    with TemporaryDirectory(prefix="halve-sweep-") as logs:
        while waiting or running:
            while waiting and len(running) < workers:
                case = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                log = Path(logs) / "output"
                process = context.Process(target=_child, args=(case, sender, log))
                process.start()
                sender.close()
                running[receiver] = (case, process, time.monotonic())
            for ready in wait(list(running), timeout=0.5):
                case, process, began = running.pop(ready)
                try:
                    result = cast("Connection", ready).recv()
                except EOFError:
                    process.join()
                    result = _failed(case, f"the process ended with {process.exitcode}", time.monotonic() - began)
                process.join()
                yield result
            for late, (case, process, began) in list(running.items()):
                if time.monotonic() - began > seconds:
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    del running[late]
                    yield _failed(case, f"it took more than {seconds:.0f} seconds", seconds)


def _failed(case: Case, reason: str, seconds: float) -> Result:
    return Result(case.name, case.kind, case.family, case.cls, "crash", "process", reason, round(seconds, 2))


def read_results(path: Path) -> dict[str, Result]:
    """Read results, one JSON object a line, by the classes' names; a class judged twice has its later result."""
    if not path.exists():
        return {}
    return {result.name: result for result in (Result(**json.loads(line)) for line in path.read_text().splitlines())}


def counts_table(results: Iterable[Result]) -> str:
    """Return how many classes of each kind have each verdict, as a Markdown table."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        by_kind[result.kind][result.verdict] += 1
    lines = ["| kind | " + " | ".join(VERDICTS) + " |", "|---|" + "---:|" * len(VERDICTS)]
    lines += [
        f"| {kind} | " + " | ".join(str(by_kind[kind][verdict]) for verdict in VERDICTS) + " |"
        for kind in KINDS
        if kind in by_kind
    ]
    return "\n".join(lines)


def reasons_table(results: Iterable[Result]) -> str:
    """Return every distinct reason with the classes that it concerns, as Markdown, by kind and verdict."""
    groups: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.verdict != "right":
            groups[result.kind, result.verdict, _without_names(result)].append(result)
    lines = []
    order = sorted(groups, key=lambda key: (list(KINDS).index(key[0]), VERDICTS.index(key[1]), -len(groups[key])))
    for kind, verdict, _ in order:
        members = groups[kind, verdict, _]
        example = members[0]
        families = ", ".join(member.family for member in members)
        lines.append(f"- {kind}, **{verdict}** ({example.stage}): {families}\n  {example.reason}")
    return "\n".join(lines)


def _without_names(result: Result) -> str:
    """Return a reason without what differs between classes for the same cause."""
    text = result.reason.replace(result.cls, "")
    return re.sub(r"[\d.]+(e-?\d+)?|\b[A-Z]\w+(For\w+|Model|Config|Decoder)\b", "", text)[:60]


def families_table(results: Iterable[Result]) -> str:
    """Return one row a family of models: which kinds of it work, and what stands in the way of the others."""
    families: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        families[result.family].append(result)
    lines = ["| family | works | does not, and why |", "|---|---|---|"]
    for family, members in sorted(families.items()):
        works = sorted({member.kind for member in members if member.verdict == "right"})
        others: dict[str, list[str]] = defaultdict(list)
        for member in members:
            if member.verdict != "right":
                others[_said(member)].append(member.kind)
        why = "; ".join(f"{', '.join(sorted(set(kinds)))}: {said}" for said, kinds in others.items())
        lines.append(f"| `{family}` | {', '.join(works)} | {why} |")
    return "\n".join(lines)


def _said(result: Result) -> str:
    """Return a verdict and its reason as they can stand in a cell of a table."""
    what = {"not built": "not tried", "refused": "refused"}.get(result.verdict, f"**{result.verdict}**")
    reason = result.reason
    if result.verdict in {"refused", "not built"}:  # Halve's own sentence, and the place in the code is of no use
        reason = re.sub(r"^\w+Error: | \(\w+\.py:\d+\)$", "", reason)
    return f"{what} ({' '.join(reason.split())[:200]})".replace("|", "\\|").replace("<", "&lt;")


_BEGIN, _END = "<!-- sweep: begin -->", "<!-- sweep: end -->"


def write_table(page: Path, results: Sequence[Result]) -> None:
    """Put the tables of counts and of families into a page, between two comments; everything else in it stays."""
    text = page.read_text() if page.exists() else f"# Models\n\n{_BEGIN}\n{_END}\n"
    head, found, rest = text.partition(_BEGIN)
    _, ended, tail = rest.partition(_END)
    if not found or not ended:
        raise SystemExit(f"{page} has no lines {_BEGIN} and {_END} for the table to stand between")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    table = f"{counts_table(results)}\n\nJudged with {versions}.\n\n{families_table(results)}"
    page.write_text(f"{head}{_BEGIN}\n\n{table}\n\n{_END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a class, read and added to")
    parser.add_argument("--kind", default=",".join(KINDS), help="kinds, with commas between them")
    parser.add_argument("--only", help="families or classes, with commas between them")
    parser.add_argument("--sample", type=int, help="judge only so many classes, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="judge classes that the results have already, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=SECONDS, help="seconds that one class may take")
    parser.add_argument("--table", type=Path, help="judge nothing: write the families' table into this page")
    asked = parser.parse_args()
    kinds = asked.kind.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"there is no kind {unknown[0]!r}: choose among {', '.join(KINDS)}")
    known = read_results(asked.results)
    if asked.table:
        write_table(asked.table, list(known.values()))
        return
    todo = tiny_models.cases(kinds)
    if asked.only:
        wanted = set(asked.only.split(","))
        todo = [case for case in todo if {case.family, case.cls, case.name} & wanted]
    if asked.sample is not None:
        todo = random.Random(asked.seed).sample(todo, min(asked.sample, len(todo)))  # noqa: S311 - no secret
    names = {case.name for case in todo}
    if not asked.again:
        todo = [case for case in todo if case.name not in known]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    began = time.monotonic()
    if len(todo) > 1:
        warm_up()
    with asked.results.open("a") as file:
        for count, result in enumerate(judge_all(todo, asked.workers, asked.timeout), 1):
            known[result.name] = result
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            print(f"{count}/{len(todo)} {result.name}: {result.verdict} {result.reason[:160]}", flush=True)
    shown = [result for name, result in known.items() if name in names]
    print(f"\n{reasons_table(shown)}\n\n{counts_table(shown)}\n\n{time.monotonic() - began:.0f} seconds")
    sys.exit(any(result.verdict in {"wrong", "crash"} for result in shown))


if __name__ == "__main__":
    main()
