"""Scores on tasks, and how they are read from what lm-eval returns."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halve.errors import HalveError


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: name of the task or group.
        metric: as lm-eval calls it, for example ``acc`` or ``acc_norm``.
        filter: what was done to the answers before they were judged; empty for nothing.
        value: the metric.
        stderr: its standard error; None where lm-eval has none.
        examples: how many examples it is over.
        num_fewshot: solved examples shown before each question; None for a group whose tasks differ.
        version: of the task's definition; empty if it has none.
        higher_is_better: None where the definition does not say.
        is_group: whether it is the aggregate of tasks that follow it.
        sha256: hash of the questions, prompts and targets, as lm-eval computes it: scores compare where it is equal.
            Empty for a group.
        weights: of a group, the share that each of its tasks (or groups in it) has in the mean, by name; empty where
            the group is no such mean, and for a task.
        of_examples: the metric of every example, in order; empty where it is no mean over examples, and for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int
    num_fewshot: int | None
    version: str
    higher_is_better: bool | None
    is_group: bool
    sha256: str
    weights: Mapping[str, float] = field(default_factory=dict)
    of_examples: tuple[float, ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the other scores of a model: task, metric and filter."""
        return self.task, self.metric, self.filter


def read_scores(name: str, loaded: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Yield the scores of one name that was asked for, a group before its tasks.

    Args:
        name: what was asked for.
        loaded: what ``TaskManager.load`` of lm-eval made of it.
        results: what ``lm_eval.evaluate`` returned for it.

    Raises:
        HalveError: a task has no result, or one that is no number.
    """
    for task in _groups_first(results):
        metrics = results["results"][task]
        is_group = task in results["group_subtasks"]
        names = [key for key in metrics if "," in key and not key.partition(",")[0].endswith("_stderr")]
        if not names and not is_group:
            raise HalveError(f"task {task!r}, asked for as {name!r}, gave no result: check its definition")
        version = results["versions"].get(task)
        for key in names:
            metric, _, used = key.partition(",")
            value = _number(metrics[key], task, metric)
            yield TaskScore(
                task=task,
                metric=metric,
                filter="" if used == "none" else used,
                value=value,
                stderr=_stderr(metrics.get(f"{metric}_stderr,{used}")),
                examples=metrics.get("sample_count", {}).get(key, metrics["sample_len"]),
                num_fewshot=results["n-shot"].get(task),
                version="" if version in {None, "N/A", "Yaml"} else str(version),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                is_group=is_group,
                sha256="" if is_group else _sha256(results["samples"][task]),
                weights=_weights(loaded["groups"][task], key, results["results"], value) if is_group else {},
                of_examples=() if is_group else _of_examples(results["samples"][task], metric, used, metrics[key]),
            )


def _weights(group: Any, key: str, results: Mapping[str, Mapping[str, Any]], value: float) -> dict[str, float]:
    """Return what each task counts in a group's mean, if that is what its value is."""
    members = [task.task_name for task in group.get_all_tasks() if key in results.get(task.task_name, {})]
    metric = key.partition(",")[0]
    by_size = {one.weight_by_size for one in group.aggregate_metric_list or () if one.metric == metric}
    if not members or len(by_size) != 1:
        return {}
    sizes = [results[member]["sample_len"] if True in by_size else 1 for member in members]
    weights = {member: size / sum(sizes) for member, size in zip(members, sizes, strict=True)}
    mean = math.fsum(weight * float(results[member][key]) for member, weight in weights.items())
    return weights if math.isclose(mean, value, abs_tol=1e-12) else {}


def _of_examples(samples: Sequence[Mapping[str, Any]], metric: str, used: str, value: Any) -> tuple[float, ...]:
    """Return a metric of every example, if the metric of the task is their mean."""
    found = [sample.get(metric) for sample in samples if sample.get("filter", used) == used]
    numbers = tuple(float(each) for each in found if isinstance(each, int | float))
    if not numbers or len(numbers) != len(found) or not math.isclose(math.fsum(numbers) / len(numbers), float(value)):
        return ()
    return numbers


def _groups_first(results: Mapping[str, Any]) -> Iterator[str]:
    """Return the names that have results, every group before its members."""
    children: Mapping[str, Sequence[str]] = results["group_subtasks"]
    members = {name for names in children.values() for name in names}

    def walk(name: str) -> Iterator[str]:
        yield name
        for child in children.get(name, ()):
            yield from walk(child)

    for name in results["results"]:
        if name not in members:
            yield from walk(name)


def _number(value: Any, task: str, metric: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise HalveError(f"{metric} of task {task!r} is no number, but {value!r}: check its definition") from error


def _stderr(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _sha256(samples: Sequence[Mapping[str, Any]]) -> str:
    from lm_eval.utils import hash_string

    hashes = [sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples]
    return str(hash_string("".join(hashes)))
