import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import models
from halve.engines.gguf_export import export_gguf
from halve.engines.gguf_families import FAMILIES, Shape, frequencies
from halve.errors import InputError, UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.pruning import prune
from packed_models import edit_tensor
from tiny_tokenizers import SENTENCES, byte_bpe

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {"vocab_size": 320, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
every_family = pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])


def checkpoint(path, family="llama", tokenizer=None, **changes):
    """A tiny pruned checkpoint, whose heads are as wide as llama.cpp wants them."""
    own = {"qwen2": {"vocab_size": 330}, "qwen3": {"head_dim": 32}, "mistral": {"sliding_window": None}}
    sizes = SIZES | own.get(family, {}) | changes
    dense = models.save(models.decoder(family, **sizes), path / "dense")
    (tokenizer or byte_bpe(eos="<|end|>")).save_pretrained(dense)
    prune(dense, path / "pruned", method="magnitude", refit="none")
    return path / "pruned"


def logits(directory, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral"])  # of the others it mistakes the vocabulary
@pytest.mark.parametrize(("kind", "share"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 4e-2)])
def test_transformers_reads_the_same_model_out_of_the_file(family, kind, share, tmp_path):
    pruned = checkpoint(tmp_path, family)
    result = export_gguf(pruned, tmp_path / "model.gguf", kind)
    assert result.path.stat().st_size == result.nbytes
    ids = torch.arange(24).reshape(2, 12) + 20
    expected = logits(pruned, ids)
    got = logits(tmp_path, ids, gguf_file="model.gguf")
    assert (got - expected).norm() < share * expected.norm()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_tensors_of_families_that_rotate_halves_are_the_checkpoints(family, tmp_path):
    pruned = checkpoint(tmp_path, family)
    export_gguf(pruned, tmp_path / "model.gguf", "bf16")
    plain = load_file(pruned / "model.safetensors")
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for short, name in names.items():
        tensor = found[f"blk.1.{short}.weight"]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weight, plain[f"model.layers.1.{name}.weight"].bfloat16().float())


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_zeros_stay_zeros_and_the_file_is_as_large_as_it_says(kind, tmp_path):
    pruned = checkpoint(tmp_path)
    result = export_gguf(pruned, tmp_path / "model.gguf", kind)
    reader = GGUFReader(tmp_path / "model.gguf")
    assert len(reader.tensors) == result.tensors
    matrices = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    assert len(matrices) == 3 * 7
    for tensor in matrices:
        assert tensor.tensor_type == getattr(GGMLQuantizationType, kind.upper())
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert Pattern("2:4").satisfied_by(weight)
        assert weight.count_nonzero() > 0.45 * weight.numel()
    assert {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) == 1} == {GGMLQuantizationType.F32}


NEXT = """
import json, pathlib, sys
import xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.cpuparams.n_threads, given.n_parallel = sys.argv[1], 128, 1, 1
server = xllamacpp.Server(given)
found = []
for prompt in json.loads(sys.argv[2]):
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    told = server.handle_completions(asked)["choices"][0]["logprobs"]
    found.append(told and told["content"][0]["id"])  # nothing is told of a token that is no whole character
pathlib.Path(sys.argv[3]).write_text(json.dumps(found))
"""


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the package xllamacpp")
@every_family
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_llama_cpp_says_the_same_next_token(family, kind, tmp_path):
    pruned = checkpoint(tmp_path, family)
    export_gguf(pruned, tmp_path / "model.gguf", kind)
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    prompts = [*SENTENCES, "the quick", "pruning, 123!\n  what", "a", "weights that a network"]
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-c", NEXT, str(tmp_path / "model.gguf"), json.dumps(prompts), str(answer)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads(answer.read_text())
    compared = 0
    for prompt, token in zip(prompts, found, strict=True):
        if token is not None:
            last = logits(pruned, tokenizer(prompt, return_tensors="pt")["input_ids"])[0, -1].clone()
            last[tokenizer.eos_token_id] = -torch.inf
            compared += 1
            # products in 16 bits may swap what is nearly tied
            assert last[token] >= last.max() - 0.02 * last[last.isfinite()].abs().max()
    assert compared >= 2


def test_wavelengths_are_stretched_as_transformers_does_it(tmp_path):
    config = models.decoder("llama", rope_parameters=LLAMA3, max_position_embeddings=512).config
    plain = models.decoder("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}).config
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    unstretched = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies(Shape.of(config)), unstretched / stretched)
    assert frequencies(Shape.of(plain)) is None
    result = export_gguf(checkpoint(tmp_path, rope_parameters=LLAMA3), tmp_path / "model.gguf")
    assert any(tensor.name == "rope_freqs.weight" for tensor in GGUFReader(result.path).tensors)


def test_attention_that_reaches_back_less_far_is_told(tmp_path):
    pruned = checkpoint(tmp_path, "mistral", sliding_window=8)
    assert "reaches back 8 tokens" in export_gguf(pruned, tmp_path / "model.gguf").notes[0]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ],
)
def test_the_tokenizer_goes_along(steps, name, tmp_path):
    tokenizer = byte_bpe(eos="<|end|>", adds_bos=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    export_gguf(checkpoint(tmp_path, tokenizer=tokenizer, vocab_size=330), tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    found = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}
    assert (found["model"], found["pre"], found["add_bos_token"]) == ("gpt2", name, True)
    assert found["tokens"][:320] == [tokenizer.convert_ids_to_tokens(number) for number in range(320)]
    assert found["tokens"][320:] == [f"[PAD{number}]" for number in range(320, 330)]
    assert found["token_type"] == [3, 3, *[1] * 318, *[5] * 10]
    assert (found["bos_token_id"], found["eos_token_id"]) == (0, 1)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_what_cannot_be_written_is_refused_in_one_sentence(tmp_path, monkeypatch):
    pruned = checkpoint(tmp_path)
    target = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"kind is 'q5_0': give bf16, f16, q8_0 or q4_0"):
        export_gguf(pruned, target, "q5_0")
    other = byte_bpe()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(UnsupportedModelError, match=r"splits texts in a way that is not known of llama.cpp"):
        export_gguf(checkpoint(tmp_path / "other", tokenizer=other), target)
    dense = models.save(models.decoder("gpt2"), tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match=rf"is written of {', '.join(FAMILIES)}, and this is a gpt2"):
        export_gguf(dense, target)
    with pytest.raises(InputError, match=r"has a token of number 319, and the model's embedding 64 rows"):
        export_gguf(checkpoint(tmp_path / "small", vocab_size=64), target)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"comes without a tokenizer"):
        export_gguf(models.save(models.decoder("llama"), tmp_path / "bare"), target)
    edit_tensor(pruned / "model.safetensors", "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor * 1e6)
    with pytest.raises(InputError, match=r"up_proj.weight' holds NaN or infinity in float16: mend the checkpoint, or"):
        export_gguf(pruned, target, "f16")
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".model*"))
    target.write_text("mine")
    with pytest.raises(InputError, match=r"is there already"):
        export_gguf(pruned, target)
    assert target.read_text() == "mine"
    monkeypatch.setattr("halve.engines.gguf_export.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'halve\[gguf\]'"):
        export_gguf(pruned, tmp_path / "new.gguf")


@pytest.mark.parametrize(
    ("rope", "complaint"),
    [
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "rotary embeddings of the type 'yarn' are not written",
        ),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "here partial_rotary_factor is"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "here low_freq_factor is missing"),
    ],
)
def test_rotary_embeddings_that_the_file_would_not_have_are_refused(rope, complaint):
    config = models.decoder("llama").config
    config.rope_parameters = rope
    with pytest.raises(UnsupportedModelError, match=complaint):
        Shape.of(config)


def test_linear_rotary_scaling_goes_along(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    fields = GGUFReader(export_gguf(checkpoint(tmp_path, rope_parameters=rope), tmp_path / "model.gguf").path).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_rows_that_are_no_whole_blocks_are_float16(kind, tmp_path):
    pruned = checkpoint(tmp_path, intermediate_size=80)
    export_gguf(pruned, tmp_path / "model.gguf", kind)
    found = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert found["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert found["blk.0.ffn_up.weight"] == getattr(GGMLQuantizationType, kind.upper())
    assert found["token_embd.weight"] == GGMLQuantizationType.Q8_0


def test_merges_that_are_left_out_are_refused(tmp_path):
    tokenizer = byte_bpe()
    tokenizer.backend_tokenizer.model.ignore_merges = True
    with pytest.raises(UnsupportedModelError, match=r"leaves merges out, which llama.cpp would not"):
        export_gguf(checkpoint(tmp_path, tokenizer=tokenizer), tmp_path / "model.gguf")
