import pytest
import torch

from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction, Tuned
from halve.model.survey import plan_model
from halve.run import local as run_module
from halve.run.loop import prune_blocks
from models import decoder
from pruned_blocks import CPU, assert_pruned, batches, settings


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_reconstruction_brings_the_output_closer_and_keeps_the_pattern(family):
    data = batches(4, rows=8)
    plain, tuned, dense = (decoder(family) for _ in range(3))
    prune_blocks(plain, data, settings("wanda", min_expert_tokens=1), device=CPU)
    options = Reconstruction(epochs=8, learning_rate=3e-3)
    report = prune_blocks(tuned, data, settings("wanda", min_expert_tokens=1, reconstruction=options), device=CPU)
    assert_pruned(tuned, report)
    blocks = plan_model(dense, data, Pattern("2:4"))[0].blocks
    assert tuple(block.name for block in report.reconstructions) == blocks
    assert all(block.tuned.after < block.tuned.before for block in report.reconstructions)
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)) == (name not in report.changed), name
    with torch.no_grad():
        target = dense(**data[0]).logits
        errors = [float((model(**data[0]).logits - target).square().mean()) for model in (plain, tuned)]
    assert errors[1] < errors[0]


def test_reconstruction_with_hidden_states_on_disk_is_the_same(tmp_path):
    models = [decoder("llama") for _ in range(2)]
    for model, folder in zip(models, (None, tmp_path), strict=True):
        asked = settings("magnitude", reconstruction=Reconstruction(epochs=1))
        prune_blocks(model, batches(4), asked, device=CPU, offload=folder)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
    assert (tmp_path / "dense").is_dir()


def test_the_first_block_that_gains_chooses_the_learning_rate_for_the_rest(monkeypatch):
    stuck, gained = (
        Tuned(before=1.0, after=1.0, epoch=0, learning_rate=None, steps=1, held_out=1),
        Tuned(before=1.0, after=0.5, epoch=1, learning_rate=4e-3, steps=1, held_out=1),
    )
    asked, answers = [], [stuck, gained, gained]

    def tune(_work, _masks, _example, _count, options, *_rest):
        asked.append(options)
        return answers[len(asked) - 1]

    monkeypatch.setattr(run_module, "reconstruct", tune)
    prune_blocks(decoder("llama"), batches(4), settings(reconstruction=Reconstruction(epochs=2)), device=CPU)
    assert asked == [Reconstruction(2), Reconstruction(2), Reconstruction(2, 4e-3)]


def test_reconstruction_needs_calibration():
    assert settings("magnitude", reconstruction=Reconstruction()).needs_calibration


def test_reconstruction_leaves_shared_and_skipped_vectors_alone():
    model = decoder("llama")
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    asked = settings("wanda", skip=("*.post_attention_layernorm.*",), reconstruction=Reconstruction(epochs=2))
    report = prune_blocks(model, batches(4), asked, device=CPU)
    assert all(block.tuned.epoch for block in report.reconstructions)
    for name, parameter in model.named_parameters():
        alone = "post_attention" in name or name.endswith("layers.0.input_layernorm.weight")
        if "layernorm" in name:
            assert torch.equal(parameter, before[name]) == alone, name
