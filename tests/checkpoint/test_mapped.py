"""Tensors in mapped files: what they hold, what they cost, and what letting go of them leaves."""

import mmap
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from halve.checkpoint.mapped import MappedFile, MappedWeights
from halve.checkpoint.shards import build_header, read_tensor, tensor_bytes
from halve.errors import CorruptFileError
from halve.model.blocks import run_model
from models import decoder, save, tokens

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident, and forgets on demand")


def resident(path) -> int:
    """Bytes of a mapped file that are in this process's memory; what else the process does is not among them."""
    return sum(place.rss for place in psutil.Process().memory_maps(grouped=False) if place.path == str(path))


def test_all_dtypes_and_shapes_come_as_the_library_reads_them(tmp_path):
    made = {
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "narrow": torch.randn(7).bfloat16(),
        "truth": torch.tensor([True, False, True]),  # odd: what follows is not aligned
        "odd": torch.randn(2, 2),
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(3),
    }
    path = tmp_path / "t.safetensors"
    save_file(made, path)
    found = MappedFile(path).tensors
    assert found.keys() == made.keys()
    for name, tensor in load_file(path).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_not_aligned_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}'
    )
    header += b" " * (3 - len(header) % 4)
    content = torch.tensor([1.5, -2.0])
    path.write_bytes(len(header).to_bytes(8, "little") + header + content.numpy().tobytes() + b"x")
    assert (8 + len(header)) % 4
    file = MappedFile(path)
    assert file.tensors.keys() == {"b"}
    assert torch.equal(read_tensor(file.unaligned["a"]), content)


@linux
def test_what_was_read_can_be_given_back(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(16 * MB), "b": torch.ones(16 * MB)}, path)
    file = MappedFile(path)
    assert file.tensors["a"].sum() + file.tensors["b"].sum() == 32 * MB
    assert resident(path) > 120 * MB
    file.forget({"a"})
    assert 56 * MB < resident(path) < 72 * MB
    file.forget({"b"})
    assert resident(path) < 8 * MB
    assert file.tensors["a"].sum() == 16 * MB


@linux
def test_it_counts_as_no_memory_that_is_asked_for(tmp_path):
    """A process that may have 200 MB of data maps 400 MB, which a private map that can be written to would not do."""
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(100 * MB)}, path)
    program = f"""
import resource, torch
from pathlib import Path
from halve.checkpoint.mapped import MappedFile
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 200 * {MB}, resource.RLIM_INFINITY))
print(MappedFile(Path({str(path)!r})).tensors["a"][::4096].sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 100 * MB / 4096


def test_fetching_asks_for_whole_pages_and_unknown_names_for_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.arange(5000.0), "b": torch.arange(3)}, path)
    file = MappedFile(path)
    asked = []

    class Watched:
        def madvise(self, *given):
            asked.append(given)

    monkeypatch.setattr(file, "_map", Watched())
    file.fetch({"unknown"})
    assert asked == []
    file.fetch({"a", "b"})
    [(advice, start, length)] = asked  # neighbours at once
    assert (advice, start) == (mmap.MADV_WILLNEED, 0)
    assert length >= 5000 * 4 + 3 * 8


def test_a_file_that_is_removed_is_there_until_nobody_needs_it(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    tensor = MappedFile(path).tensors["a"]
    path.unlink()
    assert torch.equal(tensor, torch.arange(5000.0))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptFileError, match=r"t\.safetensors is corrupt"):
        MappedFile(path)


@pytest.fixture
def mapped(tmp_path):
    model = decoder("llama_tied")
    file = MappedFile(save(model, tmp_path / "model") / "model.safetensors")
    for name, tensor in file.tensors.items():
        model.get_parameter(name).data = tensor
    return model, file, MappedWeights(model, [file])


def test_what_lies_in_memory_is_counted(mapped):
    model, file, weights = mapped
    assert weights.held == 0
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert MappedWeights(model, [file]).held == model.model.norm.weight.nbytes


def test_a_block_that_is_settled_has_what_was_kept_and_all_else_as_before(mapped, tmp_path):
    model, file, weights = mapped
    before = {name: tensor.clone() for name, tensor in file.tensors.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({name: torch.full_like(model.get_parameter(name), 2.0)}, tmp_path / "kept.safetensors")
    weights.fetch("model.layers.1")
    for parameter in model.model.layers[1].parameters():
        weights.own(parameter)
        parameter.data.fill_(3.0)  # not what was kept: it is read from there
        weights.own(parameter)
        assert parameter.min() == 3.0  # what is in memory stays there
    weights.settle("model.layers.1", tmp_path / "kept.safetensors")
    for other, parameter in model.named_parameters():
        expected = torch.full_like(parameter, 2.0) if other == name else before[other]
        assert torch.equal(parameter, expected), other
    weights.own(model.get_parameter(name))
    assert model.get_parameter(name).data.add_(1.0).min() == 3.0
    weights.settle("model.layers.1", tmp_path / "kept.safetensors")
    assert model.get_parameter(name).min() == 2.0


def test_what_was_kept_so_that_it_cannot_be_used_in_place_stays_in_memory(mapped, tmp_path):
    model, _, weights = mapped
    block = model.model.layers[1]
    block.input_layernorm.weight.data = block.input_layernorm.weight.data.clone()
    names = [f"model.layers.1.{name}" for name in ("input_layernorm.weight", "mlp.up_proj.weight")]
    for name in names:
        parameter = model.get_parameter(name)
        weights.own(parameter)
        parameter.data.fill_(2.0)
    odd = {"a": torch.ones(3, dtype=torch.bfloat16)}
    kept = {names[1]: model.get_parameter(names[1]).data.clone()}
    path = tmp_path / "kept.safetensors"
    specs = [("model.layers.1.odd", torch.bfloat16, (3,)), (names[1], torch.float32, kept[names[1]].shape)]
    block.odd = torch.nn.Parameter(odd["a"].clone())
    path.write_bytes(build_header(specs) + bytes(tensor_bytes(odd["a"])) + bytes(tensor_bytes(kept[names[1]])))
    assert names[1] in MappedFile(path).unaligned
    weights.settle("model.layers.1", path)
    assert bool((model.get_parameter(names[1]) == 2.0).all())


@linux
def test_blocks_are_let_go_as_the_model_passes_them(tmp_path):
    model = decoder("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    path = save(model, tmp_path / "model") / "model.safetensors"
    file = MappedFile(path)
    for name, tensor in file.tensors.items():
        model.get_parameter(name).data = tensor
    weights = MappedWeights(model, [file])
    with weights.passing(model.model.layers):
        run_model(model, {"input_ids": tokens(1, 8)})
    assert resident(path) < 30 * MB  # of 150
    run_model(model, {"input_ids": tokens(1, 8)})
    assert resident(path) > 100 * MB
    for parameter in model.parameters():
        weights.done_with(parameter)
    assert resident(path) < 30 * MB
