"""Zero-shot accuracy before and after pruning and training, on questions that are made here: nothing is downloaded.

    python bench/zero_shot.py TEXT MODEL… [--questions 200] [--words 40]

Three tasks of lm-eval, multiple choice, asked as ``halve eval --tasks`` does:

- ``capitals`` and ``countries``: one of four, for 40 countries, each way;
- ``continuation``: which of four passages goes on from the words of a text, the others being taken from elsewhere in
  it; scored by likelihood a byte (``acc_norm``).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens", "Turkey": "Ankara",
    "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "Belgium": "Brussels", "Russia": "Moscow", "Ukraine": "Kyiv", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Morocco": "Rabat", "Ethiopia": "Addis Ababa", "Ghana": "Accra", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Cuba": "Havana", "Canada": "Ottawa", "Mexico": "Mexico City", "Peru": "Lima",
    "Chile": "Santiago", "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Australia": "Canberra",
    "Colombia": "Bogota",
}  # fmt: skip
CHOICES = 4
"""Answers to choose from."""
GOES_ON = 12
"""Words of a continuation."""


def capitals() -> Iterator[dict[str, Any]]:
    """Yield a question for every country."""
    yield from chosen(list(CAPITALS.items()))


def countries() -> Iterator[dict[str, Any]]:
    """Yield a question for every capital."""
    yield from chosen([(capital, country) for country, capital in CAPITALS.items()])


def chosen(pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield questions whose wrong answers are those of the next ones."""
    for index, (asked, answer) in enumerate(pairs):
        wrong = [pairs[(index + step) % len(pairs)][1] for step in (7, 13, 19)]
        place = index % CHOICES
        yield {"asked": asked, "choices": [*wrong[:place], answer, *wrong[place:]], "answer": place}


def continuations(text: str, questions: int, words: int) -> Iterator[dict[str, Any]]:
    """Yield beginnings from all over a text, what follows there, and what follows elsewhere."""
    found = text.split()
    draw = random.Random(0)  # noqa: S311 - a reproducible choice
    last = len(found) - words - GOES_ON
    starts = [index * last // questions for index in range(questions)]
    for number, start in enumerate(starts):
        begun = start + words
        places = [draw.randrange(words, last) for _ in range(CHOICES - 1)]
        right, *wrong = (" ".join(found[place : place + GOES_ON]) for place in (begun, *places))
        place = number % CHOICES
        asked = " ".join(found[start:begun])
        yield {"asked": asked, "choices": [*wrong[:place], right, *wrong[place:]], "answer": place}


def write_tasks(folder: Path, text: str, questions: int, words: int) -> list[str]:
    """Write definitions and questions, and return the tasks' names."""
    made = {
        "capitals": ("The capital of {{asked}} is", capitals(), "acc"),
        "countries": ("{{asked}} is the capital of", countries(), "acc"),
        "continuation": ("{{asked}}", continuations(text, questions, words), "acc_norm"),
    }
    for name, (prompt, asked, metric) in made.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(each) for each in asked), encoding="utf-8")
        definition = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": prompt,
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML too
    return list(made)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a .txt that no model was calibrated or trained on")
    parser.add_argument("models", nargs="+", help="directories, .gguf files or hub ids; the first is compared with")
    parser.add_argument("--questions", type=int, default=200, help="continuations")
    parser.add_argument("--words", type=int, default=40, help="of the text before each")
    parser.add_argument("--forward-dtype", default="auto")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the questions, ask them, and return the exit code of ``halve eval``."""
    asked = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="halve-") as name:
        text = asked.text.read_text(encoding="utf-8")
        tasks = write_tasks(Path(name), text, asked.questions, asked.words)
        command = [sys.executable, "-m", "halve", "eval", *asked.models, "--tasks", ",".join(tasks)]
        command += ["--tasks-path", name, "--forward-dtype", asked.forward_dtype]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
