"""An image classifier from a folder of pictures, as a user prunes it; and the scripts that do so."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoImageProcessor
from transformers.utils import logging
from typer.testing import CliRunner

import digits
import halve
from halve.cli.app import app

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def verbosity_as_before():
    """The scripts ask transformers to be quiet, for all that comes after."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small ConvNeXt trained on scikit-learn's digits, and folders of these to train on and held out."""
    place = tmp_path_factory.mktemp("digits")
    train, test = digits.write_digits(place / "digits")
    digits.train_checkpoint("convnext", train, place / "convnext", seed=0, epochs=12)
    return place / "convnext", train, test


def halve_command(*arguments):
    """Run a command, and return what it prints to standard output."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert not result.exit_code, result.output
    return result.stdout


def test_the_digits_are_all_there(trained):
    _, train, test = trained
    counts = [len(list(folder.glob("*/*.png"))) for folder in (train, test)]
    assert counts == [digits.TRAINED_ON, 1797 - digits.TRAINED_ON]
    assert not {path.name for path in train.glob("*/*")} & {path.name for path in test.glob("*/*")}


def test_a_classifier_is_pruned_from_a_folder_of_pictures(trained, tmp_path):
    model, train, test = trained
    for method in ("magnitude", "auto"):
        options = [
            "--pattern",
            "1:4",
            "--method",
            method,
            "--calibration",
            train,
            "--samples",
            128,
            "--eval-images",
            test,
        ]
        printed = halve_command("prune", model, "--out", tmp_path / method, *options)
        assert re.search(r"top-1 test: [\d.]+ % → [\d.]+ %", printed)
    halve_command("check", tmp_path / "auto", "--against", model)
    several = [model, tmp_path / "magnitude", tmp_path / "auto"]
    dense, magnitude, auto = json.loads(halve_command("eval", *several, "--images", test, "--json"))
    assert dense["pictures"] == 597
    assert dense["top_one"] > 0.85
    assert auto["top_one"] > dense["top_one"] - 0.1
    assert magnitude["top_one"] < auto["top_one"]
    measured = json.loads((tmp_path / "auto" / "halve-measured.json").read_text())["top_one"][0]
    assert measured["after"] == round(auto["top_one"] * 597)
    table = halve_command("eval", model, tmp_path / "auto", "--images", test, "--max-images", 20)
    assert "gained" in table


def test_the_table_of_the_digits_is_printed(trained, monkeypatch, capsys, tmp_path):
    model, train, _ = trained
    (tmp_path / "digits").symlink_to(train.parent)
    (tmp_path / "convnext-0").symlink_to(model)
    small = ["--models", "convnext", "--seeds", "0", "--methods", "magnitude,wanda+block", "--samples", "16"]
    monkeypatch.setattr(sys, "argv", ["digits", str(tmp_path), *small])
    digits.main()
    header, _, row, mean = capsys.readouterr().out.splitlines()
    assert header == "| model | seed | dense | magnitude | wanda+block |"
    assert row.replace("| 0 |", "| mean |") == mean
    assert len(re.findall(r"\d\d\.\d\d", row)) == 3


@pytest.mark.parametrize(("name", "epochs", "margin"), [("vit", 16, 0.03), ("resnet", 2, 0.0)])
def test_every_model_of_the_digits_learns_and_is_pruned(name, epochs, margin, trained, tmp_path):
    _, train, test = trained
    digits.train_checkpoint(name, train, tmp_path / name, seed=0, epochs=epochs)
    processor = AutoImageProcessor.from_pretrained(tmp_path / name, backend="pil")
    dense = halve.top_one(tmp_path / name, test).value
    assert dense > 0.7  # by chance it would be 0.1
    found = {}
    for method in ("magnitude", "sparsegpt", "auto"):
        pruned = halve.prune(tmp_path / name, pattern="1:4", method=method, calibration=train, samples=64)
        found[method] = halve.top_one(pruned.model, test, image_processor=processor).value
    for method in ("sparsegpt", "auto"):  # the ViT loses so little that only its noise orders them
        assert found[method] > max(found["magnitude"] - margin, dense - 0.1)


def test_the_script_for_imagenet_runs(trained, monkeypatch, capsys, tmp_path):
    model, train, test = trained
    small = ["--methods", "wanda,auto+block", "--samples", "16", "--pictures", "50", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["imagenet", str(model), str(train), str(test), *small])
    runpy.run_path(str(EXAMPLES / "imagenet.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+): top-1 \d", printed, re.MULTILINE) == ["dense", "wanda", "auto+block"]
    assert halve.check(tmp_path / "wanda").ok
