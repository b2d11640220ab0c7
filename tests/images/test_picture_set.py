"""Calibration on pictures: the same as with ready batches, and what is refused before anything is pruned."""

import json

import pytest
import torch
import transformers as tf

import halve
from halve.checkpoint.load import load_model
from halve.errors import InputError, UnsupportedModelError
from halve.images.picture_set import calibration_pictures
from halve.run import loop
from halve.run.phases import Phase
from halve.text.calibration import Calibration
from models import decoder
from seen import draw, processor, save_vit, vit
from tiny_tokenizers import byte_bpe

FAST = {"method": "wanda", "refit": "none", "forward_dtype": "float32", "device": "cpu"}


@pytest.fixture
def model(tmp_path):
    return save_vit(tmp_path / "vit")


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "pictures")


def test_a_folder_prunes_as_the_same_pictures_in_batches_do(model, folder, tmp_path):
    data = calibration_pictures(folder, load_model(model), samples=6, seed=1)
    assert (data.samples, data.sizes, data.processor) == (6, ["3 x 8 x 8"], "ViTImageProcessorPil")
    pixels = torch.cat([row["pixel_values"] for row in data.rows])
    out = tmp_path / "out"
    by_folder = halve.prune(model, out, calibration=str(folder), samples=6, seed=1, **FAST)
    by_batch = halve.prune(model, calibration=[{"pixel_values": pixels}], **FAST)
    by_tensor = halve.prune(model, calibration=pixels, **FAST)
    in_memory = halve.prune(vit(), tokenizer=processor(), calibration=folder, samples=6, seed=1, **FAST)
    other = halve.prune(model, calibration=folder, samples=6, seed=2, **FAST)
    states = [each.model.state_dict() for each in (by_folder, by_batch, by_tensor, in_memory, other)]
    for state in states[1:4]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    assert any(not torch.equal(states[4][name], tensor) for name, tensor in states[0].items())
    record = json.loads((out / "halve.json").read_text())["calibration"]
    assert record == {
        "seed": 1,
        "shards": 1,
        "source": str(folder),
        "samples": 6,
        "pictures": ["3 x 8 x 8"],
        "processor": "ViTImageProcessorPil",
        "sha256": data.sha256,
    }
    assert (out / "preprocessor_config.json").read_bytes() == (model / "preprocessor_config.json").read_bytes()
    assert tf.AutoImageProcessor.from_pretrained(out, backend="pil").size == {"height": 8, "width": 8}
    assert halve.check(out).ok


def test_weights_that_stay_on_disk_give_the_same_bytes(model, folder, tmp_path):
    for name, stream in (("a", "never"), ("b", "always")):
        halve.prune(model, tmp_path / name, calibration=folder, samples=6, stream=stream, **FAST)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_stopped_run_goes_on_to_the_same_bytes(model, folder, tmp_path, monkeypatch):
    asked = {"calibration": folder, "samples": 6, **FAST}
    halve.prune(model, tmp_path / "whole", **asked)

    def stop(step):
        if step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve.prune(model, tmp_path / "stopped", listen=stop, **asked)
    halve.resume(tmp_path / "stopped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_batches_are_as_large_as_their_positions_allow(model, folder):
    data = calibration_pictures(folder, load_model(model), samples=10, seed=0)
    assert [len(batch["pixel_values"]) for batch in data.batches(vit(), 16)] == [4, 4, 2]  # 4 positions each
    assert [len(batch["pixel_values"]) for batch in data.batches(vit(), 1)] == [1] * 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 13}, "has 12 pictures, but samples = 13"),
        ({"seq_len": 8}, "seq_len is for text, and calibration is a folder of pictures"),
        ({"bos": "always"}, "bos is for text"),
        ({"pair_fields": "a,b"}, "holds no"),
    ],
)
def test_what_pictures_have_no_use_for_is_refused(model, folder, options, said, monkeypatch):
    monkeypatch.setattr(loop, "prune_blocks", lambda *_, **__: pytest.fail("pruned"))
    with pytest.raises(InputError, match=said):
        halve.prune(model, calibration=folder, **{"samples": 4} | options, **FAST)


def test_a_picture_that_cannot_be_read_is_named(model, folder):
    (folder / "red" / "0.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"red/0\.png is not a readable picture"):
        halve.prune(model, calibration=folder, samples=12, **FAST)


def test_text_for_a_model_that_sees_is_refused(model, tmp_path):
    (tmp_path / "text.txt").write_text("no picture")
    heard = []
    for source in (tmp_path / "text.txt", None):
        with pytest.raises(InputError, match="ViTForImageClassification takes pixel_values, not text: give a folder"):
            halve.prune(model, calibration=source, listen=lambda step: heard.append(step.phase), **FAST)
    assert Phase.GENERATE not in heard


def test_pictures_in_whole_numbers_are_refused(model):
    said = r"pictures of shape \(2, 3, 8, 8\) and torch\.uint8: give them in floating point, normalised"
    with pytest.raises(InputError, match=said):
        halve.prune(model, calibration=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), **FAST)


def test_pictures_for_a_model_that_reads_are_refused(folder, tmp_path):
    decoder("llama").save_pretrained(tmp_path / "llama")
    byte_bpe().save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match=r"is a folder of pictures, and LlamaForCausalLM takes input_ids: give text"):
        halve.prune(tmp_path / "llama", calibration=folder, **FAST)
    with pytest.raises(InputError, match=r"tensor of pictures of shape \(2, 3, 8, 8\), and LlamaForCausalLM takes"):
        halve.prune(tmp_path / "llama", calibration=torch.zeros(2, 3, 8, 8), **FAST)


def test_a_model_that_reads_is_given_the_text_beside_pictures(folder, tmp_path):
    (folder / "captions.txt").write_text("the red ones and the blue ones, " * 20)
    decoder("llama", vocab_size=512).save_pretrained(tmp_path / "llama")
    byte_bpe().save_pretrained(tmp_path / "llama")
    found = Calibration(folder, samples=2, seq_len=8).data(load_model(tmp_path / "llama"))
    assert found.ids.shape == (2, 8)


def test_a_method_that_needs_no_pictures_is_given_none(model, tmp_path):
    pruned = halve.prune(model, tmp_path / "out", method="magnitude", refit="none", device="cpu")
    assert len(pruned.report.matrices) == 2 * 6
    assert pruned.record["calibration"]["source"] == "none"
    assert halve.check(tmp_path / "out").ok


def test_a_model_in_memory_is_written_with_the_processor_that_was_given(folder, tmp_path):
    halve.prune(vit(), tmp_path / "out", tokenizer=processor(), calibration=folder, samples=4, **FAST)
    assert tf.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil").size == {"height": 8, "width": 8}


def test_an_empty_folder_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.pruning.load_found", lambda *_: pytest.fail("loaded"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="or pictures for a model that sees"):
        halve.prune(model, calibration=tmp_path / "empty", **FAST)


def test_pictures_that_were_left_in_several_sizes_are_told_in_one_sentence(folder):
    as_they_are = tf.ViTImageProcessorPil(do_resize=False)
    sentence = r"pictures come in several sizes \(8 x .*\): let the image processor resize them \(do_resize and size"
    with pytest.raises(UnsupportedModelError, match=f"cannot be run on the calibration data: {sentence}"):
        halve.prune(vit(), tokenizer=as_they_are, calibration=folder, samples=8, **FAST)
    with pytest.raises(InputError, match=f"ViTForImageClassification cannot be run on the pictures: {sentence}"):
        halve.top_one(vit(), folder, image_processor=as_they_are)
