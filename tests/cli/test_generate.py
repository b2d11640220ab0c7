import pytest
import torch
from typer.testing import CliRunner

from halve.checkpoint.load import LoadedModel, load_model
from halve.cli.app import app
from halve.cli.errors import EXIT_REFUSED
from halve.maths.pattern import Pattern
from halve.runtime import speed
from halve.runtime.speed import Speed
from halve.runtime.streaming import Streamed, stream
from models import bert, decoder
from packed_models import prune_layers
from tiny_tokenizers import byte_bpe

run = CliRunner().invoke
ASKED = ["--prompt", "Some words", "--max-new-tokens", "6"]


@pytest.fixture
def pruned(tmp_path):
    model = prune_layers(decoder("llama", vocab_size=320, eos_token_id=None))
    model.save_pretrained(tmp_path / "pruned")
    byte_bpe().save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """What measuring finds: twice as fast, whatever it is."""
    found = {"ratio": 2.0}
    monkeypatch.setattr(
        speed,
        "measure",
        lambda d_out, d_in, batches, **_: [
            Speed(
                d_out=d_out,
                d_in=d_in,
                batch=b,
                dense_seconds=found["ratio"],
                sparse_seconds=1.0,
                dense_call_seconds=found["ratio"],
                sparse_call_seconds=1.0,
            )
            for b in batches
        ],
    )
    return found


def text_of(directory):
    pieces = []
    loaded = load_model(directory)
    stream(LoadedModel(loaded.model, loaded.tokenizer, None), "Some words", pieces.append, max_new_tokens=6)
    return "".join(pieces)


def test_pruned_layers_run_sparse_and_the_text_is_the_same(pruned):
    expected = text_of(pruned)
    result = run(app, ["generate", str(pruned), *ASKED])
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n"
    assert "6 tokens at " in result.stderr
    assert "21 layers run sparse" in result.stderr
    assert speed.describe(torch.device("cpu")) in result.stderr
    dense = run(app, ["generate", str(pruned), *ASKED, "--dense"])
    assert dense.stdout == expected + "\n"
    assert "dense, as asked" in dense.stderr


def test_a_packed_checkpoint_is_generated_from_too(pruned, tmp_path, monkeypatch):
    expected = text_of(pruned)
    assert run(app, ["pack", str(pruned), "--out", str(tmp_path / "packed"), "--pattern", "2:4"]).exit_code == 0
    result = run(app, ["generate", str(tmp_path / "packed"), *ASKED])
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n"
    assert "21 packed layers" in result.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # auto is the CPU all the same
    assert run(app, ["generate", str(tmp_path / "packed"), *ASKED]).stdout == expected + "\n"
    for elsewhere in (["--dense"], ["--device", "cuda"]):
        result = run(app, ["generate", str(tmp_path / "packed"), *ASKED, *elsewhere])
        assert result.exit_code == EXIT_REFUSED
        assert "is packed, and runs sparse on the CPU" in " ".join(result.stderr.split())


def test_the_head_multiplies_in_integers_where_asked(pruned, tmp_path):
    assert run(app, ["pack", str(pruned), "--out", str(tmp_path / "packed"), "--pattern", "2:4"]).exit_code == 0
    for directory in (pruned, tmp_path / "packed"):
        result = run(app, ["generate", str(directory), *ASKED, "--head", "int8"])
        assert result.exit_code == 0, result.output
        assert ", the head in int8" in result.stderr
        assert ", the head in int8" not in run(app, ["generate", str(directory), *ASKED]).stderr


def test_a_next_token_in_one_call_is_said(tmp_path):
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = prune_layers(decoder("llama", vocab_size=320, eos_token_id=None, **wide))
    model.save_pretrained(tmp_path / "wide")
    byte_bpe().save_pretrained(tmp_path / "wide")
    assert (
        run(app, ["pack", str(tmp_path / "wide"), "--out", str(tmp_path / "packed"), "--pattern", "2:4"]).exit_code == 0
    )
    expected = text_of(tmp_path / "wide")
    for name in ("wide", "packed"):
        result = run(app, ["generate", str(tmp_path / name), *ASKED])
        assert result.stdout == expected + "\n"
        assert ", each next token in one call" in result.stderr


def test_why_a_next_token_is_not_in_one_call_is_said(tmp_path):
    model = prune_layers(decoder("gpt2", vocab_size=320, eos_token_id=None))
    model.save_pretrained(tmp_path / "plain")
    byte_bpe().save_pretrained(tmp_path / "plain")
    packing = ["pack", str(tmp_path / "plain"), "--out", str(tmp_path / "packed"), "--pattern", "2:4"]
    assert run(app, packing).exit_code == 0
    for name in ("plain", "packed"):
        said = " ".join(run(app, ["generate", str(tmp_path / name), *ASKED]).stderr.split())
        assert (
            "; each next token module by module, since GPT2LMHeadModel is not of a family that is known to be computed "
            "like Llama" in said
        )


def test_what_runs_dense_says_why(pruned, faster, tmp_path):
    faster["ratio"] = 0.8
    result = run(app, ["generate", str(pruned), *ASKED])
    assert result.exit_code == 0, result.output
    assert "dense: no layer is faster sparse at batch 1 here, the best 0.80 times as fast" in " ".join(
        result.stderr.split()
    )
    decoder("llama", vocab_size=320).save_pretrained(tmp_path / "dense")
    byte_bpe().save_pretrained(tmp_path / "dense")
    result = run(app, ["generate", str(tmp_path / "dense"), *ASKED])
    assert "dense: no linear layer of this LlamaForCausalLM can run sparse at 2:4" in " ".join(result.stderr.split())


def test_the_pattern_is_the_records(pruned):
    model = load_model(pruned).model
    for block in model.model.layers:
        weight = block.mlp.down_proj.weight
        weight.copy_(Pattern("1:4").project(weight))
    model.save_pretrained(pruned)
    (pruned / "halve.json").write_text('{"pattern": "1:4"}')
    assert "3 layers run sparse" in run(app, ["generate", str(pruned), *ASKED]).stderr


def test_threads_and_dtype(pruned, monkeypatch):
    threads, dtypes = [], set()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(
        "halve.runtime.streaming.stream",
        lambda loaded, *_args, **_options: dtypes.add(loaded.model.dtype) or Streamed(1, 1, 1.0, 0.0),
    )
    result = run(app, ["generate", str(pruned), *ASKED, "--threads", "3", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert threads == [3, torch.get_num_threads()]
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be a whole number of at least 1"),
        (["--threads", "0"], "threads must be a whole number of at least 1"),
        (["--dtype", "int8"], "dtype 'int8' is not known"),
        (["--device", "tpu"], "device 'tpu' is not understood"),
        (["--temperature", "-1"], "temperature is -1.0: give"),
        (["--head", "int4"], "--head is 'int4': give own or int8"),
        (["--head", "int8", "--dense"], "--dense rounds nothing: leave --head out"),
    ],
)
def test_bad_arguments_are_refused(pruned, arguments, says):
    result = run(app, ["generate", str(pruned), "--prompt", "Words", *arguments])
    assert result.exit_code == EXIT_REFUSED
    assert says in " ".join(result.stderr.split())
    assert not result.stdout


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (
            lambda directory: [path.unlink() for path in directory.glob("tokenizer*")],
            [],
            "this LlamaForCausalLM comes without a tokenizer",
        ),
        (lambda directory: None, ["--prompt", "Words " * 200], "it exceeds the model's 128: shorten it, or ask for"),
        (
            lambda directory: prune_layers(bert()).save_pretrained(directory),
            [],
            "BertForMaskedLM generates no text: give a causal language model",
        ),
        (
            lambda directory: (directory / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
            [],
            "chat template fails (no): leave it out with raw",
        ),
    ],
    ids=["no tokenizer", "too long", "no text", "chat template"],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_measured(pruned, monkeypatch, change, arguments, says):
    change(pruned)
    monkeypatch.setattr(speed, "measure", lambda *_args, **_options: pytest.fail("it was measured"))
    result = run(app, ["generate", str(pruned), *ASKED, *arguments])
    assert result.exit_code == EXIT_REFUSED
    assert says in " ".join(result.stderr.split())
