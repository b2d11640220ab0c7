"""Models whose blocks are not one plain stack: what the loop feeds them is what the whole model would."""

import copy

import pytest
import torch
from transformers import BartConfig

import halve
from fed import assert_fed, inputs, watch
from halve.errors import InputError
from halve.run.loop import prune_blocks
from halve.solve.objective import Objective
from models import ENCODER_DECODERS, OF_ONE_RUN, encoder_decoder, gemma4, llava, mamba, pairs, save, tokens
from pruned_blocks import CPU, assert_pruned, settings


def text(*sizes):
    return [{"input_ids": tokens(rows, length, seed).clamp(min=4)} for seed, (rows, length) in enumerate(sizes)]


def run(model, batches, method, **options):
    """Prune, and hold what was fed to every block against full forward passes of both models.

    Channels stay where they are: folds would be looked for on samples with noise.
    """
    options = {"permute": "none", **options}
    dense = copy.deepcopy(model)
    everything = {name: module for name, module in model.named_modules() if name.rpartition(".")[2].isdecimal()}
    names = [name for name in everything if not any(name.startswith(f"{other}.") for other in everything)]
    seen = watch(model, names)
    report = prune_blocks(model, batches, settings(method, "cg", **options), device=CPU)
    assert_pruned(model, report)
    ran = {name: calls for name, calls in seen.items() if calls}
    assert {name for name in seen if any(m.name.startswith(f"{name}.") for m in report.matrices)} == set(ran)
    assert_fed(
        ran, inputs(dense, ran, batches), inputs(model, ran, batches), paired=settings(method, **options).matches_dense
    )
    return report


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@pytest.mark.parametrize("method", ["wanda", "auto"])
def test_decoders_see_what_the_pruned_encoder_gives(family, method):
    report = run(encoder_decoder(family), [pairs(family), pairs(family, 3, 21, 1)], method)
    stacks = {name.split(".layers.")[0].split(".block.")[0] for name in (m.name for m in report.matrices)}
    assert len(stacks) == 2
    assert len(report.matrices) == 32  # two blocks each: 6 matrices in the encoder, 10 in the decoder


def test_cross_attention_counts_the_encoders_positions():
    report = prune_blocks(encoder_decoder("bart"), [pairs("bart")], settings("wanda", "cg"), device=CPU)
    seen = {m.name.removeprefix("model.decoder.layers.1."): m.facts["tokens"] for m in report.matrices}
    assert seen["encoder_attn.k_proj.weight"] == seen["encoder_attn.v_proj.weight"] == 4 * 24
    assert seen["encoder_attn.q_proj.weight"] == seen["self_attn.k_proj.weight"] == 4 * 19


@pytest.mark.parametrize("lengths", [(24, 19), (20, 20)])
def test_padding_counts_in_neither_stack(lengths):
    """The oracle: each row alone, without its padding."""
    models = [encoder_decoder("bart") for _ in range(2)]
    sizes = ((lengths[0], lengths[1] - 6), (lengths[0] - 9, lengths[1]))
    rows = [{"input_ids": tokens(1, a, 1), "decoder_input_ids": tokens(1, b, 2)} for a, b in sizes]
    padded = {
        name: torch.cat([torch.nn.functional.pad(row[name], (0, length - row[name].shape[1])) for row in rows])
        for name, length in zip(("input_ids", "decoder_input_ids"), lengths, strict=True)
    }
    padded["attention_mask"] = torch.tensor([[i < a for i in range(lengths[0])] for a, _ in sizes])
    padded["decoder_attention_mask"] = torch.tensor([[i < b for i in range(lengths[1])] for _, b in sizes])
    reports = [
        prune_blocks(model, batches, settings("wanda"), device=CPU)
        for model, batches in zip(models, (rows, [padded]), strict=True)
    ]
    for one, two in zip(*(report.matrices for report in reports), strict=True):
        assert one.facts["tokens"] == two.facts["tokens"], one.name
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one == 0, two == 0), name


def test_hidden_states_of_both_stacks_may_lie_on_disk(tmp_path):
    models = [encoder_decoder("t5") for _ in range(2)]
    for model, folder in zip(models, (None, tmp_path), strict=True):
        prune_blocks(model, [pairs("t5"), pairs("t5", 2, 30, 1)], settings("auto", "cg"), device=CPU, offload=folder)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("method", ["wanda", "auto"])
def test_the_text_tower_is_pruned_without_a_cache(method):
    report = run(llava(), text((4, 24), (3, 18)), method)
    assert {m.name.split(".layers.")[0] for m in report.matrices} == {"model.language_model"}


def with_images():
    ids = tokens(2, 24, 3).clamp(min=4)
    ids[:, 2:18] = 3
    return [{"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}]


@pytest.mark.parametrize(
    ("tower", "pruned"),
    [(None, ["language_model"]), ("vision", ["vision_tower"]), ("all", ["vision_tower", "language_model"])],
)
def test_a_tower_can_be_chosen(tower, pruned):
    report = run(llava(), with_images(), "auto", tower=tower)
    assert list(dict.fromkeys(m.name.split(".")[1] for m in report.matrices)) == pruned


def test_towers_that_are_not_there_or_do_not_run_are_named():
    with pytest.raises(InputError, match="has no tower 'audio': choose among text, vision, or all"):
        prune_blocks(llava(), text((2, 20)), settings(tower="audio"), device=CPU)
    with pytest.raises(InputError, match=r"the vision tower of Llava\w+ did not run .*another tower \(text\)"):
        prune_blocks(llava(), text((2, 20)), settings(tower="vision"), device=CPU)


def test_keys_and_values_that_blocks_share_are_those_of_the_same_model_and_batch():
    run(gemma4(), text((4, 24), (4, 24), (2, 13)), "auto")


def test_weights_used_without_their_layer_stay_dense_by_themselves():
    report = run(mamba(), text((4, 24), (3, 18)), "wanda")
    reasons = {entry.name.split(".", 4)[-1]: entry.reason for entry in report.excluded}
    assert reasons["dt_proj.weight"] == (
        "the model multiplies with it without calling its layer, so its inputs cannot be seen"
    )
    assert {m.name.split(".")[-2] for m in report.matrices} == {"in_proj", "x_proj", "out_proj"}


def test_targets_from_the_dense_model_pair_the_decoders_memory_too():
    options = {"objective": Objective(match_dense=1.0)}
    plain, matched = (encoder_decoder("bart") for _ in range(2))
    prune_blocks(plain, [pairs("bart")], settings("wanda", "cg"), device=CPU)
    report = prune_blocks(matched, [pairs("bart")], settings("wanda", "cg", **options), device=CPU)
    assert_pruned(matched, report)
    name = "model.decoder.layers.0.encoder_attn.k_proj.weight"
    assert not torch.equal(plain.get_parameter(name), matched.get_parameter(name))


def test_the_models_own_settings_come_back():
    model = encoder_decoder("bart")
    assert isinstance(model.config, BartConfig)
    model.config.return_dict = False
    model.config.use_cache = True
    model.config.output_hidden_states = True
    prune_blocks(model, [pairs("bart")], settings(), device=CPU)
    assert (model.config.return_dict, model.config.use_cache) == (False, True)
    assert model.config.output_hidden_states is True


class StoppedError(Exception):
    """A run is stopped from outside."""


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("options", [{"method": "auto"}, {"method": "wanda", "reconstruct": "block"}])
@pytest.mark.parametrize("family", ["bart", "t5", "gemma4"])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path, family, stop, options):
    save(gemma4() if family == "gemma4" else encoder_decoder(family), tmp_path / "dense")
    batches = text((4, 24), (2, 13)) if family == "gemma4" else [pairs(family), pairs(family, 3, 21, 1)]
    asked = {"calibration": batches, "device": "cpu", **options}

    def stopping(step):
        if step.block == stop and step.phase == "solve":
            raise StoppedError

    whole = halve.prune(tmp_path / "dense", tmp_path / "whole", **asked)
    with pytest.raises(StoppedError):
        halve.prune(tmp_path / "dense", tmp_path / "stopped", listen=stopping, **asked)
    resumed = halve.prune(tmp_path / "dense", tmp_path / "stopped", **asked)
    assert (whole.report.resumed_blocks, resumed.report.resumed_blocks) == (0, stop)
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.name not in OF_ONE_RUN:
            assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sounds_and_images_come_in_the_dtype_of_the_weights(dtype):
    model = encoder_decoder("whisper").to(dtype)
    report = prune_blocks(model, [pairs("whisper")], settings(), device=CPU)  # with features in float32
    assert_pruned(model, report)
