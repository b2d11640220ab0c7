"""A model in memory is what its config builds, or is refused before it is pruned."""

import pytest
import torch
import transformers as tf
from torch import nn

import halve
import models
from halve.checkpoint.write import refuse_unlike_config
from halve.errors import InputError, UnsupportedModelError


def fewer_blocks(model):
    model.model.layers = model.model.layers[:2]
    return r"lacks 9 of the tensors that its config builds, model\.layers\.2\.input_layernorm\.weight"


def more_blocks(model):
    model.model.layers.append(models.decoder("llama", num_hidden_layers=1).model.layers[0])
    return r"has 9 tensors that its config does not build, model\.layers\.3"


def narrower(model):
    for block in model.model.layers:
        block.mlp.up_proj = nn.Linear(32, 48, bias=False)
        block.mlp.gate_proj = nn.Linear(32, 48, bias=False)
        block.mlp.down_proj = nn.Linear(48, 32, bias=False)
    return r"has model\.layers\.0\.mlp\.down_proj\.weight of shape \(32, 48\), and its config builds shape \(32, 64\)"


def a_head_beside(model):
    model.value_head = nn.Linear(32, 1)
    return r"has 2 tensors that its config does not build, value_head"


def tied_against_the_config(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return r"lacks 1 of the tensors that its config builds, (lm_head|model\.embed_tokens)\.weight"


@pytest.mark.parametrize(
    "change", [fewer_blocks, more_blocks, narrower, a_head_beside, tied_against_the_config], ids=lambda f: f.__name__
)
def test_a_model_that_is_not_what_its_config_builds_is_refused(change, tmp_path):
    model = models.decoder("llama")
    message = change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"the LlamaForCausalLM {message}.*make its config say what the model is"):
        halve.prune(model, tmp_path / "out", method="magnitude", refit="none")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_with_a_config_that_says_so_it_is_written_and_nothing_is_random(tmp_path):
    model = models.decoder("llama")
    fewer_blocks(model)
    model.config.num_hidden_layers = 2
    halve.prune(model, tmp_path / "out", method="magnitude", refit="none")
    _, info = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_in_memory_alone_any_shape_may_be_pruned():
    model = models.decoder("llama")
    fewer_blocks(model)
    assert halve.prune(model, method="magnitude", refit="none").report.blocks == 2


@pytest.mark.parametrize("family", [*models.DECODERS, "bert", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_config_builds_is_fine(family, dtype):
    model = models.decoder(family) if family in models.DECODERS else getattr(models, family)()
    refuse_unlike_config(model.to(dtype))


def test_so_is_a_vocabulary_that_was_resized_and_a_tie_that_was_loaded(tmp_path):
    model = models.decoder("llama_tied")
    model.resize_token_embeddings(80)
    refuse_unlike_config(model)
    refuse_unlike_config(tf.LlamaForCausalLM.from_pretrained(models.save(model, tmp_path / "in")))


def test_a_class_that_its_config_cannot_build_is_refused():
    class Odd(tf.LlamaForCausalLM):
        def __init__(self, config, width=None):
            assert width, "a width is needed"
            super().__init__(config)

    model = Odd(models.decoder("llama").config, width=3)
    with pytest.raises(UnsupportedModelError, match=r"could not build Odd from its config.*a width is needed"):
        refuse_unlike_config(model)
