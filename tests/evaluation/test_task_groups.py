import math
from pathlib import Path

import pytest

from halve.errors import HalveError, InputError
from halve.evaluation.scores import TaskScore
from halve.evaluation.task_groups import TASK_GROUPS, Member, TaskGroup, mean_score, member_scores
from halve.evaluation.tasks import evaluate_tasks
from local_tasks import EXACT, TOKENIZER, documents, llama, stay_offline, write_group, write_task

OWN = TaskGroup("these tests", (Member("mc", 0, "acc_norm"), Member("short", 2, "acc")))


@pytest.fixture
def defined(tmp_path, monkeypatch):
    """A directory with the tasks ``mc`` and ``short``, and a group ``own-2`` of both."""
    stay_offline(tmp_path, monkeypatch)
    monkeypatch.setitem(TASK_GROUPS, "own-2", OWN)
    directory = write_task(tmp_path / "tasks", "mc")
    return write_task(directory, "short", documents()[:4], fewshot_split="test")


def by_task(scores):
    return {(score.task, score.metric): score for score in scores}


def test_a_group_is_the_mean_of_what_it_fixes(defined):
    options = {"tokenizer": TOKENIZER, "tasks_path": defined}
    results = evaluate_tasks(llama(), ["own-2"], **options)
    assert [(score.task, score.metric, score.num_fewshot, score.is_group) for score in results.scores] == [
        ("own-2", "mean", None, True),
        ("mc", "acc_norm", 0, False),
        ("short", "acc", 2, False),
    ]
    alone = by_task(evaluate_tasks(llama(), ["mc"], **options).scores)
    shown = by_task(evaluate_tasks(llama(), ["short"], num_fewshot=2, **options).scores)
    members = alone["mc", "acc_norm"], shown["short", "acc"]
    assert results.scores[1:] == members
    group = results.scores[0]
    assert group.value == pytest.approx((members[0].value + members[1].value) / 2)
    assert group.stderr == pytest.approx(math.sqrt(members[0].stderr ** 2 + members[1].stderr ** 2) / 2)
    assert (group.examples, group.weights) == (14, {"mc": 0.5, "short": 0.5})
    assert (group.higher_is_better, group.sha256, group.version) == (True, "", "")
    assert results.groups == {"own-2": OWN}


def test_groups_and_tasks_keep_the_order_they_were_asked_for_in(defined):
    write_task(defined, "other")
    results = evaluate_tasks(llama(), ["other", "own-2"], tokenizer=TOKENIZER, tasks_path=defined)
    assert [score.task for score in results.scores] == ["other", "other", "own-2", "mc", "short"]


def test_a_group_of_lm_eval_counts_as_one_task_and_its_tasks_the_same(defined, monkeypatch):
    write_group(defined, "both", ["mc", "short"])
    monkeypatch.setitem(TASK_GROUPS, "of-group", TaskGroup("these tests", (Member("both", 0, "acc"),)))
    options = {"tokenizer": TOKENIZER, "tasks_path": defined, "num_fewshot": 0}
    weighted = evaluate_tasks(llama(), ["both"], **options).scores[0]
    tasks = evaluate_tasks(llama(), ["mc", "short"], **options).scores
    results = evaluate_tasks(llama(), ["of-group"], tokenizer=TOKENIZER, tasks_path=defined)
    assert [score.task for score in results.scores] == ["of-group", "both", "mc", "short"]
    mean = (by_task(tasks)["mc", "acc"].value + by_task(tasks)["short", "acc"].value) / 2
    assert results.scores[1].value == results.scores[0].value == pytest.approx(mean)
    assert abs(weighted.value - mean) > 0.01  # so that a weight by size would show
    assert weighted.weights == {"mc": pytest.approx(10 / 14), "short": pytest.approx(4 / 14)}
    assert results.scores[1].weights == {"mc": 0.5, "short": 0.5}


@pytest.mark.parametrize("by_size", [True, False])
def test_the_weights_of_a_group_of_lm_eval_make_its_value(defined, by_size):
    write_group(defined, "both", ["mc", "short"], by_size=by_size)
    group, *tasks = evaluate_tasks(llama(), ["both"], tokenizer=TOKENIZER, tasks_path=defined).scores
    found = by_task(tasks)
    assert group.weights == pytest.approx({"mc": 10 / 14, "short": 4 / 14} if by_size else {"mc": 0.5, "short": 0.5})
    assert group.value == pytest.approx(sum(share * found[task, "acc"].value for task, share in group.weights.items()))


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["own-2"], {"num_fewshot": 0}, "num_fewshot = 0 does not go with 'own-2', which fixes it: leave it out"),
        (["own-2", "mc"], {}, "task 'mc' is asked for twice, in 'own-2' and in 'mc'"),
        (["both", "own-2"], {}, "task 'mc' is asked for twice, in 'both' and in 'own-2'"),
        (["own2"], {}, "there is no task 'own2' in lm-eval or .*: did you mean 'own-2'"),
        (["wanda7"], {}, "there is no task 'wanda7' in .*: did you mean 'wanda-7'"),
        (["qqqqqq"], {}, "the groups of Halve are wanda-7, .*openllm-v1"),
        (["metric"], {}, r"group 'metric' reports f1 of 'mc', whose definition has only acc, acc_norm: take lm-eval's"),
        (["filter"], {}, r"group 'filter' judges 'mc' after the filter 'strict-match', and its definition has only ''"),
        (["shots"], {}, "group 'shots' shows 5 solved examples before a question of 'zero', and its definition keeps"),
        (["missing"], {}, "there is no task 'nowhere' in lm-eval"),
        (["taken"], {}, "there is a task 'taken', and a group of Halve of that name: rename the task"),
    ],
)
def test_refused_before_a_model_is_loaded(defined, monkeypatch, names, settings, message):
    monkeypatch.setattr("halve.checkpoint.load.load_model", None)
    write_task(defined, "zero", num_fewshot=0)
    write_task(defined, "taken")
    write_group(defined, "both", ["mc", "short"])
    groups = {
        "metric": Member("mc", 0, "f1"),
        "filter": Member("mc", 0, "acc", "strict-match"),
        "shots": Member("zero", 5, "acc"),
        "missing": Member("nowhere", 0, "acc"),
        "taken": Member("mc", 0, "acc"),
    }
    for name, member in groups.items():
        monkeypatch.setitem(TASK_GROUPS, name, TaskGroup("these tests", (member,)))
    with pytest.raises(InputError, match=message):
        evaluate_tasks("no/model", names, **{"tasks_path": defined, **settings})


def test_a_filter_is_fixed_too(defined, monkeypatch):
    """As of gsm8k, whose answers are judged twice, after different filters."""
    first = {"function": "take_first"}
    filters = [
        {"name": "none-of-it", "filter": [{"function": "regex", "regex_pattern": "(qqq)"}, first]},
        {"name": "all-of-it", "filter": [first]},
    ]
    generation = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    changes = {"doc_to_target": "{{question}}", "doc_to_choice": None, "generation_kwargs": generation}
    write_task(defined, "gen", output_type="generate_until", metric_list=[EXACT], filter_list=filters, **changes)
    member = Member("gen", 0, "exact_match", "all-of-it")
    monkeypatch.setitem(TASK_GROUPS, "written", TaskGroup("these tests", (member,)))
    group, task = evaluate_tasks(llama(), ["written"], tokenizer=TOKENIZER, tasks_path=defined).scores
    assert (task.task, task.filter, group.filter, group.metric) == ("gen", "all-of-it", "all-of-it", "exact_match")


@pytest.mark.parametrize("name", TASK_GROUPS)
def test_the_page_shows_what_a_group_fixes(name):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    shots, shown = None, []
    for cell in row.split("|")[2].split(","):
        given, _, rest = cell.strip().rpartition("-shot ")
        shots = int(given) if given else shots
        task, metric, *used = rest.split()
        shown.append(Member(task.strip("`"), shots, metric, "".join(used).strip("()")))
    assert tuple(shown) == TASK_GROUPS[name].members


def score(task, **changes):
    values = {"metric": "acc", "filter": "", "value": 0.5, "stderr": 0.1, "examples": 4, "num_fewshot": 0}
    values.update(version="1", higher_is_better=True, is_group=False, sha256=task, **changes)
    return TaskScore(task=task, **values)


def test_a_mean_says_what_its_parts_have_in_common():
    alike = mean_score("g", [score("a"), score("b")])
    assert (alike.metric, alike.filter, alike.num_fewshot, alike.higher_is_better) == ("acc", "", 0, True)
    parts = [score("a"), score("b")]
    other = TaskScore(**{**vars(score("c")), "metric": "f1", "num_fewshot": 5, "stderr": None, "filter": "strict"})
    mixed = mean_score("g", [*parts, other])
    assert (mixed.metric, mixed.filter, mixed.num_fewshot, mixed.stderr) == ("mean", "", None, None)


def test_a_member_without_its_metric_is_no_silent_gap():
    with pytest.raises(HalveError, match="task 'a' of group 'g' gave no f1: check its definition"):
        member_scores("g", Member("a", 0, "f1"), [score("a")])


def definitions(index, name):
    """Yield the definitions of all the tasks that a name of lm-eval stands for, as they are on disk."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = index[name]
    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
    members = config.get("task")
    if isinstance(members, list):
        for member in members:
            yield from definitions(index, member)
    elif entry.tags and config.get("task") != name:
        for member in entry.tags:
            yield from definitions(index, member)
    else:
        yield config


@pytest.fixture(scope="module")
def index():
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


@pytest.mark.parametrize("group", TASK_GROUPS)
def test_lm_eval_has_every_task_of_every_group_with_its_metric(index, group):
    assert group not in index
    for member in TASK_GROUPS[group].members:
        found = list(definitions(index, member.task))
        assert len(found) == (57 if member.task == "mmlu" else 1)
        for config in found:
            metrics = [one["metric"] for one in config["metric_list"]]
            filters = [one["name"] for one in config.get("filter_list") or ()] or [""]
            assert member.metric in metrics
            assert member.filter in filters
            assert config["output_type"] in {"multiple_choice", "generate_until"}
            assert not config.get("unsafe_code")
            if member.num_fewshot:
                assert config.get("num_fewshot") != 0  # or lm-eval keeps to 0
                assert config.get("fewshot_split") or config.get("training_split")
