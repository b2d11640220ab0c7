"""Options of a training: what they mean, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import torch

from halve.errors import InputError
from halve.learning.launch import processes
from halve.learning.options import (
    Finetuning,
    Machine,
    Schedule,
    Shape,
    TrainingText,
    WeightedText,
    check_trackers,
    parse_count,
)
from halve.learning.training.losses import Target
from halve.option_groups import fill
from halve.serial import from_plain, to_plain


@pytest.mark.parametrize(
    ("text", "number"),
    [(5, 5), ("300k", 300_000), ("2M", 2_000_000), ("1.5m", 1_500_000), ("1_000", 1000), ("1b", 10**9)],
)
def test_numbers_of_tokens(text, number):
    assert parse_count("tokens", text) == number


@pytest.mark.parametrize("text", ["", "many", "2 M M", "-3", "1e6", 0, "0", 2.5, True])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(InputError, match="tokens"):
        parse_count("tokens", text)


def test_sources_have_weights(tmp_path):
    (tmp_path / "a=3").write_text("")
    assert WeightedText.parse("a.txt=2.5") == WeightedText("a.txt", 2.5)
    assert WeightedText.parse("c4") == WeightedText("c4", 1.0)
    assert WeightedText.parse("a=b.txt") == WeightedText("a=b.txt")
    assert WeightedText.parse(tmp_path / "a=3") == WeightedText(str(tmp_path / "a=3"))
    for wrong in ("a=0", "a=-1", "a=nan"):
        with pytest.raises(InputError, match="the weight of the training text a"):
            WeightedText.parse(wrong)


@pytest.mark.parametrize(
    ("group", "wrong", "match"),
    [
        (TrainingText, {"seq_len": 1}, "seq_len"),
        (TrainingText, {"loss_on": "user"}, "loss_on = 'user' is not known: choose one of assistant, all"),
        (TrainingText, {"bos": "sometimes"}, "bos"),
        (TrainingText, {"seed": 1.5}, "seed must be a whole number"),
        (Schedule, {"learning_rate": "fast"}, "learning_rate = 'fast' is no number"),
        (Schedule, {"learning_rate": 0.0}, "learning_rate"),
        (Schedule, {"warmup": 2.0}, "warmup must be a share between 0 and 1"),
        (Schedule, {"last_rate": -0.1}, "last_rate must be a share"),
        (Schedule, {"weight_decay": -1.0}, "weight_decay"),
        (Schedule, {"clip": -1.0}, "clip"),
        (Schedule, {"evaluations": 0}, "evaluations"),
        (Schedule, {"patience": 0}, "patience"),
        (Schedule, {"save_every": 0}, "save_every"),
        (Machine, {"forward_dtype": "float16"}, "float16"),
        (Machine, {"attention": "magic"}, "attention"),
        (Finetuning, {"train": "embeddings"}, "everything"),
        (Finetuning, {"rank": 0}, "rank"),
        (Finetuning, {"alpha": 0.0}, "alpha"),
        (Finetuning, {"ce_share": 1.1}, "ce_share"),
        (Finetuning, {"temperature": 0}, "temperature"),
        (Finetuning, {"teacher": "none", "text": TrainingText(data="self")}, "teacher is none: give another text"),
    ],
)
def test_values_that_cannot_be_used_are_refused(group, wrong, match):
    with pytest.raises(InputError, match=match):
        group(**wrong)


def test_without_a_teacher_the_text_alone_counts():
    assert Finetuning(teacher="none").target == Target(1.0)
    assert Finetuning(teacher=Path("dense"), ce_share=0.25, temperature=2.0).target == Target(0.25, 2.0)


def test_lengths_have_to_fit_each_other(tmp_path):
    (tmp_path / "t.txt").write_text("text")
    data = str(tmp_path / "t.txt")
    fill(Finetuning, {"data": data}).check()
    for options, match in (
        ({}, "no training text was named"),
        ({"data": tmp_path / "no.txt"}, r"no\.txt"),
        ({"data": data, "batch_tokens": 100}, "batch_tokens = 100 is less than one sequence"),
        ({"data": data, "tokens": 100}, "tokens = 100 is less than one step"),
    ):
        with pytest.raises(InputError, match=match):
            fill(Finetuning, options).check()


@pytest.mark.parametrize(
    ("batch", "forward", "count", "shape"),
    [
        (1024, 512, 1, (9, 4, 2)),
        (1024, 10_000, 1, (9, 8, 1)),
        (1024, 1, 2, (9, 1, 4)),
        (640, 400, 1, (15, 1, 5)),
    ],
)
def test_steps_are_shared_out(batch, forward, count, shape):
    request = fill(Finetuning, {"tokens": 10_000, "seq_len": 128, "batch_tokens": batch, "forward_tokens": forward})
    found = Shape.of(request, count)
    assert (found.steps, found.rows, found.passes) == shape
    assert found.sequences == found.steps * batch // 128
    assert found.rows * 128 <= max(forward, 128)


@pytest.mark.parametrize(
    ("tokens", "processes", "step", "steps"),
    [
        ("300", 1, 128, 2),  # a sequence a step, where the tokens are few
        ("100k", 1, 128, 781),
        ("200k", 1, 256, 781),
        ("410k", 1, 1024, 400),
        ("200k", 3, 384, 520),
        ("2M", 1, 4096, 488),
        ("100M", 1, 16_384, 6103),
    ],
)
def test_a_step_is_chosen_by_the_number_of_steps(tokens, processes, step, steps):
    request = fill(Finetuning, {"tokens": tokens, "seq_len": 128})
    assert request.step_tokens(processes) == step
    assert Shape.of(request, processes).steps == steps


def test_a_step_that_cannot_be_shared_out_is_refused():
    request = fill(Finetuning, {"seq_len": 128, "batch_tokens": 640})
    with pytest.raises(InputError, match="5 sequences cannot be shared out over 2 processes: give batch_tokens = 512"):
        Shape.of(request, 2)
    with pytest.raises(InputError, match="give batch_tokens = 1024"):
        Shape.of(request, 8)


def test_a_request_comes_back_from_plain_values():
    request = fill(Finetuning, {"data": ["a.txt", "self"], "tokens": "3M", "learning_rate": 1e-3, "train": "norms"})
    assert from_plain(Finetuning, to_plain(request)) == request
    assert request.text.is_self_written
    assert request.text.is_far
    assert not TrainingText(data="a.txt").is_far


def test_processes_are_those_of_the_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes() == 4
    assert Machine(device="cpu", forward_dtype="float32").precision == torch.float32


def test_trackers_that_are_not_installed_are_refused():
    with pytest.raises(InputError, match="log_to = 'nothing' is no tracker that is installed here"):
        check_trackers(["nothing"])
    check_trackers([])
