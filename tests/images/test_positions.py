"""How many positions a picture becomes, against what models make of one."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from halve.images.positions import picture_size, positions
from seen import processor, vit


def test_positions_are_those_of_the_first_hidden_state():
    model = vit(image_size=16, patch_size=4)
    hidden = model.vit(torch.zeros(1, 3, 16, 16)).last_hidden_state
    assert positions(model, 16, 16) == hidden.shape[1] - 1  # and the token of the class
    config = tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    convnext = tf.ConvNextModel(config)
    seen = convnext.embeddings(torch.zeros(1, 3, 32, 64))
    assert positions(convnext, 32, 64) == seen.shape[2] * seen.shape[3]


@pytest.mark.parametrize(("patch", "found"), [((2, 4), 8), ([1, 2, 4], 8), ([4], 4), (0, 4), (64, 1)])
def test_any_size_of_a_patch_is_read(patch, found):
    assert positions(SimpleNamespace(config=SimpleNamespace(patch_size=patch)), 8, 8) == found


def test_the_size_is_that_of_the_processor_or_of_the_config(tmp_path):
    model = vit(image_size=16)
    assert picture_size(model, None) == (16, 16)
    assert picture_size(model, tmp_path) == (16, 16)
    processor(24).save_pretrained(tmp_path)
    assert picture_size(model, tmp_path) == (24, 24)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 32}, "crop_size": 28}')
    assert picture_size(model, tmp_path) == (28, 28)
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert picture_size(SimpleNamespace(), tmp_path) == (224, 224)
