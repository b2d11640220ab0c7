"""The judge must pass what is right and name everything that is wrong, from the bytes on disk alone."""

import json
import shutil
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from halve import recorded
from halve.checkpoint.load import LoadedModel, load_model
from halve.checkpoint.shards import read_shard
from halve.checkpoint.write import write_checkpoint
from halve.errors import CorruptFileError, InputError, PatternError, UnreadableFileError
from halve.maths.pattern import Pattern
from halve.verification import check

NAME = "model.layers.1.mlp.up_proj.weight"


def pruned(tmp_path, family="llama", pattern="2:4", **options):
    """Write a model of ``family`` and its pruned copy; return both directories."""
    before, out = tmp_path / "in", tmp_path / "out"
    models.decoder(family).save_pretrained(before, max_shard_size="40KB")
    loaded = load_model(before)
    matrices, names = [], []
    for name, parameter in loaded.model.named_parameters():
        if parameter.ndim >= 2 and ("layer" in name or ".h." in name):
            flip = family == "gpt2"
            view = parameter.transpose(-1, -2) if flip else parameter
            view.copy_(Pattern(pattern).project(view))
            location = loaded.layout.locate(name)
            layout = "in_out" if flip != location.transposed else "out_in"
            matrices.append({"name": name, "tensors": location.tensors, "layout": layout, "status": "ok"})
            names.append(name)
    write_checkpoint(out, loaded, names, record={"pattern": pattern, "matrices": matrices}, **options)
    return before, out


def holder(directory, name):
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        if name in tensors:
            return path, tensors
    raise AssertionError(name)


def rewrite(directory, name, change):
    """Change one tensor on disk, the recorded sha256 with it."""
    path, tensors = holder(directory, name)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, {"format": "pt"})
    forget(directory)


def forget(directory):
    """Make the record agree with the files again."""
    record = json.loads((directory / "halve.json").read_text())
    record["files"] = {name: sha256((directory / name).read_bytes()).hexdigest() for name in record["files"]}
    (directory / "halve.json").write_text(json.dumps(record))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_problem(result, text):
    assert not result.ok
    assert len(result.problems) == 1, result.problems
    assert text in result.problems[0]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "qwen3_moe"])
def test_a_good_checkpoint_passes(tmp_path, family):
    before, out = pruned(tmp_path, family)
    result = check(out, against=before)
    assert result.ok, result.problems
    assert result.problems == result.notes == ()
    tensors = {entry.name for path in out.glob("*.safetensors") for entry in read_shard(path).tensors}
    recorded = {
        name for matrix in json.loads((out / "halve.json").read_text())["matrices"] for name in matrix["tensors"]
    }
    assert (result.pattern, result.matrices, result.tensors) == ("2:4", len(recorded), len(tensors))
    assert result.compared == len(tensors - recorded)
    assert result.sparsity == pytest.approx(0.5)


def test_a_group_with_one_weight_too_many_is_found(tmp_path):
    _, out = pruned(tmp_path)

    def spoil(tensor):
        tensor[3, 8:12] = torch.tensor([1.0, 0.0, 2.0, 1e-38])
        return tensor

    rewrite(out, NAME, spoil)
    result = check(out)
    one_problem(result, f"{NAME!r} is not 2:4: 1 of 512 groups")
    assert result.matrices == 20


def test_a_group_with_fewer_weights_is_fine(tmp_path):
    _, out = pruned(tmp_path)
    rewrite(out, NAME, torch.zeros_like)
    result = check(out)
    assert result.ok
    assert result.sparsity > 0.5


def test_orientation_matters(tmp_path):
    _, out = pruned(tmp_path, "gpt2")
    record = json.loads((out / "halve.json").read_text())
    record["matrices"] = [{**matrix, "layout": "out_in"} for matrix in record["matrices"]]
    (out / "halve.json").write_text(json.dumps(record))
    assert len(check(out).problems) == len(record["matrices"])


def test_a_given_pattern_overrules_the_record(tmp_path):
    _, out = pruned(tmp_path)
    assert check(out, pattern="4:8").ok
    result = check(out, pattern="1:4")
    assert len(result.problems) == 21
    assert result.matrices == 0
    assert "is not 1:4" in result.problems[0]
    assert "d_in divisible by 5" in check(out, pattern="2:5").problems[0]


def test_without_a_record_the_pattern_is_looked_for(tmp_path):
    before, out = pruned(tmp_path, "gpt2")
    (out / "halve.json").unlink()
    result = check(out, pattern="2:4", against=before)
    assert result.ok, result.problems
    assert (result.matrices, result.sparsity) == (12, 0.5)
    assert "no halve.json" in result.notes[0]
    for original in (None, before):
        with pytest.raises(InputError, match=r"has no halve\.json: give the pattern of its matrices"):
            check(out, against=original)
    one_problem(check(before, pattern="2:4"), "no tensor has the pattern 2:4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(tmp_path, bad):
    _, out = pruned(tmp_path)

    def spoil(tensor):
        tensor[0] = bad
        return tensor

    rewrite(out, "model.norm.weight", spoil)
    one_problem(check(out), "'model.norm.weight' holds NaN or infinity")


def test_a_tensor_that_should_not_have_changed_is_found(tmp_path):
    before, out = pruned(tmp_path)
    rewrite(out, "model.norm.weight", lambda tensor: tensor + torch.eye(1, 32)[0] * 1e-6)
    assert check(out).ok
    result = check(out, against=before)
    one_problem(result, "'model.norm.weight' was neither pruned nor tuned and differs")
    assert result.compared == 8


def test_a_failed_matrix_must_be_untouched(tmp_path):
    before, out = pruned(tmp_path)
    record = json.loads((out / "halve.json").read_text())
    (matrix,) = (matrix for matrix in record["matrices"] if matrix["name"] == NAME)
    matrix["status"] = "failed"
    (out / "halve.json").write_text(json.dumps(record))
    assert check(out).matrices == 20
    one_problem(check(out, against=before), f"{NAME!r} was neither pruned nor tuned and differs")


def test_other_names_dtypes_and_shapes_than_the_originals(tmp_path):
    before, out = pruned(tmp_path)
    path, tensors = holder(out, "model.norm.weight")
    tensors["added"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["added"] = index["weight_map"].pop("model.norm.weight")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite(out, NAME, lambda tensor: tensor.bfloat16())
    rewrite(out, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor[:32].clone())
    problems = sorted(check(out, against=before).problems)
    assert len(problems) == 4
    assert "'added' is not in the original" in problems[0]
    assert "torch.float32 (32, 32), and torch.float32 (64, 32)" in problems[1]
    assert "torch.bfloat16" in problems[2]
    assert "'model.norm.weight' of the original is missing" in problems[3]


def test_one_flipped_bit_is_found_in_any_file(tmp_path):
    _, out = pruned(tmp_path)
    files = json.loads((out / "halve.json").read_text())["files"]
    assert {"config.json", "model.safetensors.index.json", "generation_config.json"} < files.keys()
    for name in files:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        result = check(out)
        assert any(name in problem for problem in result.problems), name
        (out / name).write_bytes(content)
    assert check(out).ok


def test_missing_truncated_and_swapped_files_are_problems(tmp_path):
    _, out = pruned(tmp_path)
    first, second, *_ = sorted(out.glob("*.safetensors"))
    broken = tmp_path / "broken"

    def damaged():
        shutil.rmtree(broken, ignore_errors=True)
        return shutil.copytree(out, broken)

    (damaged() / first.name).unlink()
    one_problem(check(broken), f"{first.name} is missing")
    for size in (0, 7, 100, first.stat().st_size - 1):
        (damaged() / first.name).write_bytes(first.read_bytes()[:size])
        one_problem(check(broken), f"{first.name} is corrupt")
    shutil.copy(first, damaged() / second.name)
    both, changed = check(broken).problems
    assert f"is in both {first.name} and {second.name}" in both
    assert f"{second.name} does not have the sha256" in changed
    (damaged() / "config.json").unlink()
    assert any("config.json" in problem for problem in check(broken).problems)
    (damaged() / "generation_config.json").unlink()
    one_problem(check(broken), "generation_config.json is recorded in halve.json and is missing")


def test_a_config_that_is_not_plain_is_found(tmp_path):
    _, out = pruned(tmp_path)
    edit(out / "config.json", quantization_config={"quant_method": "x"}, sparsity_config={"format": "y"})
    forget(out)
    assert [problem.split("'")[1] for problem in check(out).problems] == ["quantization_config", "sparsity_config"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"matrices": [{"tensors": "x"}]}, "`matrices[0].tensors`: expected `array`, got `str`"),
        ({"matrices": [{"tensors": [3]}]}, "`matrices[0].tensors[0]`: expected `str`, got `int`"),
        ({"matrices": [{"tensors": ["a"], "layout": "up"}]}, "`matrices[0].layout`: invalid enum value 'up'"),
        ({"matrices": 3}, "`matrices`: expected `array`, got `int`"),
        ({"matrices": [{"tensors": ["ghost"]}]}, "'ghost' is recorded as pruned and is missing"),
        ({"matrices": [{"tensors": ["model.norm.weight"]}]}, "which is no matrix"),
        ({"pattern": "4:2"}, "halve.json is not as Halve writes it: pattern '4:2' is not understood"),
        ({"pattern": ["2:4"]}, "halve.json is not as Halve writes it: `pattern`: expected"),
        ({"pattern": None}, "no pattern"),
        ({"files": None}, "does not record the sha256"),
        ({"files": {"../outside": "0"}}, "outside the directory"),
    ],
)
def test_a_record_that_lies_is_a_problem(tmp_path, changes, text):
    _, out = pruned(tmp_path)
    edit(out / "halve.json", **changes)
    result = check(out)
    assert not result.ok
    assert any(text in problem for problem in result.problems), result.problems


def test_a_shard_left_out_of_the_record_is_a_problem(tmp_path):
    _, out = pruned(tmp_path)
    record = json.loads((out / "halve.json").read_text())
    del record["files"]["config.json"]
    (out / "halve.json").write_text(json.dumps(record))
    one_problem(check(out), "config.json is not among the files recorded")


def test_halves_own_json_may_be_garbage(tmp_path):
    _, out = pruned(tmp_path)
    (out / "halve.json").write_bytes(b"\x00garbage")
    one_problem(check(out), "halve.json is corrupt: its JSON is malformed")


def test_bad_arguments_are_refused(tmp_path):
    before, out = pruned(tmp_path)
    with pytest.raises(InputError, match="is not a directory"):
        check(tmp_path / "absent")
    with pytest.raises(PatternError):
        check(out, pattern="4:2")
    with pytest.raises(InputError, match="does not exist"):
        check(out, against=tmp_path / "absent")
    next(before.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CorruptFileError):
        check(out, against=before)


def test_a_dequantised_original_is_compared_by_value(tmp_path, monkeypatch):
    """No GGUF file is at hand in a test: a model in memory stands for what loading one gives."""
    before, out = pruned(tmp_path)
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    original = LoadedModel(load_model(before).model, None, None)
    monkeypatch.setattr("halve.verification.load_model", lambda source: original)
    result = check(out, against=gguf)
    assert result.ok, result.problems
    assert result.compared == 9
    assert "dequantised values" in result.notes[0]
    rewrite(out, "model.norm.weight", lambda tensor: tensor * 2)
    one_problem(check(out, against=gguf), "'model.norm.weight' was neither pruned nor tuned and differs")
    rewrite(out, "model.norm.weight", lambda tensor: tensor[:8].clone())
    one_problem(check(out, against=gguf), "has shape (8,)")


def test_every_damaged_file_is_told_and_the_others_are_judged(tmp_path):
    _, out = pruned(tmp_path)
    first, second, *_, last = sorted(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    name = next(entry.name for entry in read_shard(last).tensors)
    rewrite_only(last, name, lambda tensor: tensor * float("nan"))
    (out / "generation_config.json").unlink()
    problems = check(out).problems
    for text in (
        f"{first.name} is corrupt: its tensors end at byte",
        f"{second.name} is missing",
        f"tensor {name!r} holds NaN",
        f"{last.name} does not have the sha256",
        "generation_config.json is recorded in halve.json and is missing",
    ):
        assert sum(text in problem for problem in problems) == 1, (text, problems)
    assert len(problems) == 5
    result = check(out)
    assert 0 < result.tensors < 30
    assert 0 < result.matrices < 21


def test_without_a_sound_index_the_shards_are_judged_all_the_same(tmp_path):
    before, out = pruned(tmp_path)
    sound = check(out)
    (out / "model.safetensors.index.json").write_text("{")
    first, *_ = sorted(out.glob("*.safetensors"))
    result = check(out, against=before)
    assert result.matrices == sound.matrices
    assert [problem.split(": ")[0].rsplit("/", 1)[-1] for problem in result.problems] == [
        "model.safetensors.index.json is corrupt",
        "model.safetensors.index.json does not have the sha256 recorded when it was written",
    ]
    (out / "model.safetensors.index.json").unlink()
    first.write_bytes(b"")
    problems = check(out).problems
    assert any("has neither model.safetensors nor" in problem for problem in problems)
    assert any(f"{first.name} is corrupt" in problem for problem in problems)
    assert not any("is recorded as pruned and is missing" in problem for problem in problems)


def test_a_file_that_cannot_be_read_is_a_problem_and_not_the_end(tmp_path, monkeypatch):
    _, out = pruned(tmp_path)
    (out / "generation_config.json").unlink()
    read = recorded.sha256_of

    def failing(path):
        if path.name == "config.json":
            raise UnreadableFileError(f"{path} cannot be read")
        return read(path)

    monkeypatch.setattr(recorded, "sha256_of", failing)
    assert sorted(problem.rsplit("/", 1)[-1] for problem in check(out).problems) == [
        "config.json cannot be read",
        "generation_config.json is recorded in halve.json and is missing",
    ]


def rewrite_only(path, name, change):
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, {"format": "pt"})


def filled(directory, name):
    """Fill the zeros of a tensor, as a merged adapter does."""
    path, tensors = holder(directory, name)
    save_file(tensors | {name: tensors[name] + 0.5}, path, {"format": "pt"})


def test_matrices_that_lost_their_pattern_are_named_with_the_likely_cause(tmp_path):
    _, out = pruned(tmp_path)
    for number in (0, 2):
        filled(out, f"model.layers.{number}.mlp.up_proj.weight")
    result = check(out)
    (lost,) = [note for note in result.notes if "have lost" in note]
    assert lost.startswith("2 of 21 pruned matrices have lost 2:4 (mlp.up_proj): the likely cause is an adapter")
    assert "halve merge ADAPTER --into PRUNED --out DIR" in lost
    assert sum("is not 2:4" in problem for problem in result.problems) == 2


def test_without_a_record_matrices_of_the_shapes_of_pruned_ones_are_suspected(tmp_path):
    _, out = pruned(tmp_path)
    (out / "halve.json").unlink()
    assert not [note for note in check(out, pattern="2:4").notes if "likely cause" in note]
    filled(out, "model.layers.1.self_attn.v_proj.weight")
    result = check(out, pattern="2:4")
    assert result.ok
    (lost,) = [note for note in result.notes if "likely cause" in note]
    assert lost.startswith("1 matrix is not 2:4 (self_attn.v_proj), and others of that shape in blocks are: if it was")
    for number in range(3):  # no other matrix has the shape of these: they may have been dense all along
        filled(out, f"model.layers.{number}.mlp.down_proj.weight")
    assert lost in check(out, pattern="2:4").notes


def test_where_nothing_has_the_pattern_the_likely_cause_is_told(tmp_path):
    before, _ = pruned(tmp_path)
    (problem,) = check(before, pattern="2:4").problems
    assert problem.startswith("no tensor has the pattern 2:4: the likely cause is an adapter that was merged")
