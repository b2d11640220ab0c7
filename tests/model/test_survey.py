"""Models of several stacks, built by hand: what one stack needs of another, and what belongs to which."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from halve.errors import UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model.classify import BYPASSED
from halve.model.survey import plan_model
from halve.run.loop import prune_blocks
from models import VOCAB, decoder, llava, tokens
from pruned_blocks import CPU, settings

WIDTH = 32


class Reading(nn.Module):
    """A block that also sees something from outside, after a norm if it is asked for."""

    def __init__(self, *, norms):
        super().__init__()
        self.up, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH) if norms else nn.Identity()

    def forward(self, hidden, seen):
        return hidden + torch.tanh(self.up(hidden)) + self.key(self.norm(seen)).mean(1, keepdim=True)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + torch.tanh(self.up(hidden))


def stack(*blocks):
    holder = nn.Module()
    holder.layers = nn.ModuleList(blocks)
    return holder


class Interleaved(nn.Module):
    """Two stacks that take turns, the larger reading what the other has made so far."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.one = stack(*[Reading(norms=False) for _ in range(3)])
        self.two = stack(*[Plain() for _ in range(3)])

    def forward(self, input_ids):
        hidden, seen = self.embedding(input_ids), self.embedding(input_ids.flip(1))
        for one, two in zip(self.one.layers, self.two.layers, strict=True):
            hidden, seen = one(hidden, seen), two(seen)
        return hidden


def test_a_stack_that_another_needs_while_it_runs_is_computed():
    torch.manual_seed(0)
    model, batch = Interleaved().eval(), {"input_ids": tokens(2, 24)}
    seen = []
    for block in model.one.layers:
        block.register_forward_pre_hook(lambda module, args: seen.append((module, args[1])))
    with torch.no_grad():
        model(**batch)
    expected = [value for _, value in seen]
    seen.clear()
    prune_blocks(model, [batch], settings(), device=CPU)
    originals = set(model.one.layers)
    fed = [value for module, value in seen if module not in originals]
    assert fed
    for value in fed:
        assert any(torch.equal(value, each) for each in expected)


class Translator(nn.Module):
    """An encoder-decoder whose decoder norms what it sees of the encoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.encoder = stack(Plain(), Plain())
        self.decoder = stack(Reading(norms=True), Reading(norms=True))
        self.config = SimpleNamespace(is_encoder_decoder=True)

    def get_encoder(self):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        seen, hidden = self.embedding(input_ids), self.embedding(decoder_input_ids)
        for block in self.encoder.layers:
            seen = block(seen)
        for block in self.decoder.layers:
            hidden = block(hidden, seen)
        return hidden


@pytest.mark.parametrize(("read", "fed"), [(24, 20), (24, 24), (40, 40), (64, 64)])
def test_what_a_block_makes_of_the_encoders_states_counts_the_encoders_positions(read, fed):
    read_mask, fed_mask = torch.ones(2, read, dtype=torch.long), torch.ones(2, fed, dtype=torch.long)
    read_mask[0, -9:] = 0
    fed_mask[1, -2:] = 0
    batch = {
        "input_ids": tokens(2, read),
        "attention_mask": read_mask,
        "decoder_input_ids": tokens(2, fed, 1),
        "decoder_attention_mask": fed_mask,
    }
    report = prune_blocks(Translator().eval(), [batch], settings(), device=CPU)
    counted = {m.name.removesuffix(".weight"): m.facts["tokens"] for m in report.matrices}
    assert counted["decoder.layers.1.key"] == counted["encoder.layers.1.up"] == 2 * read - 9
    assert counted["decoder.layers.1.up"] == 2 * fed - 2


@pytest.mark.parametrize("length", [17, 24])  # as many as patches and a class token, and another number
def test_padding_of_text_says_nothing_of_images(length):
    ids = tokens(2, length, 3).clamp(min=4)
    ids[:, :16] = 3
    mask = torch.ones_like(ids)
    mask[0, -1:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}
    report = prune_blocks(llava(), [batch], settings(tower="all"), device=CPU)
    counted = {m.name.split(".")[1]: m.facts["tokens"] for m in report.matrices}
    assert counted == {"vision_tower": 34, "language_model": 2 * length - 1}


class UsesAMember(nn.Module):
    """Calls one member of a list, and multiplies with the weight of the other."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, hidden):
        return self.up(hidden) + self.parts[0](hidden) + F.linear(hidden, self.parts[1].weight)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(UsesAMember(), UsesAMember())

    def forward(self, input_ids):
        return self.blocks(self.embedding(input_ids))


def test_a_list_with_a_bypassed_member_is_none_of_experts():
    model = Chain()
    plan, _ = plan_model(model, [{"input_ids": tokens(2, 24)}], Pattern("2:4"))
    assert {entry.reason for entry in plan.excluded if "parts" in entry.name} == {BYPASSED}
    assert not any(matrix.routed for matrix in plan.matrices)


def test_a_function_in_place_of_a_blocks_forward_is_refused():
    model = decoder("llama")
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: PLW0108 - a closure over the original
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 of Llama\w+ has a function set in place of its"):
        plan_model(model, [{"input_ids": tokens(2, 24)}], Pattern("2:4"))
