"""What ``halve eval`` prints of accuracy: tables of tasks' scores and paired tests, the same as JSON, and of top-1."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from halve.evaluation.paired import Difference, differences
from halve.evaluation.scores import TaskScore
from halve.evaluation.tasks import TaskResults
from halve.evaluation.top_one import TopOne
from halve.report.record import finite


def score_table(models: Sequence[str], results: Sequence[TaskResults]) -> Table:
    """Return a row a metric and a column a model; then the differences to the first model."""
    columns = [Column(Text(model), justify="right") for model in models]
    compared = [Column(Text(_versus(model, models[0])), justify="right") for model in models[1:]]
    table = Table(
        "task", "metric", "shots", "examples", *columns, *compared, caption=Text(f"± standard error; {_how(results)}")
    )
    by_key = [{score.key: score for score in result.scores} for result in results]
    against = [{_key(one): one for one in differences(results[0], result)} for result in results[1:]]
    for key in dict.fromkeys(key for scores in by_key for key in scores):
        scores = [found.get(key) for found in by_key]
        some = next(score for score in scores if score is not None)
        table.add_row(
            Text(f"{some.task} (group)" if some.is_group else some.task),
            Text(_metric(some)),
            "" if some.num_fewshot is None else str(some.num_fewshot),
            str(some.examples),
            *["none" if score is None else _number(score.value, score.stderr) for score in scores],
            *[_number(one[key].value, one[key].stderr, sign="+") if key in one else "" for one in against],
        )
    return table


def top_one_table(models: Sequence[str], results: Sequence[TopOne]) -> Table:
    """Return a row a model; with several models, the differences to the first one's, picture by picture."""
    several = len(models) > 1
    apart = [Column(name, justify="right") for name in (f"- {Path(models[0]).name}'s", "lost", "gained", "p")]
    counted = [Column("95 % interval", justify="right"), *(apart if several else [])]
    meant = "difference in points ± standard error; lost: only the first is right; p: exact McNemar test, two-sided; "
    how = f"{', '.join(f'{package} {version}' for package, version in results[0].versions.items())}"
    table = Table(
        "model",
        "pictures of",
        Column("top-1", justify="right"),
        *counted,
        "pictures",
        "dtype",
        "seconds",
        caption=Text((meant if several else "") + how),
    )
    for model, result in zip(models, results, strict=True):
        change = None if result is results[0] else result.minus(results[0])
        told = ["", "", "", ""]
        if change is not None:
            told = [str(change), str(change.lost), str(change.gained), f"{change.p_value:.2g}"]
        low, high = result.interval
        table.add_row(
            Text(model),
            Text(result.source),
            f"{100 * result.value:.2f} %",
            f"{100 * low:.2f} to {100 * high:.2f}",
            *(told if several else []),
            str(result.pictures),
            result.dtype,
            f"{result.seconds:.1f}",
        )
    return table


def paired_tables(models: Sequence[str], results: Sequence[TaskResults]) -> Iterator[Table]:
    """Yield, for every model but the first, the McNemar tests against the first, where there is any."""
    for model, result in zip(models[1:], results[1:], strict=True):
        table = Table(
            *["task", "metric"],
            *[Column(name, justify="right") for name in ("examples", "lost", "gained", "p")],
            title=Text(f"{_versus(model, models[0])}, example by example"),
            caption=Text("lost: only the first is right; gained: only the second; p: exact McNemar test, two-sided"),
        )
        for one in differences(results[0], result):
            if one.p_value is not None:
                name = f"{one.task} (group)" if one.is_group else one.task
                counts = map(str, (one.tested, one.lost, one.gained))
                table.add_row(Text(name), Text(_judged(one.metric, one.filter)), *counts, f"{one.p_value:.2g}")
        if table.row_count:
            yield table


def sentences(models: Sequence[str], results: Sequence[TaskResults]) -> Iterator[str]:
    """Yield what the groups fix, what one task makes of a group's difference, and what lm-eval warned of."""
    for name, group in results[0].groups.items():
        yield f"{name} fixes tasks, shots and metrics as {group.of}, and counts every task the same"
    for model, result in zip(models[1:], results[1:], strict=True):
        for one in differences(results[0], result):
            if ends := one.extremes():
                low, high = (f"{one.without[task]:+.4f} (without {task})" for task in ends)
                yield (
                    f"{one.task} {_judged(one.metric, one.filter)}, {_versus(model, models[0])}: {one.value:+.4f}; "
                    f"one task left out, from {low} to {high}"
                )
    for result in results:
        yield from result.notes


def task_entry(result: TaskResults, first: str, first_result: TaskResults) -> dict[str, Any]:
    """Return what ``--json`` prints of a model's scores, and of their differences to the first model's."""
    rest = {key: value for key, value in asdict(result).items() if key != "scores"}
    scores = [
        {
            **{key: value for key, value in asdict(score).items() if key != "of_examples"},
            "value": finite(score.value),
            "stderr": None if score.stderr is None else finite(score.stderr),
        }
        for score in result.scores
    ]
    entry: dict[str, Any] = {**rest, "tasks": scores}
    if result is not first_result:
        entry["against"] = first
        entry["differences"] = [
            {
                **asdict(one),
                "value": finite(one.value),
                "stderr": None if one.stderr is None else finite(one.stderr),
                "without": {task: finite(value) for task, value in one.without.items()},
            }
            for one in differences(first_result, result)
        ]
    return entry


def _how(results: Sequence[TaskResults]) -> str:
    """Say how the figures were measured; where models differ in it, what each has, in their order."""
    first = results[0]
    return "; ".join(
        (
            "all examples" if first.limit is None else f"at most {first.limit} examples of a task",
            _each(result.dtype for result in results),
            f"at most {_each(str(result.max_length) for result in results)} tokens",
            _each(f"BOS {result.bos}" if result.bos else "no BOS" for result in results),
            ", ".join(f"{package} {version}" for package, version in first.versions.items()),
        )
    )


def _each(values: Iterable[str]) -> str:
    every = list(values)
    return every[0] if len(set(every)) == 1 else " | ".join(every)


def _versus(model: str, first: str) -> str:
    return f"{Path(model).name} - {Path(first).name}"


def _key(difference: Difference) -> tuple[str, str, str]:
    return difference.task, difference.metric, difference.filter


def _number(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _judged(metric: str, used: str) -> str:
    return metric + (f" ({used})" if used else "")


def _metric(score: TaskScore) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
    return _judged(score.metric, score.filter) + arrow
