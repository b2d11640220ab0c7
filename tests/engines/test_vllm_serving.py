"""With vLLM itself: that Halve works under the transformers it pins, and real servers that answer real requests.

``bench/vllm_environment.sh`` sets an environment up; ``HALVE_VLLM_PYTHON`` is its Python.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import models
from halve.packed.write import pack_checkpoint
from halve.pruning import prune
from tiny_tokenizers import byte_bpe
from vllm_serving import HALVE, PACKED, ask, server

ENGINE = os.environ.get("HALVE_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
pytestmark = pytest.mark.skipif(
    ENGINE is None, reason="needs vLLM: bench/vllm_environment.sh sets it up, HALVE_VLLM_PYTHON names its Python"
)
PROMPTS = [[(7 * start + 3 * step) % 300 + 10 for step in range(12)] for start in range(3)]
TOKENS = 24
EAGER = ("--enforce-eager", "--dtype", "float32")


def run(program, *arguments):
    """Run a program in the engine's environment, and return what it has written last."""
    home = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([ENGINE, "-c", program, *arguments], capture_output=True, text=True, check=False, env=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_halve_works_under_the_transformers_that_vllm_pins(checkpoint):
    program = """
import json, sys, torch, transformers, halve
public = [getattr(halve, name).__name__ for name in halve.__all__]
done = halve.prune(sys.argv[1], sys.argv[2], method="magnitude", refit="none")
packed = halve.pack(sys.argv[2], sys.argv[2] + "-packed")
loaded = halve.load(packed.out)
with torch.inference_mode():
    sound = bool(loaded.model(torch.arange(20).view(1, -1)).logits.isfinite().all())
print(json.dumps([transformers.__version__, len(public), halve.check(packed.out).ok, sound]))
"""
    version, public, ok, sound = json.loads(
        run(program, str(checkpoint.parent / "dense"), str(checkpoint.parent / "again"))
    )
    assert version.startswith("5.")
    assert public > 40
    assert ok
    assert sound


def test_registering_is_passive_and_may_be_repeated():
    program = """
import json
from vllm.model_executor.layers import quantization
from vllm import plugins
from vllm.model_executor import model_loader
before, loaders = list(quantization.QUANTIZATION_METHODS), dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
plugins.load_general_plugins()
from halve.engines.vllm_plugin import register
register()
added = [name for name in quantization.QUANTIZATION_METHODS if name not in before]
kept = {name: kind for name, kind in model_loader._LOAD_FORMAT_TO_MODEL_LOADER.items() if name != "halve"} == loaders
config = quantization.get_quantization_config("halve")
print(json.dumps([added, kept, config.__name__]))
"""
    added, kept, name = json.loads(run(program))
    assert added == ["halve"]
    assert kept
    assert name == "HalveConfig"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"values": "int3"}, "values is 'int3': give own, bf16, int8 or int4"),
        ({"values": "int8", "bits": 8}, "quantization_config has 'bits', which Halve does not know"),
    ],
)
def test_other_options_are_refused(given, said):
    program = """
import json, sys
from halve.engines.vllm_config import HalveConfig
try:
    HalveConfig.from_config({"quant_method": "halve"} | json.loads(sys.argv[1]))
except ValueError as error:
    print(error)
"""
    assert run(program, json.dumps(given)).startswith(said)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model whose heads are as wide as vLLM takes them, at 2:4, in float32 so that no rounding decides."""
    path = tmp_path_factory.mktemp("served")
    sizes = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = models.decoder("llama", **sizes, num_key_value_heads=2, max_position_embeddings=1024)
    dense = models.save(model, path / "dense")
    byte_bpe().save_pretrained(dense)
    prune(dense, path / "plain", method="magnitude", refit="none")
    return path / "plain"


def served(directory, log, *options):
    """Return the tokens that a server answers to each prompt."""
    with server(Path(ENGINE), directory, options, log) as port:
        answers = [ask(port, prompt, TOKENS, return_token_ids=True) for prompt in PROMPTS]
    return [answer["choices"][0]["token_ids"] for answer in answers]


def likeliest(directory):
    """Return the tokens that transformers answers to each prompt, greedily."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as the servers are told to ignore it
    told = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **told)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def test_a_plain_checkpoint_is_packed_when_loaded_and_answers_as_transformers_does(checkpoint, tmp_path):
    assert served(checkpoint, tmp_path / "log", *HALVE, *EAGER) == likeliest(checkpoint)
    layers = len(AutoModelForCausalLM.from_pretrained(checkpoint).model.layers)
    log = (tmp_path / "log").read_text()
    assert f"{4 * layers} of {4 * layers + 2} layers packed" in log
    assert "2 dense because embeddings and heads are not packed" in log


def test_a_packed_checkpoint_answers_as_transformers_does(checkpoint, tmp_path):
    packed = pack_checkpoint(checkpoint, tmp_path / "packed").out
    assert served(packed, tmp_path / "log", *PACKED, *EAGER) == likeliest(checkpoint)
    assert "layers packed" in (tmp_path / "log").read_text()


def test_a_dense_model_is_served_as_without_halve(checkpoint, tmp_path):
    dense = checkpoint.parent / "dense"
    assert served(dense, tmp_path / "log", *HALVE, *EAGER) == likeliest(dense)
    assert "dense because it is not at 2:4: model.layers.0.self_attn.qkv_proj" in (tmp_path / "log").read_text()


def test_integers_are_chosen_by_the_overrides_of_the_config(checkpoint, tmp_path):
    chosen = json.dumps({"quantization_config": {"quant_method": "halve", "values": "int8"}})
    answers = served(checkpoint, tmp_path / "log", "--hf-overrides", chosen, *EAGER)
    assert "int8): " in (tmp_path / "log").read_text()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        below = logits.amax(-1) - logits.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)
        assert float((below / logits.std(-1)).max()) < 0.3


def test_a_packed_checkpoint_without_its_loader_is_refused_in_a_sentence(checkpoint, tmp_path):
    packed = pack_checkpoint(checkpoint, tmp_path / "packed").out
    with pytest.raises(SystemExit):
        served(packed, tmp_path / "log", *HALVE, *EAGER)
    assert "is packed: add --load-format halve" in (tmp_path / "log").read_text()
