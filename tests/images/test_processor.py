"""The image processor of a model: found, and what is said where it is missing or does not fit."""

import pytest
import torch
import transformers as tf

from halve.checkpoint.load import LoadedModel, load_model, resolve
from halve.errors import InputError
from halve.images.pictures import folder_pictures
from halve.images.processor import check_sees, load_image_processor, prepared, processor_of, stacked
from models import decoder
from seen import draw, processor, save_vit, vit


def test_the_processor_of_the_checkpoint_makes_what_transformers_makes(tmp_path):
    from PIL import Image

    place = save_vit(tmp_path / "vit")
    picture = folder_pictures(draw(tmp_path / "pictures"))[3]
    row, pixels = prepared(picture, processor_of(load_model(place)), vit())
    image = Image.open(picture.where)
    expected = tf.ViTImageProcessorPil.from_pretrained(place)(images=image, return_tensors="pt")
    assert torch.equal(row["pixel_values"], expected["pixel_values"])
    assert pixels == image.tobytes()


def test_a_checkpoint_without_a_processor_is_refused(tmp_path):
    vit().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no image processor.*preprocessor_config\.json beside"):
        load_image_processor(resolve(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchImageProcessor"}')
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"vit"', '"bert"'))
    with pytest.raises(InputError, match="could not be loaded"):
        load_image_processor(resolve(tmp_path))


def test_a_model_in_memory_is_given_its_processor():
    given = processor()
    assert processor_of(LoadedModel(vit(), given, None)) is given
    with pytest.raises(InputError, match=r"in memory has no image processor.*'pixel_values'"):
        processor_of(LoadedModel(vit(), None, None))


def test_a_model_of_one_channel_sees_shades_of_grey(tmp_path):
    picture = folder_pictures(draw(tmp_path))[0]
    grey = tf.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    assert prepared(picture, grey, vit(num_channels=1))[0]["pixel_values"].shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match="takes 4 channels"):
        prepared(picture, processor(), vit(num_channels=4))


def test_a_processor_that_fails_names_the_picture(tmp_path):
    picture = folder_pictures(draw(tmp_path))[0]
    with pytest.raises(InputError, match=r"image processor fails on .*0\.png"):
        prepared(picture, lambda **_: {}, vit())


def test_the_first_argument_of_another_module_is_given_the_pictures(tmp_path):
    class Other(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    row, _ = prepared(folder_pictures(draw(tmp_path))[0], processor(), Other())
    assert list(row) == ["x"]


def test_models_that_take_something_else_are_refused():
    with pytest.raises(InputError, match="these are pictures, and LlamaForCausalLM takes input_ids: give text"):
        check_sees(decoder("llama"), "these are pictures")
    check_sees(vit(), "these are pictures")


def test_rows_of_one_shape_are_put_together_in_their_order():
    rows = [{"x": torch.full((1, 3, side, side), float(index))} for index, side in enumerate((2, 2, 2, 3, 2))]
    found = stacked(rows, 2)
    assert [batch["x"][:, 0, 0, 0].tolist() for batch in found] == [[0.0, 1.0], [2.0], [3.0], [4.0]]
