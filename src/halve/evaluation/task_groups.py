"""Groups of tasks by the names papers use: which tasks, with how many solved examples, judged by which metric."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from halve.errors import HalveError, InputError
from halve.evaluation.scores import TaskScore


@dataclass(frozen=True)
class Member:
    """A task of a group.

    Attributes:
        task: as lm-eval calls it. A group of lm-eval counts as one task: the mean of its tasks, each counting the same.
        num_fewshot: solved examples shown before each question.
        metric: the one that the group's table has.
        filter: what is done to the answers before they are judged; empty for nothing.
    """

    task: str
    num_fewshot: int
    metric: str
    filter: str = ""


@dataclass(frozen=True)
class TaskGroup:
    """Tasks whose mean is reported as one figure, every task counting the same.

    Attributes:
        of: whose table it is.
        members: its tasks.
    """

    of: str
    members: tuple[Member, ...]


def _zero_shot(**metrics: str) -> tuple[Member, ...]:
    return tuple(Member(task, 0, metric) for task, metric in metrics.items())


TASK_GROUPS = {
    "wanda-7": TaskGroup(
        "Wanda, arXiv 2306.11695",
        _zero_shot(
            boolq="acc",
            rte="acc",
            hellaswag="acc",
            winogrande="acc",
            arc_easy="acc",
            arc_challenge="acc",
            openbookqa="acc",
        ),
    ),
    "shortened-llama-7": TaskGroup(
        "Shortened LLaMA, arXiv 2402.02834",
        _zero_shot(
            boolq="acc",
            piqa="acc",
            hellaswag="acc_norm",
            winogrande="acc",
            arc_easy="acc",
            arc_challenge="acc_norm",
            openbookqa="acc_norm",
        ),
    ),
    "slicegpt-5": TaskGroup(
        "SliceGPT, arXiv 2401.15024",
        _zero_shot(
            piqa="acc_norm", hellaswag="acc_norm", arc_easy="acc_norm", arc_challenge="acc_norm", winogrande="acc"
        ),
    ),
    "openllm-v1": TaskGroup(
        "the Open LLM Leaderboard, version 1",
        (
            Member("arc_challenge", 25, "acc_norm"),
            Member("hellaswag", 10, "acc_norm"),
            Member("mmlu", 5, "acc"),
            Member("truthfulqa_mc2", 0, "acc"),
            Member("winogrande", 5, "acc"),
            Member("gsm8k", 5, "exact_match", "strict-match"),
        ),
    ),
}
"""Every group by its name. Where each definition was found is in docs/tasks.md."""


def check_member(group: str, member: Member, definition: Any) -> None:
    """Hold a loaded task to what its group fixes.

    Args:
        group: name of the group.
        member: what it fixes.
        definition: lm-eval's task, its number of solved examples set.

    Raises:
        InputError: the task's definition has not the metric or the filter, or keeps to another number of examples.
    """
    task = definition.task_name
    metrics = tuple(definition.aggregation())
    if member.metric not in metrics:
        raise InputError(
            f"task group {group!r} reports {member.metric} of {task!r}, whose definition has only "
            f"{', '.join(metrics)}: take lm-eval's own definition of the task, or ask for the task itself"
        )
    filters = [one["name"] for one in definition.get_config("filter_list") or ()] or [""]
    if member.filter not in filters:
        raise InputError(
            f"task group {group!r} judges {task!r} after the filter {member.filter!r}, and its definition has only "
            f"{', '.join(map(repr, filters))}: take lm-eval's own definition of the task, or ask for the task itself"
        )
    shots = definition.get_config("num_fewshot")
    if shots != member.num_fewshot:
        raise InputError(
            f"task group {group!r} shows {member.num_fewshot} solved examples before a question of {task!r}, and its "
            f"definition keeps to {shots}: take lm-eval's own definition of the task, or ask for the task itself"
        )


def member_scores(group: str, member: Member, scores: Iterable[TaskScore]) -> list[TaskScore]:
    """Return what a group reports of a member, out of all its scores: of a group of lm-eval, the mean first.

    Raises:
        HalveError: the member has no such score.
    """
    fixed = [score for score in scores if (score.metric, score.filter) == (member.metric, member.filter)]
    tasks = [score for score in fixed if not score.is_group]
    if not tasks:
        raise HalveError(f"task {member.task!r} of group {group!r} gave no {member.metric}: check its definition")
    if [score.task for score in tasks] == [member.task]:
        return tasks
    return [mean_score(member.task, tasks), *tasks]


def mean_score(name: str, parts: Sequence[TaskScore]) -> TaskScore:
    """Return the mean of scores of different tasks, each counting the same, as the score of a group.

    The standard error takes the tasks as independent; it is None where one of them has none.
    """
    stderrs = [part.stderr for part in parts if part.stderr is not None]
    known = len(stderrs) == len(parts)
    return TaskScore(
        task=name,
        metric=_common([part.metric for part in parts], "mean"),
        filter=_common([part.filter for part in parts], ""),
        value=math.fsum(part.value for part in parts) / len(parts),
        stderr=math.hypot(*stderrs) / len(parts) if known else None,
        examples=sum(part.examples for part in parts),
        num_fewshot=_common([part.num_fewshot for part in parts], None),
        version="",
        higher_is_better=_common([part.higher_is_better for part in parts], None),
        is_group=True,
        sha256="",
        weights={part.task: 1 / len(parts) for part in parts},
    )


def _common(values: Sequence[Any], otherwise: Any) -> Any:
    """Return the value that all have, or ``otherwise``."""
    return values[0] if len(set(values)) == 1 else otherwise
