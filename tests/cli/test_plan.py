import json
import re
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import halve.cli.plan
from dense_engines import Steady
from halve.cli.app import app
from halve.cli.errors import EXIT_REFUSED
from halve.planner import speed_plan as planner
from halve.planner.rest import Rest
from halve.runtime import speed
from halve.runtime.speed import Speed
from models import decoder, edit_json, save

run = CliRunner().invoke


@pytest.fixture
def quick(monkeypatch):
    """Numbers in place of measurements; what was asked is kept."""
    asked = []

    def measure(d_out, d_in, batches, **given):
        asked.append((d_out, d_in, list(batches), given, torch.get_num_threads()))
        return [
            Speed(
                d_out=d_out,
                d_in=d_in,
                batch=batch,
                dense_seconds=0.003,
                sparse_seconds=0.002 if d_out > 16 else 0.004,
                dense_call_seconds=0.003,
                sparse_call_seconds=0.002,
            )
            for batch in batches
        ]

    def measure_rest(_skeleton, batches, **_):
        return {
            batch: Rest(
                batch=batch,
                sequences=batch,
                length=1,
                measured_blocks=3,
                blocks=3,
                outside_seconds=0.005,
                block_seconds=0.001,
                linear_seconds=0.02,
            )
            for batch in batches
        }

    monkeypatch.setattr(planner.speed, "measure", measure)
    monkeypatch.setattr(planner.rest, "measure_rest", measure_rest)
    return asked


def test_tables_and_one_sentence(llama, quick):
    (llama / "model.safetensors").unlink()
    result = run(app, ["plan", str(llama), "--batch", "1, 8", "--pattern", "2:4"])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["self_attn.q_proj", "3", "32 x 32", "1.50", "1.50", "0.0", "0.0", "0.0"] in rows
    assert ["self_attn.k_proj", "3", "16 x 32", "0.75", "0.75", "0.0", "0.0", "0.0"] in rows
    assert ["the rest, ms", "8.00", "8.00"] in rows
    assert ["matrices dense, ms", "63.00", "63.00"] in rows
    assert ["matrices sparse, ms", "54.00", "54.00"] in rows
    assert ["each the faster, ms", "48.00", "48.00"] in rows
    assert ["times as fast, all sparse", "1.15", "1.15"] in rows
    assert ["times as fast, each the faster", "1.27", "1.27"] in rows
    assert "dense: 1 x lm_head.weight (64 x 32): outside the blocks" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == (
        "At batch 1, 2:4 makes this model 1.15 times as fast end to end, at batch 8 1.15 times; with only the faster "
        "matrices sparse 1.27 times at batch 1, 1.27 times at batch 8."
    )
    assert "measuring 32 x 32 (1/" in result.stderr
    assert {tuple(row[2]) for row in quick} == {(1, 8)}


def test_json_is_the_plan_and_nothing_else(llama, quick):
    result = run(app, ["plan", str(llama), "--json", "--dtype", "bfloat16", "--batch", "4"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["model"], record["dtype"], record["batches"]) == (str(llama), "bfloat16", [4])
    assert record["conclusion"].startswith("At batch 4")
    assert {row[3]["dtype"] for row in quick} == {torch.bfloat16}


def test_threads_are_for_the_measurement_alone(llama, quick):
    before = torch.get_num_threads()
    result = run(app, ["plan", str(llama), "--threads", str(before + 1), "--json"])
    assert result.exit_code == 0, result.output
    assert {row[4] for row in quick} == {before + 1}
    assert torch.get_num_threads() == before


def test_what_has_no_end_to_end_says_why(quick):
    result = run(app, ["plan", "paper", "--batch", "4"])
    assert result.exit_code == 0, result.output
    assert "forward pass" not in result.stdout
    assert "Not measured end to end at batch 4 (paper is the matrices of more than one model)" in result.stdout
    assert len(quick) == 8


@pytest.mark.parametrize("failing", [None, "x2"])
def test_a_dense_engine_has_a_table_and_its_sentences(llama, quick, monkeypatch, failing):
    monkeypatch.setattr(planner.packed_decoding, "packed_seconds", lambda *_: 0.5)
    monkeypatch.setattr(halve.cli.plan, "_engine", lambda name: Steady(failing) if name == "steady" else None)
    result = run(app, ["plan", str(llama), "--batch", "1", "--against", "steady", "--threads", "2"])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["Halve 2:4 in float32", "3 of 3", "500.00", "2.0", ""] in rows
    assert ["steady x1", "3 of 3", "1750.00", "0.6", "3.50"] in rows
    assert (["steady x2", "3 of 3", "875.00", "1.1", "1.75"] in rows) == (failing is None)
    assert (["steady x2", "3 of 3", "", "", ""] in rows) == (failing is not None)
    assert ("steady x2 was not measured (it fell over)" in result.stdout) == (failing is not None)
    assert "3.50 times what steady x1 makes dense (0.6)" in result.stdout
    assert len(quick) == 4


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_and_a_busy_machine_are_named(llama, monkeypatch):
    monkeypatch.setattr(planner, "free_memory", lambda _device: 1)
    monkeypatch.setattr(planner.os, "getloadavg", lambda: (90.0, 0.0, 0.0))
    result = run(app, ["plan", str(llama), "--batch", "1"])
    assert "not measured: 32 x 32 at batch 1 needs" in result.stdout
    assert "no product was measured" in result.stdout
    assert "warning: the load is 90.00 on" in result.stderr
    assert "warning: the load is 90.00 on" in run(app, ["plan", str(llama), "--batch", "1", "--json"]).stderr
    monkeypatch.setattr(planner.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "warning" not in run(app, ["plan", str(llama), "--batch", "1"]).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch '0' is not understood: write whole numbers of at least 1"),
        (["--batch", "1,x"], "--batch '1,x' is not understood"),
        (["--batch", ""], "--batch '' is not understood"),
        (["--batch", "1,,8"], "--batch '1,,8' is not understood"),
        (["--batch", "-1"], "--batch '-1' is not understood"),
        (["--batch", "²"], "--batch '²' is not understood"),
        (["--dtype", "float64"], "dtype 'float64' is not known: choose one of float32, bfloat16, float16"),
        (["--pattern", "5:4"], "pattern '5:4' is not understood"),
        (["--device", "tpu"], "device 'tpu' is not understood"),
        (["--device", "cuda:99"], "device 'cuda:99' is not present"),
        (["--against", "llama"], "unknown engine for --against 'llama': did you mean 'llama.cpp'?"),
        (["--threads", "0"], "threads must be a whole number of at least 1, got 0"),
    ],
)
def test_malformed_arguments_are_one_sentence_and_exit_code_2(llama, quick, arguments, message):
    edit_json(llama / "config.json", architectures=["Unknown"])  # would be refused too, had it been looked at
    result = run(app, ["plan", str(llama), *arguments])
    assert result.exit_code == EXIT_REFUSED, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert quick == []


def test_beside_llama_cpp_one_sequence_is_decoded(llama, quick):
    result = run(app, ["plan", str(llama), "--against", "llama.cpp", "--batch", "8"])
    assert result.exit_code == EXIT_REFUSED, result.output
    assert "error: beside llama.cpp one sequence is decoded: let the batches have 1 among them" in result.stderr
    assert quick == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/place", "no/such/place does not exist"),
        ("llama-8b.gguf", "llama-8b.gguf does not exist"),
        ("llama 9b", "presets are llama-8b, llama-70b, paper"),
    ],
)
def test_unknown_models_are_refused(quick, model, message):
    result = run(app, ["plan", model])
    assert result.exit_code == EXIT_REFUSED, result.output
    assert message in result.stderr
    assert quick == []


def test_a_real_run(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)
    path = save(decoder("llama").to(torch.bfloat16), tmp_path / "in")
    result = run(app, ["plan", str(path), "--batch", "1", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["dtype"] == "bfloat16"
    assert record["end_to_end"][0]["speedup"] > 0


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the package xllamacpp")
def test_a_real_run_beside_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)
    sizes = {"vocab_size": 320, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = save(decoder("llama", **sizes).to(torch.bfloat16), tmp_path / "in")
    asked = ["--batch", "1", "--values", "int4", "--against", "llama.cpp", "--threads", "1", "--json"]
    result = run(app, ["plan", str(path), *asked])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["against"]
    assert [row["contender"] for row in rows] == [
        "Halve 2:4 in int4, head in int8",
        "llama.cpp bf16",
        "llama.cpp Q8_0",
        "llama.cpp Q4_0",
    ]
    assert all(row["packed_speedup"] > 0 and row["blocks_run"] == [3] and not row["reason"] for row in rows)
