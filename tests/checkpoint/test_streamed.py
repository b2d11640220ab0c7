"""Models whose weights stay on disk: their parameters are those of a model that was loaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve.checkpoint.load import load_model, resolve
from halve.checkpoint.mapped import MappedWeights
from halve.checkpoint.precision import bytes_in_memory, dtype_to_prune_in
from halve.checkpoint.streamed import load_streamed
from halve.errors import InputError, UnsupportedModelError
from models import DECODERS, ENCODER_DECODERS, MIXTURES, bert, decoder, encoder_decoder, llava, save, vit

OTHERS = {"bert": bert, "vit": vit, "llava": llava}


def made(family):
    if family in OTHERS:
        return OTHERS[family]()
    return encoder_decoder(family) if family in ENCODER_DECODERS else decoder(family)


def alike(one, other):
    found = dict(other.model.state_dict())
    for name, value in one.model.state_dict().items():
        streamed = found.pop(name)
        assert streamed.dtype == value.dtype, name
        assert torch.equal(streamed, value), name
    assert not found
    for name in one.layout.tensors:
        assert other.layout.tensors[name] == one.layout.tensors[name]
    assert list(one.layout.everything()) == list(other.layout.everything())
    for name, parameter in one.model.named_parameters():
        if "embed_positions" in name:  # Marian makes its own, and writes none
            continue
        assert one.layout.locate(name) == other.layout.locate(name)
        if parameter.ndim == 3:
            assert one.layout.locate(name, 1) == other.layout.locate(name, 1)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS, *OTHERS])
def test_every_family_has_the_parameters_it_is_loaded_with(tmp_path, family):
    source = resolve(save(made(family), tmp_path / "model", max_shard_size="20KB"))
    loaded, streamed = load_model(source), load_streamed(source, tmp_path / "beside")
    alike(loaded, streamed)
    assert isinstance(streamed.weights, MappedWeights)
    made_by_the_model = 0.2 if family == "marian" else 0.01  # tables of positions, or a bias
    assert streamed.weights.held <= made_by_the_model * bytes_in_memory(source)
    assert (tmp_path / "beside").exists() == (family in MIXTURES)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_wider_dtype_is_put_beside(tmp_path, family, monkeypatch):
    monkeypatch.setattr("halve.checkpoint.streamed._SMALL", 100)
    source = resolve(save(decoder(family).bfloat16(), tmp_path / "model"))
    loaded = load_model(source, dtype=torch.float32)
    streamed = load_streamed(source, tmp_path / "beside", dtype=torch.float32)
    alike(loaded, streamed)
    assert streamed.weights.held < 0.02 * bytes_in_memory(source)  # norms


def test_what_is_not_aligned_is_put_beside(tmp_path):
    source = save(decoder("mixtral"), tmp_path / "model")
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" " * (3 - len(content[8 : 8 + length].rstrip()) % 4)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    found = resolve(source)
    streamed = load_streamed(found, tmp_path / "beside")
    alike(load_model(found), streamed)
    assert streamed.weights.held == 0


def test_dtypes_that_differ_are_only_widened(tmp_path):
    model = decoder("mixtral").bfloat16()
    source = save(model, tmp_path / "model")
    path = source / "model.safetensors"
    tensors = load_file(path)
    exact = {name: torch.randn(each.shape) for name, each in tensors.items() if ".experts." in name}
    save_file({**tensors, **exact}, path, metadata={"format": "pt"})
    found = resolve(source)
    wanted = dtype_to_prune_in(found)
    assert wanted == torch.float32
    alike(load_model(found, dtype=wanted), load_streamed(found, tmp_path / "beside", dtype=wanted))


def test_tied_weights_are_tied(tmp_path):
    source = resolve(save(decoder("llama_tied"), tmp_path / "model"))
    model = load_streamed(source, tmp_path / "beside").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_is_not_finite_is_refused(tmp_path):
    model = decoder("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    source = resolve(save(model, tmp_path / "model"))
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of .* holds NaN or infinity"):
        load_streamed(source, tmp_path / "beside")


def test_no_room_beside_is_told_before_anything_is_written(tmp_path, monkeypatch):
    source = resolve(save(decoder("mixtral"), tmp_path / "model"))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 100})())
    with pytest.raises(InputError, match="for weights that loading computes and its volume has"):
        load_streamed(source, tmp_path / "beside")
    assert not (tmp_path / "beside").exists()


def test_a_gguf_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="is no safetensors checkpoint, and cannot be read block by block"):
        load_streamed(resolve(path), tmp_path / "beside")
