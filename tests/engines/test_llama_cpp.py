"""llama.cpp as a contender: the file of random weights against the model's own sizes, and real runs of the engine."""

from importlib.util import find_spec

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

import models
from halve.engines import llama_cpp
from halve.engines.llama_cpp import LlamaCpp, write_random
from halve.errors import HalveError, InputError, UnsupportedModelError

SIZES = {"vocab_size": 330, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
needs_engine = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the package xllamacpp")


def model(family="llama", **changes):
    return models.decoder(family, **(SIZES | changes))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("kind", "head"), [("bf16", "BF16"), ("q8_0", "Q8_0"), ("q4_0", "Q8_0")])
def test_the_file_has_the_models_sizes_and_fewer_blocks(family, kind, head, tmp_path):
    whole = model(family)
    with torch.device("meta"):
        skeleton = type(whole)(whole.config)
    write_random(tmp_path / "small.gguf", skeleton, kind, 2)
    reader = GGUFReader(tmp_path / "small.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {name: p.shape for name, p in whole.named_parameters() if ".2." not in name and name != "lm_head.weight"}
    assert sorted(tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors) == sorted(
        map(tuple, sizes.values())
    )
    assert found["token_embd.weight"].tensor_type == getattr(GGMLQuantizationType, head)
    down = found["blk.1.ffn_down.weight"]
    assert down.tensor_type == getattr(GGMLQuantizationType, kind.upper())
    numbers = torch.from_numpy(dequantize(down.data, down.tensor_type))
    assert numbers.isfinite().all()
    assert 0.5 < numbers.std() * numbers.shape[1] ** 0.5 < 1.5
    assert "blk.2.ffn_down.weight" not in found
    assert next(field.contents() for key, field in reader.fields.items() if key.endswith("block_count")) == 2
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 330


@needs_engine
@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_decodes_every_family(family):
    engine = LlamaCpp()
    engine.check("m", model(family))
    for kind in engine.kinds:
        assert 0 < engine.seconds(model(family), kind, 1, 1) < 10


@needs_engine
def test_a_file_that_is_none_is_named_in_one_sentence(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(HalveError, match=r"^llama\.cpp ended with \d+ and no answer: [^\n]+$"):
        llama_cpp._decoded(tmp_path / "model.gguf", 1)


@pytest.mark.parametrize("missing", ["xllamacpp", "gguf"])
def test_a_missing_package_is_named(missing, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None if name == missing else find_spec("json"))
    with pytest.raises(InputError, match=rf"the package {missing}, .* is not installed: pip install {missing}"):
        LlamaCpp().check("m", model())


def test_models_that_are_not_written_are_refused(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: find_spec("json"))
    with pytest.raises(UnsupportedModelError, match=r"measured with models of llama, .* and m is a gpt2: leave"):
        LlamaCpp().check("m", models.decoder("gpt2"))
    odd = model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        LlamaCpp().check("m", odd)
    inner = model()
    inner.register_parameter("extra", torch.nn.Parameter(torch.zeros(4, 4)))
    with pytest.raises(UnsupportedModelError, match="tensor 'extra' of m"):
        LlamaCpp().check("m", inner)
