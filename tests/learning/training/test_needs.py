"""What a training takes, and when it is refused."""

import pytest
import torch

from halve.checkpoint.load import resolve
from halve.errors import InputError
from halve.learning.options import Shape
from halve.learning.training import needs as module
from halve.learning.training.needs import Needs, activation_bytes, in_bytes, least_needs, measured_needs
from halve.learning.training.state import open_training
from models import decoder, save


def made(**changes):
    given = {"memory": {"a": 300, "b": 0}, "disk": {"c": 10}, "held": 100, "device": torch.device("cpu")}
    return Needs(**{**given, **changes})


def test_what_is_held_already_is_not_needed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda _device: 200)
    with open_training(tmp_path / "out") as files:
        made().check(files)
        with pytest.raises(InputError, match=r"needs 0\.0 MB of memory on cpu \(a 0\.0 MB\) and .* forward_tokens"):
            made(held=99).check(files)
        with pytest.raises(InputError, match="the states of the training and its checkpoint"):
            made(disk={"c": 2**60}).check(files)


def test_a_stopped_trainings_files_count_for_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "check_space", lambda _out, size, _what: seen.append(size))
    with open_training(tmp_path / "out") as files:
        (files.home / "checkpoint-1").write_bytes(b"x" * 6)
        made(disk={"c": 10_000}).check(files)
    assert 0 < 10_000 - seen[0] - 6 < 20  # and the lock


def test_what_cannot_be_loaded_is_known_from_headers(tmp_path):
    source = resolve(save(decoder("llama").bfloat16(), tmp_path / "model"))
    model = decoder("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    found = least_needs(source, source, torch.bfloat16, torch.device("cpu"), whole_blocks=True)
    expected = {"the student": 4 * count, "the teacher": 2 * count, "gradients": 4 * blocks, "moments": 8 * blocks}
    assert found.memory == expected
    fewer = least_needs(source, None, torch.bfloat16, torch.device("cpu"), whole_blocks=False)
    assert fewer.memory == {"the student": 4 * count, "the teacher": 0}


def test_activations_are_what_autograd_keeps_without_the_weights():
    weight = torch.ones(8, 8, requires_grad=True)
    given = torch.ones(4, 8)
    assert activation_bytes(lambda: (given @ weight).sum(0).sum()) == given.nbytes
    hidden = (given @ weight).nbytes
    assert activation_bytes(lambda: (given @ weight).exp().sum()) == given.nbytes + hidden


def test_the_sum_of_a_models_parts():
    model = decoder("llama")
    trained = [model.model.layers[0].mlp.up_proj.weight]
    shape = Shape(steps=1, rows=3, passes=1, processes=1)
    found = measured_needs(model, None, trained, 50, 1000, 100, shape, 7, torch.device("cpu"))
    count = trained[0].numel()
    assert found.memory["activations"] == 300
    assert (found.memory["gradients"], found.memory["moments"]) == (4 * count, 8 * count)
    assert found.memory["the teacher"] == 0
    assert found.held == found.memory["the student"]
    assert found.memory["the method"] == 50
    assert found.memory["logits"] == 4 * 4 * 3000
    assert (found.disk["states"], found.disk["the checkpoint"]) == (24 * count + 100, 7)


def test_sizes_have_sensible_units():
    assert [in_bytes(size) for size in (0, 123_456, 999_999_999, 10**9, 14_200_000_000)] == [
        "0.0 MB",
        "0.1 MB",
        "1000.0 MB",
        "1.00 GB",
        "14.20 GB",
    ]
