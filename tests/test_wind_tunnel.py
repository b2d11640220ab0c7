"""The wind tunnel at a hundredth of its size: what it trains, in which order, what it keeps and what it draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from safetensors.torch import load_file

import wind_tunnel
import wind_tunnel_cells as cells
import wind_tunnel_picture as picture
from halve.errors import HalveError
from halve.text.rows import Passage, rows_of
from models import decoder
from wind_tunnel import Asked, Plan
from wind_tunnel_cells import LINES, Cell

SCRIPT = Path(wind_tunnel.__file__)
BY_NAME = wind_tunnel.BY_NAME
NAMES = list(BY_NAME)
STEPS = {0.4: 25, 1.5: 95, 6.0: 381, 25.0: 1587}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `prepare` makes of a tiny Llama: 37 920 parameters, 4096 tokens of text."""
    place = tmp_path_factory.mktemp("tunnel")
    decoder("llama").save_pretrained(place / "tiny")
    asked = ["--tokens", "4096", "--seq-len", "32", "--samples", "8"]
    wind_tunnel.main(["prepare", str(place / "tiny"), str(place / "folder"), *asked])
    return place / "folder"


@pytest.fixture
def air(folder):
    return cells.Air(folder, "cpu", batch_tokens=128)


def test_what_is_prepared_has_text_of_the_model_and_solutions_of_the_pattern(folder, air):
    spared = load_file(folder / cells.SPARED)
    assert {name: tuple(ids.shape) for name, ids in spared.items()} == {
        "calibration": (8, 32),
        "held_out": (64, 32),
        "evaluation": (256, 32),
    }
    train = load_file(folder / cells.TRAIN)["ids"]
    assert (train.dtype, tuple(train.shape)) == (torch.int16, (128, 32))
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for ids in spared.values() for row in ids.tolist()}
    for start in ("magnitude", "wanda", "auto", "auto+block"):
        student = air.student(start)
        assert all(cells.PATTERN.satisfied_by(each.tensor) for each in cells.targets(student))
        assert len(cells.targets(student)) == 21
        assert air.ratio_before(start) > 1.0
    assert air.ratio_before(cells.DENSE) == 1.0


def test_text_is_lengthened_where_it_ended(folder, tmp_path, monkeypatch):
    import wind_tunnel_prepare

    monkeypatch.setattr(wind_tunnel_prepare, "PART", 50)
    dense = cells.Air(folder, "cpu", 128).dense
    for name, steps in (("at_once", (120,)), ("in_three", (30, 50, 120))):
        (tmp_path / name).mkdir()
        for sequences in steps:
            wind_tunnel_prepare.write_train(dense, tmp_path / name, (sequences, 8))
    found = [load_file(tmp_path / name / cells.TRAIN)["ids"] for name in ("at_once", "in_three")]
    assert len(found[0]) == 120
    assert torch.equal(*found)


def test_rows_are_those_of_passages_that_begin_with_bos():
    ids = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    expected = rows_of([Passage(row.int(), lead=1) for row in ids], 12, 0, apart=True)
    found = cells.rows_of_sequences(ids)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("ids", "positions", "labels"))


def test_a_seed_reads_every_sequence_once_before_it_reads_one_twice(air):
    found = [air.rows(steps, seed).rows.ids for steps, seed in ((32, 0), (32, 1), (40, 0))]
    once = [sorted(map(tuple, rows.tolist())) for rows in found]
    assert len(set(once[0])) == 128
    assert once[0] == once[1]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[2][:128], found[0])
    assert set(once[2]) == set(once[0])


def test_the_ratio_is_that_of_the_perplexities(air):
    student = air.student("wanda")
    ids = load_file(air.folder / cells.SPARED)["evaluation"].long()
    losses = []
    for model in (student, air.dense):
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for row in ids:  # one by one, in float64, from the logits themselves
                said = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
                total -= said[torch.arange(31), row[1:]].sum()
        losses.append(total / (len(ids) * 31))
    assert air.ratio(student) == pytest.approx(float((losses[0] - losses[1]).exp()), rel=1e-5)


@pytest.mark.parametrize("line", LINES, ids=NAMES)
def test_every_line_is_trained_to_two_of_four(line, air):
    cell = Cell(line.name, 0.03, 0, line.rates[0])
    entry = cells.train(cell, line, air)
    assert entry["two_of_four"]
    assert (entry["steps"], entry["tokens"]) == (air.steps(0.03), air.steps(0.03) * 128)
    assert 1.0 < entry["ratio"] < 3.0
    assert [tokens for tokens, _ in entry["curve"]][-1] == entry["tokens"]
    assert cells.Cell(**{name: entry[name] for name in ("line", "budget", "seed", "rate")}) == cell


def test_a_start_is_where_a_training_begins(air):
    """With next to no learning rate the end is the start, or what a mask makes of it."""
    for name in ("fixed from auto", "norms from auto+block", "ast from auto+block"):
        line = BY_NAME[name]
        entry = cells.train(Cell(name, 0.01, 0, 1e-9), line, air)
        assert entry["ratio"] == pytest.approx(entry["ratio_before"], rel=1e-4)
        assert entry["ratio_before"] == air.ratio(air.student(line.start))


def test_a_prior_leaves_the_matrices_dense(air):
    assert cells.takes_prior(BY_NAME["prox-admm from auto"])
    assert cells.takes_prior(BY_NAME["maskllm from auto"])
    assert not cells.takes_prior(BY_NAME["maskllm from dense"])
    assert not cells.takes_prior(BY_NAME["ast from auto+block"])
    student = air.student("auto+block", matrices=False)
    start = air.start("auto+block")
    changed = {
        name for name, value in student.named_parameters() if not torch.equal(value, air.dense.get_parameter(name))
    }
    assert changed == {name for name, value in start.items() if value.ndim == 1}
    assert changed


def results_of(cell, **facts):
    line = BY_NAME[cell.line]
    entry = {"line": cell.line, "start": line.start, "budget": cell.budget, "seed": cell.seed, "rate": cell.rate}
    return (
        entry
        | {
            "ratio": 3.0,
            "ratio_before": 9.0,
            "held_out_kl": 1.0,
            "two_of_four": True,
            "seconds_a_step": 0.1,
            "steps": 9,
        }
        | facts
    )


def all_of(plan, left=float("inf")):
    return list(iter(lambda: plan.next(left, STEPS), None))


def test_the_first_seed_of_all_lines_comes_before_the_second_of_any(tmp_path):
    asked = Asked(folder=tmp_path, results=tmp_path / "none", lines=LINES[:2], seeds=(0, 1))
    found = all_of(Plan(asked))
    assert [(cell.line, cell.budget, cell.seed) for cell in found] == [
        (name, budget, seed) for seed in (0, 1) for budget in (25.0, 6.0, 1.5, 0.4) for name in NAMES[:2]
    ]
    assert {cell.rate for cell in found} == {LINES[0].rates[0]}


def test_cells_that_are_there_are_not_trained_again(tmp_path):
    results = tmp_path / "results.jsonl"
    known = Cell(NAMES[0], 1.5, 0, LINES[0].rates[0])
    failed = {"line": NAMES[0], "budget": 6.0, "seed": 0, "rate": LINES[0].rates[0], "error": "no"}
    results.write_text(json.dumps(results_of(known)) + "\n" + json.dumps(failed) + "\n")
    found = all_of(Plan(Asked(folder=tmp_path, results=results, lines=LINES[:1], seeds=(0,))))
    assert [cell.budget for cell in found] == [25.0, 6.0, 0.4]


def test_no_cell_is_begun_that_would_end_too_late(tmp_path):
    asked = Asked(
        folder=tmp_path, results=tmp_path / "none", lines=LINES[:1], seeds=(0,), budgets=(6.0, 25.0, 1.5, 0.4)
    )
    plan = Plan(asked)
    first = plan.next(1e9, STEPS)
    plan.ended(first, results_of(first, seconds_a_step=0.5, steps=381))
    assert [cell.budget for cell in all_of(plan, left=wind_tunnel.BESIDES + 95 * 0.5)] == [1.5, 0.4]
    assert plan.missing == 1
    assert all_of(plan, left=wind_tunnel.BESIDES + 1587 * 0.5 - 1) == []
    # what is done once makes the steps of a short training look slow
    plan.ended(Cell(NAMES[0], 0.4, 0, 3e-3), results_of(first, seconds_a_step=2.0, steps=25))
    assert [cell.budget for cell in all_of(plan, left=wind_tunnel.BESIDES + 1587 * 0.5)] == [25.0]


def test_a_line_waits_for_its_learning_rate_and_takes_the_better_one(tmp_path):
    asked = Asked(folder=tmp_path, results=tmp_path / "none", lines=LINES[:2], seeds=(0,), rates=0.4)
    plan = Plan(asked)
    trials = all_of(plan)
    assert [(cell.line, cell.budget, cell.rate) for cell in trials] == [
        (line.name, 0.4, rate) for line in LINES[:2] for rate in line.rates
    ]
    for cell, loss in zip(trials[:2], (2.0, 1.0), strict=True):
        plan.ended(cell, results_of(cell, held_out_kl=loss))
    assert {(cell.line, cell.rate, cell.budget) for cell in all_of(plan)} == {
        (NAMES[0], LINES[0].rates[1], budget) for budget in (1.5, 6.0, 25.0)
    }
    plan.ended(trials[2], results_of(trials[2]))
    plan.ended(trials[3], {"error": "it diverged"})
    assert {(cell.line, cell.rate) for cell in all_of(plan)} == {(NAMES[1], LINES[1].rates[0])}


def test_learning_rates_are_compared_where_they_were_tried_longest():
    line = LINES[0]
    losses = {(1.5, 1): (1.0, 2.0), (1.5, 0): (2.0, 1.0), (0.4, 0): (1.0, 2.0)}
    found = [
        (cell, results_of(cell, held_out_kl=loss))
        for (budget, seed), pair in losses.items()
        for cell, loss in zip([Cell(line.name, budget, seed, rate) for rate in line.rates], pair, strict=True)
    ]
    alone = Cell(line.name, 25.0, 0, line.rates[0])
    assert cells.best_rate(line, [*found, (alone, results_of(alone, held_out_kl=0.1))]) == line.rates[1]
    assert cells.best_rate(line, found[:1]) == line.rates[0]


def test_the_script_trains_goes_on_and_draws(folder, tmp_path, capsys):
    """With processes of their own, as it is called."""
    results, drawing = tmp_path / "results.jsonl", tmp_path / "picture.svg"
    lines = "fixed from wanda,prox-admm from dense"
    call = ["run", str(folder), "--results", str(results), "--batch-tokens", "128", "--lines", lines, "--seeds", "0,1"]
    first = [sys.executable, str(SCRIPT), *call, "--budgets", "0.02", "--rates", "0.02", "--jobs", "2"]
    subprocess.run(first, check=True, env=os.environ)
    before = results.read_text()
    with pytest.raises(SystemExit) as end:
        wind_tunnel.main([*call, "--budgets", "0.02,0.05"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.count(" x dense, ") == 4
    assert "0 failed, 0 were not begun" in said
    assert results.read_text().startswith(before)
    found = cells.read_results(results)
    # two rates for the first seed, one of them for all else
    assert len(before.splitlines()) == 2 * 3
    assert len(found) == len(results.read_text().splitlines()) == 2 * 3 + 2 * 2
    before = mpl.rcParams["svg.hashsalt"]
    wind_tunnel.main(["draw", "--results", str(results), "--picture", str(drawing)])
    assert mpl.rcParams["svg.hashsalt"] == before
    table = capsys.readouterr().out
    svg = drawing.read_text()
    assert svg.count("<svg") == 1
    for name in lines.split(","):
        rate = cells.best_rate(BY_NAME[name], found.items())
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        for budget in (0.02, 0.05):
            own = [found[Cell(name, budget, seed, rate)]["ratio"] for seed in (0, 1)]
            assert f"{sum(own) / 2:.3f} ± {abs(own[0] - own[1]) / 2:.3f}" in row
        assert f"<!-- {name} -->" in svg


def test_a_cell_that_fails_is_on_record_and_the_others_go_on(folder, tmp_path, monkeypatch):
    def train(cell, line, _air):
        if line.method == "ast":
            raise HalveError("it diverged")
        if line.method == "cast":
            os._exit(3)
        return results_of(cell, seconds=0.0)

    monkeypatch.setattr(cells, "train", train)
    monkeypatch.setattr(wind_tunnel, "WORKERS", "fork")  # so that the processes have what was replaced
    results = tmp_path / "results.jsonl"
    lines = [BY_NAME[name] for name in ("ast from dense", "cast from dense", "fixed from auto")]
    asked = Asked(folder=folder, results=results, lines=lines, seeds=(0,), budgets=(0.1,))
    assert wind_tunnel.run(asked) == 2
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry.get("error") for entry in entries] == ["HalveError: it diverged", "its process ended with 3", None]
    assert list(cells.read_results(results)) == [Cell("fixed from auto", 0.1, 0, lines[2].rates[0])]


def test_a_run_of_failures_alone_ends(folder, tmp_path, monkeypatch):
    def train(_cell, _line, _air):
        raise HalveError("there is no device")

    monkeypatch.setattr(cells, "train", train)
    monkeypatch.setattr(wind_tunnel, "WORKERS", "fork")
    asked = Asked(folder=folder, results=tmp_path / "results.jsonl", seeds=(0,))
    assert wind_tunnel.run(asked) == wind_tunnel.HOPELESS < len(LINES)


def test_a_table_of_what_is_not_two_of_four_is_refused():
    cell = Cell(NAMES[0], 1.5, 0, LINES[0].rates[0])
    with pytest.raises(ValueError, match="did not end 2:4"):
        picture.markdown([results_of(cell, two_of_four=False)])
