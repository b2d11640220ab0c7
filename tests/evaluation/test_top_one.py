"""Top-1 accuracy: against plain transformers, picture by picture, and its statistics against textbook values."""

import json
import math
import statistics

import pytest
import torch
import transformers as tf
from PIL import Image

import halve
from halve.errors import InputError
from halve.evaluation.top_one import Change, ImageEvaluation, TopOne, top_one, wilson
from halve.run.directory import RunDirectory
from models import decoder
from seen import COLOURS, draw, processor, save_vit, taught_vit, vit

FAST = {"method": "magnitude", "refit": "none", "forward_dtype": "float32", "device": "cpu"}


def by_hand(model, folder):
    """Judge picture by picture, in the order of their paths."""
    right = []
    for path in sorted(folder.rglob("*.*")):
        pixels = processor()(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            guess = int(model(pixel_values=pixels).logits.argmax())
        right.append(guess == list(COLOURS).index(path.parent.name))
    return tuple(right)


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "pictures")


@pytest.mark.parametrize("seed", range(3))
def test_every_picture_is_judged_as_by_hand(folder, seed):
    model = vit(seed)
    found = top_one(model, folder, image_processor=processor(), forward_dtype="float32")
    assert found.right == by_hand(model, folder)
    assert found.value == sum(found.right) / 12
    assert (found.pictures, found.dtype, found.processor) == (12, "float32", "ViTImageProcessorPil")


def test_a_model_that_has_learned_the_classes_is_right(folder, tmp_path):
    model = taught_vit()
    model.save_pretrained(tmp_path / "vit")
    processor().save_pretrained(tmp_path / "vit")
    for stream in ("never", "always"):
        assert top_one(tmp_path / "vit", folder, stream=stream).value == 1.0


def test_the_hash_is_of_what_is_shown_and_meant(folder, tmp_path):
    first, other = (top_one(vit(seed), folder, image_processor=processor()) for seed in range(2))
    assert first.sha256 == other.sha256
    larger = top_one(vit(image_size=16), folder, image_processor=processor(16))
    assert larger.sha256 == first.sha256  # the same pictures, as another model sees them
    Image.new("RGB", (8, 8), (255, 0, 1)).save(folder / "red" / "0.png")
    changed = top_one(vit(), folder, image_processor=processor())
    assert changed.sha256 != first.sha256
    assert changed.minus(first) is None


def test_wilsons_interval_is_that_of_the_tables():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)  # Brown, Cai and DasGupta 2001, n = 10
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    low, high = wilson(930, 1000)
    assert low < 0.93 < high


def result(right, sha256="a"):
    return TopOne("set", tuple(right), sha256, "float32", "P", 0.0)


def test_a_difference_is_that_of_pairs():
    before, after = [True] * 6 + [False] * 4, [True] * 3 + [False] * 3 + [True] + [False] * 3
    change = result(after).minus(result(before))
    assert (change.lost, change.gained, change.value) == (3, 1, pytest.approx(-0.2))
    each = [float(new) - float(old) for new, old in zip(after, before, strict=True)]
    assert change.stderr == pytest.approx(statistics.stdev(each) / math.sqrt(10))
    assert change.p_value == pytest.approx(2 * (1 + 4) / 2**4)
    assert result(after, "b").minus(result(before)) is None
    assert Change(0, 0, 1).stderr is None
    assert str(change) == "-20.00 ± 20.00 points"


def test_before_and_after_are_measured_and_put_on_record(folder, tmp_path):
    model = tmp_path / "vit"
    taught_vit().save_pretrained(model)
    processor().save_pretrained(model)
    out = tmp_path / "out"
    asked = {"calibration": folder, "samples": 4, "eval_images": folder, **FAST}
    pruned = halve.prune(model, out, **asked, pattern="1:4")
    assert pruned.top_one_before.right == by_hand(taught_vit(), folder)
    assert pruned.top_one_before.dtype == pruned.top_one_after.dtype == "float32"
    assert pruned.top_one_after.right == by_hand(tf.ViTForImageClassification.from_pretrained(out), folder)
    (entry,) = json.loads((out / "halve-measured.json").read_text())["top_one"]
    assert (entry["pictures"], entry["before"], entry["after"]) == (12, 12, sum(pruned.top_one_after.right))
    assert entry["lost"] - entry["gained"] == 12 - entry["after"]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    share = f"{100 * pruned.top_one_after.value:.2f} %"
    assert "top-1 100.00 %" in page
    assert f"<strong>{share}</strong>" in page
    assert f"| 100.00 % | {share} |" in card
    assert "AutoModelForImageClassification.from_pretrained" in page
    assert "AutoModelForImageClassification.from_pretrained" in card
    assert "Perplexity was not measured" not in page + card
    assert any("accuracies on it flatter" in note for note in pruned.notes)
    assert halve.check(out).ok


def test_the_dense_model_is_measured_once_however_often_the_run_is_stopped(folder, tmp_path, monkeypatch):
    model = save_vit(tmp_path / "vit")
    asked = {"calibration": folder, "samples": 4, "eval_images": folder, "eval_max_images": 7, **FAST}
    whole = halve.prune(model, tmp_path / "whole", **asked)

    def stop(step):
        if step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve.prune(model, tmp_path / "stopped", listen=stop, **asked)
    monkeypatch.setattr(RunDirectory, "keep_measured", lambda *_: pytest.fail("measured again"))
    resumed = halve.resume(tmp_path / "stopped")
    assert resumed.top_one_before.right == whole.top_one_before.right
    assert resumed.top_one_after.right == whole.top_one_after.right
    assert resumed.top_one_after.pictures == 7


def test_what_cannot_be_measured_after_is_a_note(folder, tmp_path, monkeypatch):
    measure, calls = ImageEvaluation.measure, []

    def once(self, *given):
        if calls:
            raise InputError("the disk is gone")
        calls.append(given)
        return measure(self, *given)

    monkeypatch.setattr(ImageEvaluation, "measure", once)
    asked = {"calibration": folder, "samples": 4, "eval_images": folder}
    pruned = halve.prune(save_vit(tmp_path / "vit"), tmp_path / "out", **asked, **FAST)
    assert "the model is pruned, but its top-1 accuracy was not measured: the disk is gone" in pruned.notes
    assert pruned.top_one_after is None
    assert halve.check(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("build", "images", "said"),
    [
        (lambda: decoder("llama"), "pictures", "holds pictures, and LlamaForCausalLM takes input_ids"),
        (vit, "none", "none holds no pictures"),
        (lambda: vit(id2label={0: "cat", 1: "dog"}), "pictures", "has a class 'blue'"),
        (lambda: tf.ViTModel(vit().config), "pictures", "ViTModel classifies no pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, build, images, said):
    with pytest.raises(InputError, match=said):
        top_one(build(), folder.parent / images, image_processor=processor())


def test_logits_that_are_not_finite_name_a_picture(folder):
    model = vit()
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"not finite for .*blue/0\.png"):
        top_one(model, folder, image_processor=processor())


def test_a_model_with_fewer_outputs_than_classes_is_refused(folder):
    model = vit()
    model.classifier = torch.nn.Linear(16, 2)
    with pytest.raises(InputError, match="knows 2 classes, and the pictures have one with the number 2"):
        top_one(model, folder, image_processor=processor())
