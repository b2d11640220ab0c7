"""Runs that are foreseen, and what they then turn out to take."""

import json

import psutil
import pytest
import torch
from typer.testing import CliRunner

import halve
from halve.checkpoint.load import resolve
from halve.checkpoint.shards import read_shard
from halve.checkpoint.streamed import load_streamed
from halve.cli.app import app
from halve.cli.errors import EXIT_REFUSED
from halve.cli.terminal import forecast_table, said_time
from halve.errors import InputError
from halve.forecast.foreseen import foresee
from halve.forecast.operations import Counts
from halve.forecast.rates import Rates, measured_rates
from halve.run.request import Request
from models import decoder, gemma4, resnet, save, tokens, vit
from seen import draw, processor, save_vit

run = CliRunner().invoke
HOW = ("estimate", "keep")
"""What may become of batch norms."""
H100 = Rates(400e12, 40e12, 10e12, 2.5e12, 2e9, 1e9)
TEXT = [{"input_ids": tokens(4, 16)}]


def asked(**options):
    return Request.of({"calibration": "c4", "samples": 8, "seq_len": 64, "device": "cpu", **options})


def test_a_model_of_which_there_is_only_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("halve.forecast.foreseen.would_fill", lambda size: size > 1e11)  # whatever else is running
    found = foresee("llama-70b", tmp_path / "out", asked(samples=128, seq_len=2048), rates=H100)
    assert found.shapes.size == pytest.approx(141e9, rel=0.01)
    assert len(found.shapes.blocks) == 80
    assert found.needs.memory["hidden states"] == 2 * 128 * 2048 * 8192 * 2  # of the dense model too
    assert set(found.seconds) == {"load", "collect", "reorder", "solve", "replay", "commit", "write", "verify"}
    with pytest.raises(InputError, match="the run needs about"):
        foresee("llama-70b", tmp_path / "out", asked(stream="never"), measured=False).check()


def test_time_follows_the_tokens_and_the_method(tmp_path):
    def seconds(**options):
        return foresee("llama-8b", tmp_path / "out", asked(**options), rates=H100).seconds

    few, many = seconds(samples=800, effort="fast"), seconds(samples=1600, effort="fast")
    assert many["collect"] > 1.8 * few["collect"]
    assert many["solve"] == few["solve"]
    assert seconds(effort="best", reconstruct="none")["solve"] > 3 * few["solve"]
    assert "reconstruct" in seconds(effort="best")
    assert seconds(effort="fast", time_limit=10_000)["solve"] == 10_000
    assert seconds(effort="fast", time_limit=1e-3)["solve"] == few["solve"]  # what is begun is finished
    wanda = seconds(method="wanda", refit="none")
    assert wanda["solve"] < 0.1 * few["solve"]
    unaware = {"method": "magnitude", "refit": "none"}
    assert set(seconds(**unaware, calibration="self")) == {"load", "solve", "commit", "write", "verify"}


@pytest.mark.parametrize("calibration", [None, tokens(4, 16)])
def test_a_run_that_needs_no_calibration_is_foreseen_with_what_it_is_given(calibration):
    options = {"method": "magnitude", "refit": "none", "device": "cpu"}
    options |= {} if calibration is None else {"calibration": calibration}
    found = foresee(decoder("llama"), None, Request.of(options), rates=H100)
    done = halve.prune(decoder("llama"), **options)
    collected = done.report.seconds.get("collect", 0.0) > 0.0
    assert collected == ("collect" in found.seconds) == (found.plan.tokens == 64) == (calibration is not None)
    assert bool(found.plan.statistics) == collected


def test_pictures_are_counted_by_the_positions_that_they_become(tmp_path):
    place = save_vit(tmp_path / "vit", image_size=32)
    processor(32).save_pretrained(place)
    folder = draw(tmp_path / "pictures")
    found = foresee(place, None, Request.of({"calibration": folder, "samples": 12, "device": "cpu"}), rates=H100)
    assert found.plan.tokens == 12 * 8 * 8  # patches of 4 x 4 pixels
    assert found.plan.batch == 12 * 64
    assert any("a picture counts as 64 positions" in note for note in found.notes)
    batches = [{"pixel_values": torch.zeros(2, 3, 32, 32)}, {"pixel_values": torch.zeros(1, 3, 16, 16)}]
    for given, positions in ((torch.zeros(5, 3, 16, 16), 5 * 16), (batches, 3 * 64)):
        found = foresee(place, None, Request.of({"calibration": given, "device": "cpu"}), measured=False)
        assert found.plan.tokens == positions


def test_what_is_not_counted_is_said(tmp_path):
    found = foresee("llama-8b", tmp_path / "out", asked(method="gblm"), rates=H100)
    assert found.notes == ("what gblm with refit cg takes is not counted",)
    written = foresee("llama-8b", tmp_path / "out", asked(calibration="self"), rates=H100)
    shared = foresee("llama-8b", tmp_path / "out", asked(workers=2), rates=H100)
    assert shared.notes == ("this is what one process takes: workers share the time, and each takes memory of its own",)
    assert written.notes == ("the time that the model takes to write its own calibration text is not in it",)


def test_a_checkpoint_is_foreseen_from_its_settings(tmp_path):
    source = save(decoder("llama"), tmp_path / "model")
    found = foresee(source, tmp_path / "out", asked())
    assert found.shapes.size == sum(parameter.nbytes for parameter in decoder("llama").parameters())
    assert found.rates is not None
    assert all(value > 0 for value in vars(found.rates).values())
    assert not list(tmp_path.glob(".halve-*"))  # what the disk was measured with


def test_what_is_wrong_with_a_run_is_told_by_the_run_itself(model, text, tmp_path):
    options = ["--calibration", text, "--samples", "4", "--seq-len", "16", "--method", "wanda"]
    nothing = run(app, ["prune", model, "--out", str(tmp_path / "out"), *options, "--skip", "*"])
    assert nothing.exit_code == EXIT_REFUSED
    assert "error: " in nothing.stderr
    assert "Traceback" not in nothing.output
    assert foresee(model, tmp_path / "out", asked(calibration=[]), measured=False).plan.tokens == 0


def test_weights_that_would_not_fit_beside_the_rest_stay_on_disk(tmp_path, monkeypatch):
    source = save(decoder("llama"), tmp_path / "model")
    found = foresee(source, tmp_path / "out", asked(method="wanda", refit="none"), measured=False)
    assert not found.plan.streamed
    needed = sum(found.needs.memory.values())
    monkeypatch.setattr("halve.forecast.foreseen.free_memory", lambda _device: needed - found.used - 1000)
    assert foresee(source, tmp_path / "out", asked(method="wanda", refit="none"), measured=False).plan.streamed
    never = foresee(source, tmp_path / "out", asked(method="wanda", refit="none", stream="never"), measured=False)
    assert not never.plan.streamed


def test_weights_that_loading_computes_take_room_on_disk(tmp_path):
    source = save(decoder("mixtral"), tmp_path / "model")  # its experts are stacked
    found = foresee(source, tmp_path / "out", asked(method="wanda", refit="none", stream="always"), measured=False)
    load_streamed(resolve(source), tmp_path / "beside", dtype=torch.float32)
    (entries,) = (read_shard(path).tensors for path in (tmp_path / "beside").iterdir())
    assert found.needs.disk["weights that loading computes"] == sum(each.end - each.start for each in entries) > 0
    plain = foresee(
        save(decoder("llama"), tmp_path / "plain"), tmp_path / "out", asked(stream="always"), measured=False
    )
    assert "weights that loading computes" not in plain.needs.disk


def test_sums_by_shards_are_there_twice(tmp_path):
    def statistics(**options):
        options = {"method": "wanda", "refit": "none", "samples": 1000, **options}
        return foresee("llama-8b", tmp_path / "out", asked(**options), measured=False).needs.memory["statistics"]

    assert statistics() == statistics(shards=3) == 2 * statistics(shards=1)


def test_where_nothing_can_be_written_that_is_said(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(30, "read-only")

    monkeypatch.setattr("halve.forecast.rates.write_file", full)
    found = foresee(save(decoder("llama"), tmp_path / "model"), tmp_path / "out", asked())
    assert "write" not in found.seconds
    assert "nothing can be written beside" in found.notes[-1]


def test_rates_turn_counts_into_seconds(tmp_path):
    assert H100.seconds(Counts(forward=400e12, float32=40e12, factorisation=20e12, bytes=0)) == pytest.approx(4.0)
    rates = measured_rates(torch.device("cpu"), torch.float32, 64, [64], [], tmp_path / "not" / "there", lasting=0.0)
    assert rates.forward > 0
    assert rates.reading == rates.writing


def test_a_run_says_what_it_takes_and_a_dry_one_says_no_more(model, text, tmp_path):
    options = ["--calibration", text, "--samples", "4", "--seq-len", "16", "--method", "wanda", "--refit", "none"]
    dry = run(app, ["prune", model, *options, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "what the run takes" in dry.stdout
    assert "memory" in dry.stdout
    wet = run(app, ["prune", model, "--out", str(tmp_path / "out"), *options])
    assert wet.exit_code == 0, wet.output
    assert "what the run takes" in wet.stderr
    assert json.loads((tmp_path / "out" / "halve.json").read_text())["method"] == "wanda"
    missing = run(app, ["prune", model, *options])
    assert missing.exit_code == EXIT_REFUSED
    assert "--out is missing: name a directory for the pruned checkpoint" in missing.stderr


def test_what_cannot_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    source = save(decoder("llama"), tmp_path / "model")
    used = psutil.Process().memory_info().rss
    monkeypatch.setattr("halve.forecast.foreseen.free_memory", lambda _device: 1000 - used)
    monkeypatch.setattr("halve.pruning.available_memory", lambda: 1000)
    monkeypatch.setattr("halve.pruning.load_found", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="the run needs about"):
        halve.prune(source, tmp_path / "out", calibration=TEXT, method="wanda", stream="never")
    monkeypatch.undo()
    dry = run(app, ["prune", "llama-70b", "--dry-run", "--calibration", "c4", "--stream", "never"])
    assert dry.exit_code == EXIT_REFUSED
    assert "the run needs about" in dry.stderr


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(12.3, "12 s"), (180, "3 minutes"), (7500, "2 h 05 min"), (5399, "1 h 30 min")],
)
def test_times_are_said_in_the_units_that_tell_them(seconds, said):
    assert said_time(seconds) == said


def test_the_table_adds_up(tmp_path):
    found = foresee("llama-8b", tmp_path / "out", asked(), rates=H100)
    table = forecast_table(found)
    assert table.row_count > 8


def test_what_else_a_run_does_is_counted(tmp_path):
    def seconds(**options):
        return foresee("llama-8b", tmp_path / "out", asked(**options), rates=H100).seconds

    plain, both = seconds(permute="none"), seconds(keep_dense="10%")
    assert both.keys() - plain.keys() == {"damage", "reorder"}
    assert {name: both[name] for name in plain} == plain
    assert seconds(keep_dense="10%", keep_dense_tokens=256)["damage"] < 0.8 * both["damage"]
    assert seconds(keep_dense="1.5x")["damage"] > both["damage"]
    pictures = {"calibration": torch.randn(8, 1, 16, 16), "device": "cpu"}
    norms = [foresee(resnet(), None, Request.of({**pictures, "batch_norm": how}), rates=H100).seconds for how in HOW]
    assert ["norms" in each for each in norms] == [True, False]


@pytest.mark.parametrize(("make", "sentence"), [(gemma4, "counted through all of them"), (vit, "from each block on")])
def test_a_dry_run_says_where_passes_for_damages_begin(make, sentence):
    model = make()
    data = tokens(4, 16) if make is gemma4 else torch.randn(4, model.config.num_channels, 16, 16)
    asked_for = Request.of({"calibration": data, "device": "cpu", "keep_dense": "10%"})
    notes = foresee(model, None, asked_for, rates=H100).notes
    assert sum(sentence in note for note in notes) == 1
    assert "damage" in foresee(model, None, asked_for, rates=H100).seconds
