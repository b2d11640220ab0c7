import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from halve.evaluation.paired import differences, mcnemar
from halve.evaluation.scores import TaskScore
from halve.evaluation.task_groups import mean_score
from halve.evaluation.tasks import TaskResults


def score(task, answers, *, metric="acc", **changes):
    values = {
        "task": task,
        "metric": metric,
        "filter": "",
        "value": sum(answers) / len(answers),
        "stderr": 0.1,
        "examples": len(answers),
        "num_fewshot": 0,
        "version": "1",
        "higher_is_better": True,
        "is_group": False,
        "sha256": task,
        "of_examples": tuple(map(float, answers)),
    }
    return TaskScore(**{**values, **changes})


def results(*scores):
    return TaskResults(scores, {}, "float32", 128, "", None, 1.0, {}, ())


def by_size(name, parts):
    """The score of a group in which every example counts the same."""
    total = sum(part.examples for part in parts)
    weights = {part.task: part.examples / total for part in parts}
    value = sum(weights[part.task] * part.value for part in parts)
    return replace(mean_score(name, parts), value=value, weights=weights)


def answers(seed, count, share=0.5):
    return [int(random.Random(seed * 1000 + at).random() < share) for at in range(count)]


@pytest.mark.parametrize("thrown", range(11))
def test_mcnemar_is_what_all_throws_of_a_coin_say(thrown):
    heads = [sum(throw) for throw in itertools.product((0, 1), repeat=thrown)]
    for lost in range(thrown + 1):
        uneven = abs(2 * lost - thrown)
        expected = sum(abs(2 * each - thrown) >= uneven for each in heads) / len(heads)
        assert mcnemar(lost, thrown - lost) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_thousands_is_near_the_normal_tail():
    lost, gained = 5200, 4800
    corrected = (abs(lost - gained) - 1) / math.sqrt(lost + gained)
    assert mcnemar(lost, gained) == pytest.approx(math.erfc(corrected / math.sqrt(2)), rel=1e-2)
    assert mcnemar(20000, 0) == 0.0  # less than a float holds, and no overflow


def test_a_task():
    mine, theirs = answers(1, 40), answers(2, 40, 0.7)
    (one,) = differences(results(score("a", theirs)), results(score("a", mine)))
    both = np.array([theirs, mine])
    assert (one.task, one.metric, one.tested, one.is_group) == ("a", "acc", 40, False)
    assert one.lost == ((both[0] == 1) & (both[1] == 0)).sum() > 0
    assert one.gained == ((both[0] == 0) & (both[1] == 1)).sum() > 0
    assert one.p_value == mcnemar(one.lost, one.gained)
    assert one.value == pytest.approx((both[1] - both[0]).mean())
    assert one.stderr == pytest.approx((both[1] - both[0]).std(ddof=1) / math.sqrt(40))
    assert (one.without, one.extremes()) == ({}, None)


def test_other_examples_are_not_paired():
    mine, theirs = score("a", answers(1, 9)), score("a", answers(2, 9))
    for changed in ({"sha256": "other"}, {"of_examples": ()}, {"of_examples": (1.0, 0.0)}):
        (one,) = differences(results(replace(theirs, **changed)), results(mine))
        assert (one.stderr, one.lost, one.gained, one.tested, one.p_value) == (None, 0, 0, 0, None)
        assert one.value == pytest.approx(mine.value - theirs.value)
    assert differences(results(theirs), results(replace(mine, task="b"))) == ()


def test_what_is_not_right_or_wrong_has_an_error_and_no_test():
    mine, theirs = score("a", [0.25, 0.5, 1.0]), score("a", [0.5, 0.0, 1.0])
    (one,) = differences(results(theirs), results(mine))
    assert (one.tested, one.p_value) == (0, None)
    assert one.stderr == pytest.approx(np.std([-0.25, 0.5, 0], ddof=1) / math.sqrt(3))
    errors = {"higher_is_better": False}  # of which 1 is not right
    (one,) = differences(results(score("e", [0, 1], **errors)), results(score("e", [1, 0], **errors)))
    assert (one.tested, one.p_value) == (0, None)


@pytest.mark.parametrize("mean", [mean_score, by_size])
def test_a_group(mean):
    sizes = {"a": 12, "b": 30, "c": 50}
    theirs = [score(task, answers(seed, size, 0.7)) for seed, (task, size) in enumerate(sizes.items())]
    mine = [score(task, answers(seed + 5, size)) for seed, (task, size) in enumerate(sizes.items())]
    group, *tasks = differences(results(mean("g", theirs), *theirs), results(mean("g", mine), *mine))
    weights = {task: 1 / 3 if mean is mean_score else size / 92 for task, size in sizes.items()}
    assert group.is_group
    assert group.value == pytest.approx(sum(weights[task.task] * task.value for task in tasks))
    variance = sum((weights[task.task] * task.stderr) ** 2 for task in tasks)
    assert group.stderr == pytest.approx(math.sqrt(variance))
    assert (group.lost, group.gained) == (sum(task.lost for task in tasks), sum(task.gained for task in tasks))
    assert (group.tested, group.p_value) == (92, mcnemar(group.lost, group.gained))
    for left_out in sizes:
        fewer = [[one for one in scores if one.task != left_out] for scores in (theirs, mine)]
        expected = mean("g", fewer[1]).value - mean("g", fewer[0]).value
        assert group.without[left_out] == pytest.approx(expected)
    low, high = group.extremes()
    assert group.without[low] < group.without[high]
    assert {group.without[low], group.without[high]} == {min(group.without.values()), max(group.without.values())}


def test_the_error_of_a_groups_difference_is_that_of_drawing_the_examples_anew():
    generator = np.random.default_rng(0)
    sizes = {"a": 20, "b": 60}
    pairs = {task: generator.random((2, size)) < np.array([[0.8], [0.5]]) for task, size in sizes.items()}
    means = []
    for _ in range(4000):
        drawn = {task: both[:, generator.integers(sizes[task], size=sizes[task])] for task, both in pairs.items()}
        means.append(np.mean([(both[1].mean() - both[0].mean()) for both in drawn.values()]))
    theirs, mine = ([score(task, both[at].astype(int).tolist()) for task, both in pairs.items()] for at in (0, 1))
    group = differences(results(mean_score("g", theirs), *theirs), results(mean_score("g", mine), *mine))[0]
    assert group.stderr == pytest.approx(np.std(means), rel=0.05)


def test_a_group_in_a_group_counts_as_one_task():
    def both(seed):
        tasks = [score(task, answers(seed + at, 20)) for at, task in enumerate("abc")]
        inner = mean_score("inner", tasks[1:])
        return results(mean_score("outer", [tasks[0], inner]), tasks[0], inner, *tasks[1:])

    found = {one.task: one for one in differences(both(1), both(11))}
    assert found["outer"].without == {
        "a": pytest.approx(found["inner"].value),
        "inner": pytest.approx(found["a"].value),
    }
    assert found["outer"].stderr == pytest.approx(math.hypot(found["a"].stderr, found["inner"].stderr) / 2)
    assert found["outer"].tested == 60


def test_a_group_with_a_task_that_is_not_paired_has_no_error():
    theirs, mine = ([score("a", answers(seed, 9)), score("b", answers(seed + 1, 9))] for seed in (1, 5))
    theirs[1] = replace(theirs[1], sha256="other")
    group = differences(results(mean_score("g", theirs), *theirs), results(mean_score("g", mine), *mine))[0]
    assert (group.stderr, group.tested) == (None, 9)


def test_a_groups_metrics_are_kept_apart():
    def both(seed):
        plain = [score(task, answers(seed + at, 10)) for at, task in enumerate("ab")]
        normalised = [score(task, answers(seed + at + 7, 10), metric="acc_norm") for at, task in enumerate("ab")]
        return results(mean_score("g", plain), mean_score("g", normalised), *plain, *normalised)

    found = {(one.task, one.metric): one for one in differences(both(1), both(20))}
    for metric in ("acc", "acc_norm"):
        expected = found["a", metric].lost + found["b", metric].lost
        assert found["g", metric].lost == expected
