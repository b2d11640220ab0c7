import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import halve
from halve import pruning
from halve.checkpoint import room
from halve.checkpoint.directory import is_unfinished
from halve.checkpoint.load import load_model
from halve.checkpoint.shards import reading
from halve.cli.app import app
from halve.errors import (
    AlreadyCompleteError,
    CorruptFileError,
    HalveError,
    InputError,
    LayerFailedError,
    ResumeMismatchError,
    UnreadableFileError,
    UnsupportedModelError,
)
from halve.model.reconstruct import Reconstruction
from halve.report import page as report_module
from halve.run.directory import RunDirectory
from halve.solve.objective import Objective
from halve.text import documents
from models import OF_ONE_RUN, decoder, tokens
from tiny_tokenizers import byte_bpe

FAST = {"method": "wanda", "refit": "none", "samples": 4, "seq_len": 16}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_is_pruned_written_and_loads_with_plain_transformers(tmp_path, text, family):
    dense, out = tmp_path / "dense", tmp_path / "out"
    decoder(family, vocab_size=320).to(torch.bfloat16).save_pretrained(dense)
    byte_bpe().save_pretrained(dense)
    pruned = halve.prune(dense, out, calibration=text, min_expert_tokens=1, **FAST | {"refit": "cg"})
    assert halve.check(out, against=dense).ok
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in pruned.model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    before, after = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    listed = {name for matrix in pruned.record["matrices"] for name in matrix["tensors"]}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == listed
    assert (out / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_the_record_says_what_was_done(checkpoint, text, tmp_path):
    pruned = halve.prune(checkpoint, tmp_path / "out", calibration=text, seed=3, **FAST | {"refit": "cg"})
    record = json.loads((tmp_path / "out" / "halve.json").read_text())
    assert record["pattern"] == "2:4"
    assert (record["method"], record["refit"]) == ("wanda", "cg")
    calibration = record["calibration"]
    assert (calibration["samples"], calibration["seq_len"], calibration["tokens"]) == (4, 16, 64)
    assert calibration["seed"] == 3
    assert len(calibration["sha256"]) == 64
    assert len(record["matrices"]) == 21
    for matrix, report in zip(record["matrices"], pruned.report.matrices, strict=True):
        assert matrix["status"] == "ok"
        assert matrix["facts"]["tokens"] == 64
        assert matrix["facts"]["relative_loss"] == report.facts["relative_loss"]
        assert matrix["facts"]["relative_loss"] <= matrix["facts"]["relative_loss_before_refit"]
    assert {entry["reason"] for entry in record["excluded"]} == {"outside the blocks", "embedding, outside the blocks"}
    assert record["environment"]["torch"] == torch.__version__
    assert "config.json" in record["files"]


def test_a_model_in_memory_is_pruned_in_place():
    model = decoder("llama")
    pruned = halve.prune(model, calibration=tokens(), method="sparsegpt")
    assert pruned.model is model
    assert pruned.out is None
    assert halve.Pattern("2:4").satisfied_by(model.model.layers[2].mlp.down_proj.weight)
    assert all(not module.training for module in model.modules())


def test_training_mode_is_put_back():
    model = decoder("llama").train()
    halve.prune(model, calibration=tokens(), method="wanda")
    assert model.training


def test_an_in_memory_model_can_be_written(tmp_path):
    model = decoder("llama_tied")
    halve.prune(model, tmp_path / "out", calibration=tokens(), **FAST)
    assert halve.check(tmp_path / "out").ok
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits, model(tokens()).logits)


def test_hidden_states_can_be_offloaded(checkpoint, text, tmp_path):
    folder = tmp_path / "spill"
    with pytest.raises(InputError, match=r"offload directory .* does not exist"):
        halve.prune(checkpoint, calibration=text, offload=folder, **FAST)
    folder.mkdir()
    spilled = halve.prune(checkpoint, calibration=text, offload=folder, **FAST)
    plain = halve.prune(checkpoint, calibration=text, **FAST)
    assert not list(folder.iterdir())
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, spilled.model.get_parameter(name))


def test_bad_input_is_refused_before_any_work_and_nothing_is_written(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    cases = [
        (checkpoint, {"out": full}, "not empty"),
        (checkpoint, {"out": checkpoint}, "lies in, the input"),
        (checkpoint, {"out": out, "pattern": "5:4"}, "not understood"),
        (checkpoint, {"out": out, "method": "wanda+"}, "unknown method"),
        (checkpoint, {"out": out, "dtype": torch.float16}, "keeps its own dtypes"),
        (checkpoint, {"out": out, "device": "gpu"}, "not understood"),
        (checkpoint, {"out": out, "forward_dtype": "float8"}, "float8"),
        (checkpoint, {"out": out, "seq_len": 129}, "max_position_embeddings = 128"),
        (checkpoint, {"out": out, "calibration": tmp_path / "nothing.txt"}, "does not exist"),
        (checkpoint, {"out": out, "calibration": torch.zeros(3)}, "give token ids of shape"),
        (checkpoint, {"out": out, "calibration": torch.full((2, 8), 400)}, "vocabulary has 320"),
        (checkpoint, {"out": out, "calibration": [torch.zeros(3)]}, "not a dictionary of tensors"),
        (tmp_path / "missing", {"out": out}, "does not exist"),
        (decoder("llama"), {}, "has no tokenizer"),
        (torch.nn.Linear(4, 4), {"out": out, "calibration": tokens()}, "not a transformers model"),
    ]
    for model, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            halve.prune(model, **{"calibration": text if model is checkpoint else None, **FAST, **arguments})
        assert not out.exists()
    assert [path.name for path in full.iterdir()] == ["precious"]


def test_meta_parameters_are_refused():
    with torch.device("meta"):
        model = decoder("llama")
    with pytest.raises(InputError, match="meta device"):
        halve.prune(model, calibration=tokens())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        halve.prune(torch.nn.Linear(4, 4), calibration=[{"input": torch.randn(2, 4)}])


@pytest.mark.parametrize("calibration", [None, "self"])
def test_magnitude_without_refit_needs_no_data_at_all(tmp_path, calibration):
    model = decoder("llama")
    pruned = halve.prune(model, tmp_path / "out", calibration=calibration, method="magnitude", refit="none")
    assert pruned.record["calibration"] == {"seed": 0, "source": "none", "batches": 0}
    assert pruned.record["mean_relative_loss"] is None
    assert halve.check(tmp_path / "out").matrices == 21


def test_the_best_effort_tunes_blocks_unless_told_not_to(monkeypatch):
    def asked(**options):
        requests = []
        monkeypatch.setattr(pruning, "prune_loaded", lambda _l, _d, request, _o, **_more: requests.append(request))
        halve.prune(decoder("llama"), calibration=[{"input_ids": tokens(4)}], **options)
        return requests[0].settings.reconstruction

    assert asked(effort="best") == Reconstruction()
    assert asked(effort="best", reconstruct="none") is None
    assert asked(effort="best", reconstruct=Reconstruction(epochs=1)) == Reconstruction(epochs=1)
    assert asked(effort="fast") is asked() is asked(method="wanda") is None


def test_the_objective_is_recorded_and_reaches_the_matrices():
    objective = Objective(shrinkage=0.2, match_dense=0.5)
    pruned = halve.prune(decoder("llama"), calibration=[{"input_ids": tokens(4)}], objective=objective, **FAST)
    assert pruned.record["objective"] == {"shrinkage": 0.2, "match_dense": 0.5, "match_ridge": 0.1}
    assert {matrix["facts"]["shrinkage"] for matrix in pruned.record["matrices"]} == {0.2}


def test_there_must_be_room_for_the_finished_blocks_too(tmp_path, monkeypatch, checkpoint, text):
    size = sum(parameter.nbytes for parameter in load_model(checkpoint).model.parameters())
    full = {tmp_path / "full": int(1.5 * size)}

    def disk_usage(path):
        free = next((free for place, free in full.items() if path.is_relative_to(place)), 10 * size)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(room.shutil, "disk_usage", disk_usage)
    depth = len(tmp_path.parts) + 1
    monkeypatch.setattr(room, "same_volume", lambda one, other: one.parts[:depth] == other.parts[:depth])
    (tmp_path / "full").mkdir()
    out, elsewhere = tmp_path / "full" / "out", tmp_path / "roomy"
    message = rf"^{out} needs .* GB and its volume has .* GB free"
    with pytest.raises(InputError, match=message):
        halve.prune(checkpoint, out, calibration=text, **FAST)
    assert not out.exists()
    assert halve.prune(checkpoint, out, calibration=text, work=elsewhere, **FAST).out == out
    full[tmp_path / "roomy"] = size // 2
    with pytest.raises(InputError, match=rf"^{elsewhere} needs .* GB"):
        halve.prune(checkpoint, tmp_path / "other", calibration=text, work=elsewhere, **FAST)
    assert not (tmp_path / "other").exists()
    assert not elsewhere.exists()


class StoppedError(Exception):
    """What stands for a crash in these tests."""


def stop_in(block, phase="collect"):
    def listen(step):
        if (step.block, step.phase) == (block, phase):
            raise StoppedError

    return listen


def files(directory):
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    assert found.keys() >= OF_ONE_RUN
    return {name: path.read_bytes() for name, path in found.items() if name not in OF_ONE_RUN}


@pytest.mark.parametrize(
    "options",
    [
        FAST | {"refit": "cg", "reconstruct": Reconstruction(epochs=1), "samples": 8, "seq_len": 64},
        {"effort": "fast", "samples": 8, "seq_len": 32, "objective": Objective(shrinkage=0.1)},
        FAST | {"pattern": "50%", "skip": ("*.q_proj.*",), "reconstruct": "block", "seed": 3},
        {"method": "magnitude", "refit": "none", "pattern": "1:4"},
        {"method": "gblm", "refit": "cg", "samples": 8, "seq_len": 32},
        {"method": "pruner-zero", "refit": "none", "samples": 8, "seq_len": 32, "reconstruct": "block"},
        {"method": "wanda++", "refit": "none", "samples": 8, "seq_len": 32, "learning_rate": 1e-4},
    ],
)
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(checkpoint, text, tmp_path, options):
    phase = "solve" if options.get("method") == "magnitude" else "collect"
    calibration = None if options.get("method") == "magnitude" else text
    halve.prune(checkpoint, tmp_path / "whole", calibration=calibration, **options)
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "stopped", calibration=calibration, listen=stop_in(2, phase), **options)
    assert not (tmp_path / "stopped" / "config.json").exists()
    solved = []
    again = halve.resume(tmp_path / "stopped", listen=lambda step: step.phase == "solve" and solved.append(step.block))
    assert set(solved) == {2}
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert halve.check(again.out, against=checkpoint).ok


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_text_that_the_model_wrote_is_not_written_again(checkpoint, tmp_path, monkeypatch, bos):
    byte_bpe(adds_bos=True).save_pretrained(checkpoint)
    options = FAST | {"calibration": "self", "bos": bos}
    halve.prune(checkpoint, tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "stopped", listen=stop_in(1), **options)

    def refuse(*_arguments, **_options):
        raise AssertionError("the model wrote again")

    monkeypatch.setattr("halve.text.tokens.sample_text", refuse)
    halve.resume(tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_model_on_the_hub_is_continued_at_the_commit_it_began_with(tmp_path, checkpoint, text, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(checkpoint, first)
    shutil.copytree(checkpoint, second)
    (second / "config.json").write_text((second / "config.json").read_text() + " ")
    newest = [first]

    def download(_name, revision, *, code, weights):
        assert weights
        assert not code
        return newest[0] if revision is None else tmp_path / revision

    monkeypatch.setattr("halve.checkpoint.load.download", download)
    with pytest.raises(StoppedError):
        halve.prune("org/model", tmp_path / "out", calibration=text, listen=stop_in(1), **FAST)
    newest[0] = second
    source = halve.resume(tmp_path / "out").record["source"]
    assert (source["kind"], source["name"], source["revision"]) == ("hub", "org/model", "first")
    again = halve.prune("org/model", tmp_path / "other", calibration=text, **FAST)
    assert again.record["source"]["revision"] == "second"
    asked = halve.prune("org/model", tmp_path / "third", calibration=text, revision="first", **FAST)
    assert asked.record["source"]["revision"] == "first"


def test_tokens_from_the_hub_are_not_fetched_again(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setitem(documents._HUB, "c4", None)
    monkeypatch.setattr(documents, "_hub_corpus", lambda _name, _use: documents.open_corpus(text, use="calibration"))
    options = FAST | {"calibration": "c4"}
    halve.prune(checkpoint, tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "stopped", listen=stop_in(1), **options)
    monkeypatch.setattr(documents, "_hub_corpus", lambda _name, _use: pytest.fail("the hub was asked again"))
    halve.resume(tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_model_in_memory_is_continued_by_the_same_call(tmp_path):
    data = tokens(8, length=16)
    halve.prune(decoder("llama"), tmp_path / "whole", calibration=data, **FAST)
    with pytest.raises(StoppedError):
        halve.prune(decoder("llama"), tmp_path / "stopped", calibration=data, listen=stop_in(2), **FAST)
    with pytest.raises(InputError, match="model or data in memory: call prune again"):
        halve.resume(tmp_path / "stopped")
    with pytest.raises(ResumeMismatchError, match=r"begun differently \(calibration was"):
        halve.prune(decoder("llama"), tmp_path / "stopped", calibration=data.flip(0), **FAST)
    halve.prune(decoder("llama"), tmp_path / "stopped", calibration=data, **FAST)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_an_error_says_whether_there_is_something_to_resume(tmp_path):
    data = tokens(8, length=16)
    for block, expected in ((0, None), (1, tmp_path / "1")):
        model = decoder("llama")
        model.model.layers[block].self_attn.v_proj.weight.data.zero_()
        with pytest.raises(LayerFailedError) as caught:
            halve.prune(model, tmp_path / str(block), calibration=data, **FAST)
        assert caught.value.unfinished == expected
        assert (tmp_path / str(block)).exists() is (expected is not None)


def test_a_run_goes_on_once_a_file_can_be_read_again(tmp_path, monkeypatch, checkpoint, text):
    def gone(entry):
        with reading(entry.path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    halve.prune(checkpoint, tmp_path / "whole", calibration=text, **FAST)
    monkeypatch.setattr("halve.checkpoint.write.read_chunks", gone)
    with pytest.raises(UnreadableFileError, match=r"model.safetensors cannot be read \(Input/output error\)") as caught:
        halve.prune(checkpoint, tmp_path / "out", calibration=text, **FAST)
    assert caught.value.unfinished == tmp_path / "out"
    monkeypatch.undo()
    halve.resume(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_run_that_only_had_to_be_tidied_up_is_complete(tmp_path, monkeypatch, checkpoint, text):
    def stop(_run):
        raise StoppedError

    monkeypatch.setattr(RunDirectory, "remove", stop)
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, **FAST)
    monkeypatch.undo()
    assert is_unfinished(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "twin")
    with pytest.raises(AlreadyCompleteError, match="was complete but for tidying up, which is done now"):
        halve.resume(tmp_path / "out")
    assert halve.check(tmp_path / "out", against=checkpoint).ok
    assert not is_unfinished(tmp_path / "out")
    done = CliRunner().invoke(app, ["resume", str(tmp_path / "twin")])
    assert done.exit_code == 0
    assert "was complete" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": "no/such.txt"}, "does not exist"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"samples": True}, "samples must be a whole number of at least 1, got True"),
        ({"seq_len": 0}, "seq_len must be a whole number of at least 1, got 0"),
        ({"out": None, "work": "somewhere"}, "give out too"),
        ({"objective": "auto"}, r"objective must be a halve\.Objective"),
        ({"text_field": object()}, "cannot be kept for resuming"),
        ({"method": "magnitude", "refit": "none", "objective": Objective(0.5)}, "shrinkage acts on statistics"),
        ({"method": "wanda", "objective": Objective(match_ridge=0.2)}, "match_ridge goes with targets from the dense"),
        ({"effort": "fast", "objective": Objective(match_ridge=0.2)}, "match_ridge goes with targets from the dense"),
    ],
)
def test_what_can_be_known_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, checkpoint, arguments, message):
    monkeypatch.setattr(
        "halve.checkpoint.load.load_model", lambda *_arguments, **_options: pytest.fail("it was loaded")
    )
    with pytest.raises(InputError, match=message):
        halve.prune(checkpoint, **{"out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_the_seed_is_part_of_a_run_though_it_may_change_no_token(tmp_path, checkpoint, text):
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, listen=stop_in(1), **FAST)
    with pytest.raises(ResumeMismatchError, match="seed was 0 and is 3"):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, seed=3, **FAST)


def test_a_damaged_block_does_not_ask_to_be_resumed(tmp_path, checkpoint, text):
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, listen=stop_in(1), **FAST)
    (tmp_path / "out" / ".halve" / "block-00000.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError) as caught:
        halve.resume(tmp_path / "out")
    assert caught.value.unfinished is None
    with pytest.raises(InputError, match="holds an unfinished run: complete it with `halve resume"):
        halve.check(tmp_path / "out")


def test_a_resumed_run_keeps_its_fallback(tmp_path, checkpoint, text):
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, fallback="wanda", listen=stop_in(1), **FAST)
    with pytest.raises(ResumeMismatchError, match="fallback was wanda and is magnitude"):
        halve.resume(tmp_path / "out", fallback="magnitude")
    with pytest.raises(ResumeMismatchError, match="fallback was wanda and is None"):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, **FAST)
    assert halve.resume(tmp_path / "out").record["fallback"] == "wanda"


def test_a_report_that_cannot_be_written_costs_no_checkpoint(monkeypatch, tmp_path):
    def broken(_run):
        raise HalveError("no room")

    monkeypatch.setattr(report_module, "run_page", broken)
    pruned = halve.prune(decoder("llama"), tmp_path / "out", calibration=tokens(8), method="magnitude", refit="none")
    assert pruned.notes == ("the checkpoint is complete, but its report is not written: no room",)
    assert halve.check(tmp_path / "out").ok
    assert not (tmp_path / "out" / "report.html").exists()
    monkeypatch.undo()
    assert halve.write_report(tmp_path / "out").exists()


def test_the_report_names_the_place_where_the_checkpoint_ends(tmp_path):
    halve.prune(decoder("llama"), tmp_path / "final", calibration=tokens(8), method="magnitude", refit="none")
    assert "halve check final</code>" in (tmp_path / "final" / "report.html").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"effort": "best"}, {"method": "prox-gradient"}, {"method": "sparsegpt"}])
def test_a_gpu_prunes_as_well(options, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        settings = {"calibration": tokens(16), "device": device, "forward_dtype": "float32", **options}
        pruned = halve.prune(decoder("llama"), tmp_path / device, **settings)
        assert next(pruned.model.parameters()).device == torch.device("cpu")
        assert halve.check(tmp_path / device).ok
        losses.append(pruned.report.mean_relative_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert pruned.report.peak_device_memory["solve"] > 0


def test_a_fallback_that_was_given_on_resuming_is_kept_by_the_run(tmp_path, checkpoint, text):
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, listen=stop_in(1), **FAST)
    with pytest.raises(StoppedError):
        halve.resume(tmp_path / "out", fallback="magnitude", listen=stop_in(2))
    assert halve.resume(tmp_path / "out").record["fallback"] == "magnitude"
