import gc
import json
import sys
import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from halve.checkpoint.load import load_model
from halve.cli.app import app
from halve.cli.errors import EXIT_FAILED, EXIT_REFUSED
from halve.evaluation.perplexity import perplexity
from halve.evaluation.task_groups import TASK_GROUPS, Member, TaskGroup
from halve.packed.load import load
from halve.packed.write import pack_checkpoint
from halve.text.tokens import evaluation_tokens
from local_tasks import write_group, write_task
from models import FORWARD_DTYPE, decoder
from packed_models import pruned
from tiny_tokenizers import byte_bpe, surrounding

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
    keys = "model value windows seq_len dtype source tokens_sha256 seconds nll note bos scored window_nll versions"
    assert list(entry) == keys.split()


def test_weights_may_stay_on_disk(model, text, asked):
    command = ["eval", model, "--data", text, *WINDOWS, "--json", "--stream"]
    one, other = (json.loads(run(app, [*command, stream]).stdout)[0] for stream in ("never", "always"))
    assert one["window_nll"] == other["window_nll"]
    refused = run(app, ["eval", model, *asked, "--stream", "always"])
    assert refused.exit_code == EXIT_REFUSED
    assert "runs the whole model for every batch" in refused.output.replace("\n", " ")


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
    for first, second, cells in zip(entries[1]["tasks"], entries[3]["tasks"], rows[2:7], strict=True):
        assert cells[1:4] == [
            f"{first['metric']} ↑",
            str(first["num_fewshot"] or "0" * (not first["is_group"])),
            "9" if not first["is_group"] else "18",
        ]
        shown = [f"{score['value']:.4f} ± {score['stderr']:.4f}" for score in (first, second)]
        difference, _, stderr = cells[6].partition(" ± ")
        assert [*cells[4:6], difference] == [*shown, f"{second['value'] - first['value']:+.4f}"]
        assert stderr
    scores, tests = rows[2:7], rows[7:]
    assert [cells[0] for cells in scores] == ["both (group)", "first", "first", "second", "second"]
    assert any(not cells[6].startswith("+0.0000") for cells in scores)
    assert " other - dense " in result.stdout
    caption = " ".join(result.stdout.split())
    versions = ", ".join(f"{package} {version}" for package, version in entries[1]["versions"].items())
    assert list(entries[1]["versions"]) == ["lm-eval", "transformers", "torch", "halve"]
    how = f"at most 9 examples of a task; {FORWARD_DTYPE}; at most 128 tokens; no BOS; {versions}"
    assert f"± standard error; {how}" in caption
    assert [cells[0] for cells in tests] == ["both (group)", "first", "first", "second", "second"]
    for one, cells in zip(entries[3]["differences"], tests, strict=True):
        counts = [str(one[name]) for name in ("tested", "lost", "gained")]
        assert cells[1:] == [one["metric"], *counts, f"{one['p_value']:.2g}"]
    assert entries[3]["against"] == model
    assert "differences" not in entries[1]
    whole, *parts = entries[3]["differences"]
    assert whole["without"] == {"first": parts[2]["value"], "second": parts[0]["value"]}
    low, high = sorted(whole["without"], key=whole["without"].get)
    ends = [f"{whole['without'][task]:+.4f} (without {task})" for task in (low, high)]
    difference = f"both acc, other - dense: {whole['value']:+.4f}"
    assert f"note: {difference}; one task left out, from {' to '.join(ends)}" in caption


def test_a_group_of_ours_says_what_it_fixes(model, asked, monkeypatch):
    group = TaskGroup("a paper", (Member("first", 0, "acc_norm"), Member("second", 1, "acc")))
    monkeypatch.setitem(TASK_GROUPS, "pair", group)
    arguments = ["eval", model, "--tasks", "pair", *asked[2:]]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    assert "note: pair fixes tasks, shots and metrics as a paper, and counts every task the same" in printed
    (entry,) = json.loads(run(app, [*arguments, "--json"]).stdout)
    members = [
        {"task": "first", "num_fewshot": 0, "metric": "acc_norm", "filter": ""},
        {"task": "second", "num_fewshot": 1, "metric": "acc", "filter": ""},
    ]
    assert entry["groups"] == {"pair": {"of": "a paper", "members": members}}
    assert [(score["task"], score["metric"], score["weights"]) for score in entry["tasks"]] == [
        ("pair", "mean", {"first": 0.5, "second": 0.5}),
        ("first", "acc_norm", {}),
        ("second", "acc", {}),
    ]
    assert all("of_examples" not in score for score in entry["tasks"])


def test_a_tokenizer_that_tasks_cannot_take_is_refused_before_perplexity_is_measured(model, text, asked, monkeypatch):
    surrounding(byte_bpe(), "$A </s>").save_pretrained(model)
    monkeypatch.setattr("halve.evaluation.request.Evaluation.measure", None)
    result = run(app, ["eval", model, "--data", text, *WINDOWS, *asked])
    assert result.exit_code == EXIT_REFUSED, result.output
    assert "error: the tokenizer ends every text with </s>" in result.stderr


def test_figures_carry_what_differs_between_models(model, tmp_path, asked):
    longer = decoder("llama", seed=1, vocab_size=320, max_position_embeddings=64)
    longer.save_pretrained(tmp_path / "other")
    byte_bpe(adds_bos=True).save_pretrained(tmp_path / "other")
    result = run(app, ["eval", model, str(tmp_path / "other"), *asked])
    assert result.exit_code == 0, result.output
    assert "at most 128 | 64 tokens; no BOS | BOS <s>; lm-eval" in " ".join(result.stdout.split())


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

    def load(source, **_more):
        assert [reference() for reference in alive] == [None] * len(alive)
        loaded = load_model(source)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr("halve.checkpoint.streamed.load_model", load)
    gc.disable()  # a model must not wait for the next collection
    try:
        result = run(app, ["eval", model, other, model, *asked, "--limit", "1"])
    finally:
        gc.enable()
    assert result.exit_code == 0, result.output
    assert len(alive) == 3


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_is_finished_is_printed(model, other, text, monkeypatch, flags):
    def load(source, **_more):
        if source.name == other:
            raise KeyboardInterrupt
        return load_model(source)

    monkeypatch.setattr("halve.checkpoint.streamed.load_model", load)
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
        ([], "nothing to measure: give --data for perplexity, --tasks or --images for accuracy"),
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


def test_a_packed_checkpoint_is_measured_by_the_products_that_it_decodes_by(text, tmp_path):
    directory = pack_checkpoint(pruned(tmp_path, dtype=torch.float32), tmp_path / "packed", values="int8").out
    asked = ["--data", text, "--seq-len", "16", "--max-windows", "30", "--json", "--forward-dtype", "float32"]
    result = run(app, ["eval", str(directory), *asked])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    loaded = load(directory)
    tokens = evaluation_tokens(text, loaded.tokenizer, seq_len=16, max_windows=30)
    rows = [row.unsqueeze(0) for row in tokens.ids]  # of 16 tokens, few enough to be multiplied as in decoding
    losses = [cross_entropy(loaded.model(input_ids=row).logits[0, :-1], row[0, 1:]) for row in rows]
    expected = float(torch.stack(losses).mean())
    assert found["nll"] == pytest.approx(expected, rel=1e-6)
    assert perplexity(loaded.model, tokens, forward_dtype="float32").nll != pytest.approx(
        expected, rel=1e-6
    )  # inputs not rounded


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--stream", "always"]])
def test_a_packed_checkpoint_is_measured_on_the_cpu_in_memory(flags, text, tmp_path):
    (tmp_path / "halve-packed.json").write_text("{}")
    result = run(app, ["eval", str(tmp_path), "--data", text, *WINDOWS, *flags])
    assert result.exit_code == EXIT_REFUSED
    assert "is packed, and measured on the CPU in memory" in result.stderr
