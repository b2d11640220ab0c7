"""Small tasks in lm-eval's format, written by the tests themselves."""

import json

from models import decoder
from tiny_tokenizers import byte_bpe

TOKENIZER = byte_bpe()
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


def stay_offline(tmp_path, monkeypatch):
    """No network, no cache but the test's own, and two tasks that stand for lm-eval's ten thousand."""
    import lm_eval.tasks.manager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real = lm_eval.tasks.manager.__file__
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", real.replace("manager.py", "arc/any.py"))


def llama(**changes):
    """Return a tiny model for `TOKENIZER`."""
    return decoder("llama", vocab_size=320, **changes)


def contrary():
    """Return a model that likes what `llama` dislikes."""
    model = llama()
    model.lm_head.weight.data.neg_()
    return model


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


def write_group(directory, name, members, *, by_size=True):
    """Write a group of tasks with the mean of their accuracies; every example counts the same, or every task."""
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
    text = json.dumps({"group": name, "task": members, "aggregate_metric_list": aggregate, "metadata": {"version": 5}})
    (directory / f"{name}.yaml").write_text(text)
