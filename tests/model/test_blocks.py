import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from halve.errors import CalibrationError, InputError
from halve.model import blocks, replay
from halve.model.blocks import SIDE, sides_of, stand_in_batch
from halve.model.calls import Living, leaves
from halve.model.stacks import find_stack
from models import DECODERS, MIXTURES, bert, decoder, llava, tokens, vit


def members(model):
    return list(find_stack(model)[1])


def final_hidden(model, batch):
    """The oracle: what the model itself feeds out of its last block."""
    seen = []
    hook = members(model)[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    blocks.run_model(model, batch)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def behaviour_of(model, batches):
    return replay.verify_replay(model, members(model), replay.probe_batches(batches))


def replayed(model, batches, directory=None):
    stack = members(model)
    behaviour = behaviour_of(model, batches)
    stream = blocks.capture(model, stack, batches, behaviour, directory)
    for index, block in enumerate(stack):
        for batch in range(len(batches)):
            stream.run(index, batch, block, torch.device("cpu"), keep=True)
    return stream


@pytest.mark.parametrize("family", DECODERS)
def test_replayed_blocks_equal_the_models_own_forward(family):
    model = decoder(family)
    batches = [{"input_ids": tokens(4, seed=1)}, {"input_ids": tokens(3, seed=2)}]
    with blocks.eager_experts(model):
        stream = replayed(model, batches)
        for hidden, batch in zip((stream.hidden[0], stream.hidden[1]), batches, strict=True):
            torch.testing.assert_close(hidden, final_hidden(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (bert(), {"input_ids": tokens(4), "attention_mask": torch.arange(24).expand(4, 24) < 20}),
        (vit(), {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}),
    ],
)
def test_encoders_replay_too(model, batch):
    stream = replayed(model, [batch])
    torch.testing.assert_close(stream.hidden[0], final_hidden(model, batch), rtol=1e-5, atol=1e-5)


def test_hidden_states_on_disk_are_the_same(tmp_path):
    model = decoder("llama")
    batches = [{"input_ids": tokens(4, seed=seed)} for seed in range(3)]
    in_memory, on_disk = replayed(model, batches), replayed(model, batches, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for batch in range(3):
        assert torch.equal(in_memory.hidden[batch], on_disk.hidden[batch])


def test_a_forward_of_the_instance_comes_back():
    model = decoder("llama")
    stack = members(model)
    batch = {"input_ids": tokens()}
    behaviour = behaviour_of(model, [batch])
    patched = functools.partial(stack[0].forward)  # as hooks of accelerate and patches do
    stack[0].forward = patched
    blocks.capture(model, stack, [batch], behaviour)
    assert stack[0].__dict__["forward"] is patched
    assert "forward" not in stack[1].__dict__


def test_no_call_holds_a_cache():
    """A wrapper that passes on whatever it is given: its signature does not name the cache."""
    model = llava()
    stack = list(model.model.language_model.layers)
    batches = [{"input_ids": tokens(2).clamp(min=4)}]
    stream = blocks.capture(model, stack, batches, replay.verify_replay(model, stack, batches))
    found = [value for calls in stream.calls for _, value in leaves(calls[0].kwargs)]
    assert not any("Cache" in type(value).__name__ for value in found)
    assert not any(isinstance(value, Living) for value in found)


def test_capture_leaves_the_model_as_it_was_and_computes_no_block():
    model = decoder("llama")
    stack = members(model)
    batch = {"input_ids": tokens()}
    behaviour = behaviour_of(model, [batch])
    ran = []
    hook = stack[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    stream = blocks.capture(model, stack, [batch], behaviour)
    hook.remove()
    assert not ran
    assert all("forward" not in block.__dict__ for block in stack)
    assert torch.equal(stream.hidden[0], model.model.embed_tokens(batch["input_ids"]))


def test_equal_arguments_of_different_batches_share_memory():
    model = decoder("gemma3")
    stack = members(model)
    batches = [{"input_ids": tokens(4, seed=seed)} for seed in range(2)]
    behaviour = behaviour_of(model, batches)
    stream = blocks.capture(model, stack, batches, behaviour)
    assert stream.calls[0][0] is stream.calls[0][1]
    assert stream.calls[0][0].kwargs["position_embeddings"][0] is stream.calls[2][0].kwargs["position_embeddings"][0]


def test_a_models_own_error_reaches_the_user():
    model = decoder("llama")
    stack = members(model)
    behaviour = behaviour_of(model, [{"input_ids": tokens(1)}])

    batches = [{"input_ids": tokens()}, {"input_ids": tokens(seed=1)}]
    calls = []

    def fail_on_the_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the second batch is broken")

    hook = model.model.embed_tokens.register_forward_hook(fail_on_the_second)
    with pytest.raises(ValueError, match="second batch is broken"):
        blocks.capture(model, stack, batches, behaviour)
    hook.remove()
    assert all("forward" not in block.__dict__ for block in stack)


def test_the_stream_marks_padding():
    model = decoder("llama")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 20:] = 0
    batches = [{"input_ids": tokens(2)}, {"input_ids": tokens(2), "attention_mask": mask}]
    stream = replayed(model, batches)
    assert stream.valid[0] is None
    assert torch.equal(stream.valid[1], mask.bool())


def test_infinite_embeddings_are_named():
    model = decoder("llama")
    behaviour = behaviour_of(model, [{"input_ids": tokens(1)}])
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    ids = torch.full((1, 6), 5)
    ids[0, 4] = 7
    with pytest.raises(
        CalibrationError, match=r"embeddings of calibration batch 0 are not finite at index \(0, 4, 0\)"
    ):
        blocks.capture(model, members(model), [{"input_ids": ids}], behaviour)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_experts_setting_is_put_back(family):
    model = decoder(family)
    before = model.get_experts_implementation()
    with blocks.eager_experts(model):
        assert set(model.get_experts_implementation().values()) == {"eager"}
    assert model.get_experts_implementation() == before


def test_working_copy_is_float32_and_separate():
    model = decoder("llama").to(torch.bfloat16)
    block = members(model)[0]
    work = blocks.working_copy(block, torch.device("cpu"))
    assert {p.dtype for p in work.parameters()} == {torch.float32}
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_masks_that_are_not_batch_by_sequence_are_refused():
    blocks.check_batches([{"input_ids": tokens(2), "attention_mask": torch.ones(2, 24)}])
    with pytest.raises(InputError, match=r"attention_mask of calibration batch 0 has shape \(2, 1, 24, 24\)"):
        blocks.check_batches([{"input_ids": tokens(2), "attention_mask": torch.ones(2, 1, 24, 24)}])
    with pytest.raises(InputError, match="no calibration batches"):
        blocks.check_batches([])


class Preparing(nn.Module):
    """A model whose own forward takes something that its base model does not, as SpeechT5 does."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.base_model = Body()

    def forward(self, codes):
        return self.base_model(self.embedding(codes))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, values, **_):
        self.seen.append(values.shape)


def test_what_only_the_whole_model_takes_is_given_to_it():
    model = Preparing()
    blocks.run_model(model, {"codes": torch.zeros(2, 3, dtype=torch.int64)})
    blocks.run_model(model, {"values": torch.zeros(2, 3, 4)})
    assert model.base_model.seen == [(2, 3, 4), (2, 3, 4)]


@pytest.mark.parametrize(
    ("named", "sides"),
    [(8, (8, 8)), ([8, 6], (8, 6)), ({"height": 4, "width": 5}, (4, 5)), ({"shortest_edge": 7}, (7, 7)), (None, None)],
)
def test_a_size_is_read_in_every_way_that_settings_have(named, sides):
    assert sides_of(named) == sides
    assert sides_of({"height": 0, "width": 4}) is None
    model = nn.Module()
    model.main_input_name, model.config = "pixel_values", SimpleNamespace(image_size=named)
    assert stand_in_batch(model)["pixel_values"].shape == (1, 3, *(sides or (SIDE, SIDE)))
