"""Small tasks in lm-eval's format, written by the tests themselves."""

import json

QUESTIONS = (
    "the quick brown",
    "over the lazy",
    "a sparse",
    "weights that a",
    "pruning removes",
    "two of every",
    "the exponential of",
    "keeps two of",
    "a network can do",
    "jumps over",
)
CHOICES = ("fox", "dog jumps", "matrix", "network can")
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
NORMALISED = {**ACCURACY, "metric": "acc_norm"}
EXACT = {**ACCURACY, "metric": "exact_match"}


def documents(answers=None):
    """Return questions with four choices each; by default they are all told apart by the tests' models."""
    answers = [index // 3 % 4 for index in range(len(QUESTIONS))] if answers is None else answers
    return [
        {"question": question, "choices": list(CHOICES), "answer": answer}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]


def write_task(directory, name, rows=None, **changes):
    """Write the definition of a task, multiple choice unless changed, and its examples."""
    directory.mkdir(exist_ok=True)
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (documents() if rows is None else rows)))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [ACCURACY, NORMALISED],
        "metadata": {"version": 3},
        **changes,
    }
    text = json.dumps({key: value for key, value in definition.items() if value is not None})
    (directory / f"{name}.yaml").write_text(text)  # JSON is YAML
    return directory


def write_group(directory, name, members):
    """Write a group of tasks with the mean of their accuracies, every example counting the same."""
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    text = json.dumps({"group": name, "task": members, "aggregate_metric_list": aggregate, "metadata": {"version": 5}})
    (directory / f"{name}.yaml").write_text(text)
