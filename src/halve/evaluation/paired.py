"""Two models on the same examples: is their difference more than chance, and does one task carry it?"""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from halve.evaluation.scores import TaskScore
from halve.evaluation.tasks import TaskResults


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of one task, or of a group, of a second model compared with a first.

    Attributes:
        task: name of the task or group.
        metric: see `halve.evaluation.scores.TaskScore`.
        filter: see there.
        value: score of the second model minus score of the first.
        stderr: standard error of the difference, of the examples being drawn anew: of a task, that of the mean of the
            differences example by example; of a group, of the weighted mean of those, the tasks being independent.
            None where the models did not answer the same examples, or the metric is no mean over them.
        lost: examples that the first model has right and the second wrong; of a group, in all its tasks.
        gained: examples that the first model has wrong and the second right.
        tested: examples that are either right or wrong: ``lost`` and ``gained`` are counted among these.
        p_value: exact McNemar test, two-sided, of ``lost`` and ``gained`` being equally likely; None where no example
            is either right or wrong.
        is_group: whether it is of a group.
        without: of a group, the difference without each of its tasks, by the task that is left out.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    lost: int
    gained: int
    tested: int
    p_value: float | None
    is_group: bool
    without: Mapping[str, float] = field(default_factory=dict)

    def extremes(self) -> tuple[str, str] | None:
        """Return the tasks without which the difference is smallest and largest; None where none can be left out."""
        if not self.without:
            return None
        ordered = sorted(self.without, key=self.without.__getitem__)
        return ordered[0], ordered[-1]


def differences(first: TaskResults, second: TaskResults) -> tuple[Difference, ...]:
    """Compare two models that were measured on the same tasks, score by score.

    Args:
        first: of the model compared with, usually the dense one.
        second: of the other.

    Returns:
        One for each score that both have, in the order of the second's.
    """
    theirs = {score.key: score for score in first.scores}
    pairs = {score.key: (theirs[score.key], score) for score in second.scores if score.key in theirs}
    return tuple(_difference(key, pairs) for key in pairs)


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    It is the chance that a fair coin, thrown once for every example that the models differ on, falls at least as
    unevenly; exact, in whole numbers, so that a handful of examples is as good as thousands.

    Args:
        lost: examples that only the first model has right.
        gained: examples that only the second model has right.
    """
    thrown, term, tail = lost + gained, 1, 0
    for count in range(min(lost, gained) + 1):
        tail += term
        term = term * (thrown - count) // (count + 1)
    return min(1.0, 2 * tail / (1 << thrown))


_Key = tuple[str, str, str]
_Pairs = Mapping[_Key, tuple[TaskScore, TaskScore]]


def _difference(key: _Key, pairs: _Pairs) -> Difference:
    first, second = pairs[key]
    lost, gained, tested = _discordant(key, pairs)
    return Difference(
        task=second.task,
        metric=second.metric,
        filter=second.filter,
        value=second.value - first.value,
        stderr=_stderr(key, pairs),
        lost=lost,
        gained=gained,
        tested=tested,
        p_value=mcnemar(lost, gained) if tested else None,
        is_group=second.is_group,
        without=dict(_without(key, pairs)),
    )


def _same_examples(first: TaskScore, second: TaskScore) -> bool:
    return first.sha256 == second.sha256 and len(first.of_examples) == len(second.of_examples)


def _members(key: _Key, pairs: _Pairs) -> dict[_Key, float] | None:
    """Return the scores that a group is the mean of, with their weights; None for what is no such mean of all."""
    weights = pairs[key][1].weights
    if not weights or weights.keys() != pairs[key][0].weights.keys():
        return None
    found: dict[_Key, float] = {}
    for name, weight in weights.items():
        # A group of lm-eval has several metrics, each the mean of the same metric; one of ours has one score a task.
        keys = [one for one in pairs if one[0] == name]
        same = [one for one in keys if one[1:] == key[1:]] or keys
        if len(same) != 1:
            return None
        found[same[0]] = weight
    return found


def _stderr(key: _Key, pairs: _Pairs) -> float | None:
    first, second = pairs[key]
    if not second.is_group:
        if len(second.of_examples) < 2 or not _same_examples(first, second):
            return None
        each = [mine - theirs for mine, theirs in zip(second.of_examples, first.of_examples, strict=True)]
        return statistics.stdev(each) / math.sqrt(len(each))
    members = _members(key, pairs)
    if members is None:
        return None
    parts = [(weight, _stderr(member, pairs)) for member, weight in members.items()]
    known = [weight * stderr for weight, stderr in parts if stderr is not None]
    return math.hypot(*known) if len(known) == len(parts) else None


def _discordant(key: _Key, pairs: _Pairs) -> tuple[int, int, int]:
    """Return how many examples only the first has right, only the second has right, and how many can be judged so."""
    first, second = pairs[key]
    if second.is_group:
        counts = [_discordant(member, pairs) for member in _members(key, pairs) or ()]
        lost, gained, tested = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
        return lost, gained, tested
    judged = {0.0, 1.0}.issuperset((*first.of_examples, *second.of_examples))
    if not judged or second.higher_is_better is False or not _same_examples(first, second):
        return 0, 0, 0
    both = list(zip(first.of_examples, second.of_examples, strict=True))
    return both.count((1.0, 0.0)), both.count((0.0, 1.0)), len(both)


def _without(key: _Key, pairs: _Pairs) -> Iterator[tuple[str, float]]:
    """Yield the difference of a group's means without each task, the weights of the others growing alike."""
    members = _members(key, pairs) if pairs[key][1].is_group else None
    if members is None or len(members) < 2:
        return
    shares = {member: weight * (pairs[member][1].value - pairs[member][0].value) for member, weight in members.items()}
    for left_out in members:
        rest = [member for member in members if member != left_out]
        yield left_out[0], math.fsum(shares[one] for one in rest) / math.fsum(members[one] for one in rest)
