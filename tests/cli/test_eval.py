import gc
import json
import sys
import weakref

import pytest
from typer.testing import CliRunner

from halve.checkpoint.load import load_model
from halve.cli.app import app
from halve.cli.errors import EXIT_FAILED, EXIT_REFUSED
from local_tasks import write_group, write_task
from models import FORWARD_DTYPE, decoder
from tiny_tokenizers import byte_bpe

run = CliRunner().invoke
WINDOWS = ["--seq-len", "32", "--max-windows", "3"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def other(tmp_path):
    """Another model like ``model``."""
    decoder("llama", seed=1, vocab_size=320).save_pretrained(tmp_path / "other")
    byte_bpe().save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def asked(tmp_path):
    """The options that ask for a group of two local tasks."""
    directory = write_task(tmp_path / "tasks", "first")
    write_task(directory, "second", num_fewshot=1, fewshot_split="test")
    write_group(directory, "both", ["first", "second"])
    return ["--tasks", "both", "--tasks-path", str(directory)]


@pytest.fixture
def never_loaded(monkeypatch):
    monkeypatch.setattr("halve.checkpoint.load.load_model", None)


def test_perplexity_of_one_model(model, text):
    result = run(app, ["eval", model, "--data", text, *WINDOWS])
    assert result.exit_code == 0, result.output
    for word in ("32", "3", "perplexity", "dtype"):
        assert word in result.output
    (entry,) = json.loads(run(app, ["eval", model, "--data", text, *WINDOWS, "--json"]).stdout)
    assert (entry["model"], entry["source"], entry["seq_len"], entry["windows"]) == (model, text, 32, 3)
    keys = "model value windows seq_len dtype source tokens_sha256 seconds nll note bos window_nll versions"
    assert list(entry) == keys.split()


def test_two_models_side_by_side(model, other, text, asked, monkeypatch):
    monkeypatch.setattr("halve.cli.terminal.out.width", 300)
    arguments = ["eval", model, other, "--data", text, *WINDOWS, *asked, "--limit", "9"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == "reading the tasks …\n"
    entries = json.loads(run(app, [*arguments, "--json"]).stdout)
    assert [(entry["model"], "tasks" in entry) for entry in entries] == [
        (model, False),
        (model, True),
        (other, False),
        (other, True),
    ]
    assert (entries[1]["limit"], entries[1]["dtype"], entries[1]["notes"]) == (9, FORWARD_DTYPE, [])
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    rows = [cells for cells in lines if cells]
    for entry, cells in zip((entries[0], entries[2]), rows[:2], strict=True):
        assert cells[:3] == [entry["model"], text, f"{entry['value']:.3f}"]
        apart = entry.get("log_difference"), entry.get("log_difference_stderr")
        assert cells[3] == ("" if entry is entries[0] else f"{apart[0]:+.4f} ± {apart[1]:.4f}")
        assert cells[4:7] == ["32", "3", "none"]
    assert "logarithm - dense's" in result.stdout
    assert f"torch {entries[0]['versions']['torch']}" in result.stdout
    for first, second, cells in zip(entries[1]["tasks"], entries[3]["tasks"], rows[2:], strict=True):
        assert cells[1:4] == [
            f"{first['metric']} ↑",
            str(first["num_fewshot"] or "0" * (not first["is_group"])),
            "9" if not first["is_group"] else "18",
        ]
        shown = [f"{score['value']:.4f} ± {score['stderr']:.4f}" for score in (first, second)]
        difference, _, stderr = cells[6].partition(" ± ")
        assert [*cells[4:6], difference] == [*shown, f"{second['value'] - first['value']:+.4f}"]
        assert bool(stderr) is not first["is_group"]
    assert [cells[0] for cells in rows[2:]] == ["both (group)", "first", "first", "second", "second"]
    assert any(not cells[6].startswith("+0.0000") for cells in rows[2:])
    assert " other - dense " in result.stdout
    assert f"± standard error; at most 9 examples of a task; {FORWARD_DTYPE}; lm-eval" in result.stdout


def test_every_window_begins_with_bos_where_the_tokenizer_says_so(model, other, text):
    byte_bpe(adds_bos=True).save_pretrained(other)

    def entries(*more):
        result = run(app, ["eval", model, other, "--data", text, *WINDOWS, "--json", *more])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plain, begun = entries()
    assert (plain["bos"], begun["bos"]) == ("none", "each")
    assert "log_difference" not in begun  # of other tokens
    assert "empty where the tokens differ" in run(app, ["eval", model, other, "--data", text, *WINDOWS]).stdout
    both = entries("--bos", "always")
    assert [entry["bos"] for entry in both] == ["each", "each"]
    assert both[1] | {"seconds": 0} == begun | {
        "seconds": 0,
        "log_difference": both[1]["log_difference"],
        "log_difference_stderr": both[1]["log_difference_stderr"],
    }
    byte_bpe(bos=None).save_pretrained(other)
    result = run(app, ["eval", other, "--data", text, *WINDOWS, "--bos", "always"])
    assert result.exit_code == EXIT_REFUSED
    assert result.stderr.startswith("error: bos = 'always', but the tokenizer has no BOS token: ")


def test_one_model_in_memory_at_a_time(model, other, asked, monkeypatch):
    alive = []

    def load(source):
        assert [reference() for reference in alive] == [None] * len(alive)
        loaded = load_model(source)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr("halve.cli.eval.load_model", load)
    gc.disable()  # a model must not wait for the next collection
    try:
        result = run(app, ["eval", model, other, model, *asked, "--limit", "1"])
    finally:
        gc.enable()
    assert result.exit_code == 0, result.output
    assert len(alive) == 3


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_is_finished_is_printed(model, other, text, monkeypatch, flags):
    def load(source):
        if source.name == other:
            raise KeyboardInterrupt
        return load_model(source)

    monkeypatch.setattr("halve.cli.eval.load_model", load)
    result = run(app, ["eval", model, other, "--data", text, *WINDOWS, *flags])
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    if flags:
        assert [entry["model"] for entry in json.loads(result.stdout)] == [model]
    else:
        assert "perplexity" in result.stdout


def test_a_failing_task_is_an_error(model, asked, monkeypatch):
    def fail(*_args, **_more):
        raise RuntimeError("no [luck]")

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    result = run(app, ["eval", model, *asked, "--json"])
    assert result.exit_code == EXIT_FAILED
    assert result.stderr.endswith("error: task 'both' failed: RuntimeError: no [luck]\n")
    assert result.stdout == ""


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: give --data for perplexity, --tasks for accuracy, or both"),
        (["--data", "TEXT"], "--data needs --seq-len: perplexities depend on it, so there is no default"),
        (["--seq-len", "8"], "nothing to measure"),
        (["--tasks", "first", "--seq-len", "8"], "--seq-len is for --data, which is not given"),
        (["--tasks", "first", "--bos", "never"], "--bos is for --data, which is not given"),
        (["--data", "TEXT", "--seq-len", "8", "--bos", "first"], "bos = 'first' is not known: choose one of auto"),
        (["--data", "TEXT", "--seq-len", "8", "--limit", "3"], "--limit is for --tasks, which is not given"),
        (["--data", "TEXT", "--seq-len", "8", "--num-fewshot", "0"], "--num-fewshot is for --tasks"),
        (["--data", "TEXT", "--seq-len", "8", "--tasks-path", "."], "--tasks-path is for --tasks"),
        (["--data", "TEXT", "--seq-len", "1"], "seq_len = 1 leaves no token to predict"),
        (["--data", "no/such.txt", "--seq-len", "8"], "no/such.txt"),
        (["--tasks", "first,", "--tasks-path", "DIR"], "tasks ['first', ''] are not usable"),
        (["--tasks", "first", "--tasks-path", "no/where"], "tasks_path no/where is not a directory"),
        (
            ["--tasks", "first", "--tasks-path", "DIR", "--limit", "0"],
            "limit must be a whole number of at least 1",
        ),
        (
            ["--tasks", "first", "--tasks-path", "DIR", "--batch-size", "0"],
            "batch_size must be a whole number",
        ),
        (["--tasks", "first", "--tasks-path", "DIR", "--device", "tpu"], "device 'tpu' is not understood"),
        (["--tasks", "first", "--tasks-path", "DIR", "--forward-dtype", "half"], "forward dtype 'half'"),
        (["no/model", "--tasks", "first", "--tasks-path", "DIR"], "no/model"),
        (["LLAMA", "--tasks", "first", "--tasks-path", "DIR"], "has no tokenizer, and text needs one"),
    ],
)
def test_refused_before_any_model_is_loaded(model, llama, text, asked, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"TEXT": text, "DIR": asked[3], "LLAMA": str(llama)}
    result = run(app, ["eval", model, *(names.get(argument, argument) for argument in arguments)])
    assert result.exit_code == EXIT_REFUSED
    sentence = result.stderr.removeprefix("reading the tasks …\n")
    assert sentence.startswith("error: ")
    assert message in sentence
    assert sentence.count("\n") == 1


@pytest.mark.usefixtures("never_loaded")
def test_lm_eval_is_an_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run(app, ["eval", model, "--tasks", "arc_easy"])
    assert result.exit_code == EXIT_REFUSED
    assert result.stderr.endswith("error: tasks need lm-eval: pip install 'halve[tasks]'\n")


def test_help_warns_of_code_in_definitions():
    assert "can run Python code" in " ".join(run(app, ["eval", "--help"]).output.replace("│", " ").split())
