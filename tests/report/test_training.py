"""What a training puts on record: taken by every reader, equal to the bytes on disk, and refused where it is none."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from halve.checkpoint.disk_layout import DiskTensor, Location
from halve.checkpoint.load import load_model
from halve.checkpoint.write import write_checkpoint
from halve.errors import CorruptFileError, HalveError, InputError
from halve.evaluation.figure import Perplexity
from halve.maths.pattern import Pattern
from halve.packed.write import pack_checkpoint
from halve.pruning import prune
from halve.recorded import Record, read_record
from halve.report.facts import read_run
from halve.report.measured import measured_by_phase, read_measured, write_measured
from halve.report.record import mask_sha256, masks
from halve.report.training import (
    learned_record,
    masks_after,
    plain_json,
    previous_record,
    scores_json,
    trained_record,
)
from halve.verification import check
from models import decoder, tokens
from reported import training_entry, write_record

PATTERN = Pattern("2:4")


def pruned(tmp_path, family, **options):
    """Write a dense tiny model and prune it; return both directories."""
    dense, out = tmp_path / "dense", tmp_path / "pruned"
    decoder(family).save_pretrained(dense)
    prune(dense, out, calibration=tokens(8), method="magnitude", refit="none", **options)
    return dense, out


def test_what_could_not_be_written_again_is_refused_before_a_training(tmp_path):
    deep = "x"
    for _ in range(600):
        deep = [deep]
    assert previous_record(write_record(tmp_path, options={"o": [["x"]]}))["options"] == {"o": [["x"]]}
    with pytest.raises(CorruptFileError, match="nested more than 100 deep; restore it, or prune again"):
        previous_record(write_record(tmp_path, options={"o": deep}))
    with pytest.raises(CorruptFileError, match="pattern 'none' is not understood"):
        previous_record(write_record(tmp_path, pattern="none"))


def trained(tmp_path, directory, name="trained"):
    """Change what is kept of every pruned parameter, and the norms, and write it with its record; no real training."""
    previous, loaded = previous_record(directory), load_model(directory)
    changed = [each for each, parameter in loaded.model.named_parameters() if "layers" in each or ".h." in each]
    with torch.no_grad():
        for each in changed:
            loaded.model.get_parameter(each).mul_(1.5)
    on_disk = sorted({tensor for each in changed for tensor in loaded.layout.locate(each).tensors})
    entry = training_entry(tensors=on_disk)
    record = trained_record(previous, entry, masks_after(loaded, previous))
    write_checkpoint(tmp_path / name, loaded, changed, record=record)
    return tmp_path / name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_trained_checkpoint_is_what_its_record_says(tmp_path, family):
    dense, out = pruned(tmp_path, family)
    done = trained(tmp_path, out)
    found = check(done, against=dense)
    assert found.ok, found.problems
    record = json.loads((done / "halve.json").read_text())
    before = json.loads((out / "halve.json").read_text())
    assert record["matrices"] == before["matrices"]  # a mask is no other for larger weights
    assert record["trainings"] == [training_entry(tensors=record["trainings"][0]["tensors"])]
    assert record["files"] != before["files"]


def test_without_the_training_on_record_the_same_bytes_are_refused(tmp_path):
    dense, out = pruned(tmp_path, "llama")
    done = trained(tmp_path, out)
    record = json.loads((done / "halve.json").read_text())
    (done / "halve.json").write_text(json.dumps(record | {"trainings": []}))
    problems = check(done, against=dense).problems
    assert problems
    assert all("was neither pruned nor tuned and differs" in problem for problem in problems)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_masks_are_those_of_the_bytes_that_are_written(tmp_path, family):
    _, out = pruned(tmp_path, family)
    previous, loaded = previous_record(out), load_model(out)
    for matrix in previous["matrices"]:  # forget what was on record: it must come from the weights
        matrix |= {"mask_sha256": None, "kept_per_group": None}
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.ndim > 1 and ("mlp" in name or "experts" in name):
                parameter.view(-1)[::3] = 0.0  # other masks than on record
    found = masks_after(loaded, previous)
    changed = [name for name, _ in loaded.model.named_parameters()]
    entry = training_entry(tensors=sorted(loaded.layout.tensors))
    write_checkpoint(tmp_path / "out", loaded, changed, record=trained_record(previous, entry, found))
    tensors, compared = load_file(tmp_path / "out" / "model.safetensors"), 0
    for matrix in json.loads((tmp_path / "out" / "halve.json").read_text())["matrices"]:
        name = matrix["tensors"][0]
        if len(matrix["tensors"]) == 1 and tensors[name].ndim == 2:
            weight = tensors[name] if matrix["layout"] == "out_in" else tensors[name].mT
            kept = (weight.reshape(weight.shape[0], -1, 4) != 0).sum(2).flatten()
            assert matrix["mask_sha256"] == mask_sha256(weight)
            assert matrix["kept_per_group"] == [int((kept == count).sum()) for count in range(3)]
            compared += 1
    assert compared >= 8


def test_what_is_too_small_for_the_disk_is_no_longer_kept(tmp_path):
    decoder("llama").half().save_pretrained(tmp_path / "dense")
    out = tmp_path / "pruned"
    prune(tmp_path / "dense", out, calibration=tokens(8), method="magnitude", refit="none")
    loaded = load_model(out, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        loaded.model.get_parameter(name).mul_(1e-12)
    rows, width = loaded.model.get_parameter(name).shape
    assert loaded.model.get_parameter(name).dtype == torch.float32
    assert masks_after(loaded, previous_record(out))[name]["kept_per_group"] == [rows * width // 4, 0, 0]


def test_a_matrix_that_lies_on_disk_the_other_way_is_found():
    def locate(name):
        assert name == "experts.down_proj"
        return Location(("on.disk",), transposed=True)

    tensors = {"on.disk": DiskTensor("on.disk", torch.float32, (4, 8, 4))}
    owner = nn.Module()
    owner.experts = nn.Module()
    weight = PATTERN.project(torch.randn(4, 4, 8))
    owner.experts.down_proj = nn.Parameter(weight)
    previous = {"pattern": "2:4", "matrices": [{"name": "experts.down_proj[2]", "layout": "in_out"}]}
    loaded = SimpleNamespace(model=owner, layout=SimpleNamespace(locate=locate, tensors=tensors))
    assert masks_after(loaded, previous)["experts.down_proj[2]"]["mask_sha256"] == mask_sha256(weight[2])
    previous["matrices"][0]["name"] = "experts.down_proj[4]"
    with pytest.raises(InputError, match=r"records a matrix 'experts.down_proj\[4\]', and the model has none there"):
        masks_after(loaded, previous)


def test_a_mask_that_was_left_is_told(tmp_path):
    _, out = pruned(tmp_path, "llama")
    loaded = load_model(out)
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(1.0)
    with pytest.raises(HalveError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is not 2:4"):
        masks_after(loaded, previous_record(out))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.9.mlp.up_proj.weight", "has no parameter"),
        ("model.layers.0.mlp.up_proj.weight[3]", "the model has none there"),
        ("model.layers.0.input_layernorm.weight", "the model has none there"),
    ],
)
def test_a_record_of_another_model_is_told(tmp_path, name, message):
    _, out = pruned(tmp_path, "llama")
    previous = previous_record(out)
    previous["matrices"][0]["name"] = name
    with pytest.raises(InputError, match=message):
        masks_after(load_model(out), previous)


def test_a_trained_checkpoint_can_be_trained_again_and_packed(tmp_path):
    dense, out = pruned(tmp_path, "llama")
    again = trained(tmp_path, trained(tmp_path, out), "again")
    assert len(read_run(again).trainings) == 2
    assert check(again, against=dense).ok
    pack_checkpoint(again, tmp_path / "packed")
    assert check(tmp_path / "packed").ok


def test_a_matrix_that_was_left_dense_needs_no_mask(tmp_path):
    _, out = pruned(tmp_path, "llama")
    previous, loaded = previous_record(out), load_model(out)
    failed = previous["matrices"][0]
    failed |= {"status": "failed"}
    with torch.no_grad():
        loaded.model.get_parameter(failed["name"]).fill_(1.0)
    found = masks_after(loaded, previous)
    assert len(found) == len(previous["matrices"]) - 1
    assert trained_record(previous, training_entry(), found)["matrices"][0] == failed


def test_masks_and_matrices_are_the_same_set(tmp_path):
    previous = json.loads((write_record(tmp_path) / "halve.json").read_text())
    found = {matrix["name"]: {"mask_sha256": "11", "kept_per_group": [1, 2, 3]} for matrix in previous["matrices"]}
    record = trained_record(previous, training_entry(), found)
    assert {matrix["mask_sha256"] for matrix in record["matrices"]} == {"11"}
    assert "files" not in record
    assert "files" in previous  # is not touched
    assert "trainings" not in previous
    for odd in ({}, found | {"other": {}}):
        with pytest.raises(HalveError, match="is pruned and has no mask, or has one and is not pruned"):
            trained_record(previous, training_entry(), odd)


def test_what_no_reader_would_take_is_not_written(tmp_path):
    previous = json.loads((write_record(tmp_path, matrices=[]) / "halve.json").read_text())
    with pytest.raises(HalveError, match=r"Expected `int`, got `str` - at `\$\.trainings\[0\]\.steps`"):
        trained_record(previous, training_entry(steps="7"), {})


def test_numbers_that_are_not_finite_are_null():
    curve = [{"step": 0, "tokens": 0, "perplexity": 1e304, "kl": math.nan}, {"step": 1, "tokens": 8, "loss": math.inf}]
    entry = plain_json(training_entry(curve=curve, rates_tried={3e-4: 2.5, 1e-2: math.inf}))
    assert entry["rates_tried"] == {"0.0003": 2.5, "0.01": None}
    assert entry["curve"] == [
        {"step": 0, "tokens": 0, "perplexity": None, "kl": None},
        {"step": 1, "tokens": 8, "loss": None},
    ]
    json.dumps(entry, allow_nan=False)
    assert curve[0]["perplexity"] == 1e304  # is not touched


def learned(tmp_path):
    """Write a tiny model whose masks were learned, by hand."""
    decoder("llama").save_pretrained(tmp_path / "dense")
    loaded = load_model(tmp_path / "dense")
    names = [name for name, each in loaded.model.named_parameters() if each.ndim > 1 and "layers" in name]
    matrices, facts = [], {}
    for name in names:
        parameter = loaded.model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(PATTERN.project(parameter))
        place = {"tensors": loaded.layout.locate(name).tensors, "layout": "out_in"}
        matrices.append({"name": name, "shape": tuple(parameter.shape), **place})
        kept = [0, 0, parameter.numel() // 4]
        facts[name] = {"mask_sha256": mask_sha256(parameter), "kept_per_group": kept}
    record = learned_record(
        {"kind": "directory", "name": str(tmp_path / "dense"), "revision": None},
        PATTERN,
        "maskllm",
        matrices,
        facts,
        [{"name": "lm_head.weight", "shape": (8, 8), "reason": "outside the blocks"}],
        training_entry(kind="learn", method="maskllm", teacher=None, started_from=None, tensors=[]),
    )
    write_checkpoint(tmp_path / "learned", loaded, names, record=record)
    return tmp_path / "dense", tmp_path / "learned"


def test_every_reader_takes_a_record_of_learned_masks(tmp_path):
    dense, out = learned(tmp_path)
    assert check(out, against=dense).ok
    run = read_run(out)
    assert (run.method, run.pattern, len(run.trainings)) == ("maskllm", "2:4", 1)
    assert run.without_loss == len(run.matrices) == 21
    pack_checkpoint(out, tmp_path / "packed")
    assert check(tmp_path / "packed").ok
    fine = trained(tmp_path, out)
    assert check(fine, against=dense).ok
    assert read_run(fine).method == "maskllm, fine-tuned"


def test_the_masks_of_a_plan_are_those_of_a_run(tmp_path):
    from halve.model.plan import Matrix

    _, out = pruned(tmp_path, "llama")
    loaded = load_model(out)
    planned = [
        Matrix(name=each["name"], parameter=each["name"], block=0, d_out=each["shape"][0], d_in=each["shape"][1])
        for each in previous_record(out)["matrices"]
    ]
    recorded = {
        each["name"]: {key: each[key] for key in ("mask_sha256", "kept_per_group")}
        for each in previous_record(out)["matrices"]
    }
    assert masks(loaded.model, planned, PATTERN, None) == recorded


def score(nll, windows):
    return Perplexity(math.exp(nll), 2, 16, "float32", "a.txt", "ee", 9.0, nll, window_nll=windows, versions={"x": "1"})


def test_perplexities_around_a_training():
    (found,) = scores_json([score(3.0, (2.5, 3.5))], [score(2.0, (1.75, 2.25))])
    assert found == {
        "source": "a.txt",
        "tokens_sha256": "ee",
        "seq_len": 16,
        "windows": 2,
        "dtype": "float32",
        "bos": "",
        "scored": "",
        "before": math.exp(3.0),
        "before_nll": 3.0,
        "after": math.exp(2.0),
        "after_nll": 2.0,
        "log_difference": -1.0,
        "log_difference_stderr": 0.25,
    }


def test_what_a_training_took_is_measured(tmp_path):
    write_measured(tmp_path, measured_by_phase({"train": 1.23456}, {"train": 7}, {}))
    found = read_measured(tmp_path)
    assert (found.seconds, found.peak_memory, found.matrix_seconds) == ({"train": 1.235}, {"train": 7}, {})
    assert found.finished.endswith("Z")


def test_a_record_names_what_trainings_may_have_changed(tmp_path):
    blocks = [{"name": "b", "error_before": 1.0, "error_after": 0.5, "epoch": 1, "tensors": ["a"]}]
    write_record(tmp_path, blocks=blocks, trainings=[training_entry(tensors=["b", "c"]), training_entry(tensors=["c"])])
    assert read_record(tmp_path, Record).tuned == {"a", "b", "c"}


def test_a_training_without_its_tensors_is_damage(tmp_path):
    entry = training_entry()
    del entry["tensors"]
    with pytest.raises(CorruptFileError, match=r"trainings\[0\]`: object missing required field `tensors`; restore it"):
        read_record(write_record(tmp_path, trainings=[entry]), Record)
