import copy
from collections import UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from halve.errors import CalibrationError, UnsupportedModelError
from halve.model import replay
from halve.model.blocks import capture
from halve.model.stacks import find_stacks
from models import decoder, encoder_decoder, llava, pairs, tokens

CPU = torch.device("cpu")


def verify(model, *batches):
    return replay.verify_replay(model, list(model.blocks), batches)


class Between(nn.Module):
    """A model that changes the hidden state between its blocks."""

    def __init__(self, factor):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)])
        self.factor = factor

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * self.factor
        return x


def test_work_between_blocks_is_detected():
    batch = {"x": torch.randn(2, 5, 8)}
    fine, wrong = Between(1.0), Between(1.5)
    verify(fine, batch)
    with pytest.raises(UnsupportedModelError, match="changes the hidden state between blocks"):
        verify(wrong, batch)


class Twice(Between):
    def forward(self, x):
        return super().forward(super().forward(x))


def test_blocks_that_run_twice_are_refused():
    model = Twice(1.0)
    with pytest.raises(UnsupportedModelError, match="block 0 of Twice ran 2 times"):
        verify(model, {"x": torch.randn(2, 5, 8)})


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        x += self.up(x)
        return x


def test_a_block_that_writes_into_its_input_is_refused():
    model = Between(1.0)
    model.blocks = nn.ModuleList([InPlace(), InPlace()])
    with pytest.raises(UnsupportedModelError, match="block 0 of Between writes into its own input"):
        verify(model, {"x": torch.randn(2, 5, 8)})


class WithExtra(InPlace):
    """Returns a second tensor, as blocks with a shared position bias do."""

    def forward(self, x, bias=None):
        shift = torch.zeros(()) if bias is None else bias.mean((1, 2), keepdim=True)
        return x + self.up(x) + shift, x + 1.0


class Sharing(nn.Module):
    """Hands what a block returns beside its hidden state to the next one: as it is, changed, or not at all."""

    def __init__(self, change=None):
        super().__init__()
        self.blocks = nn.ModuleList([WithExtra(), WithExtra(), WithExtra()])
        self.change = change

    def forward(self, x):
        bias = None
        for block in self.blocks:
            x, extra = block(x, bias=bias)
            bias = None if self.change is None else self.change(extra)
        return x


def final_states(model, xs):
    """The oracle: what the model's own forward returns for each batch."""
    with torch.no_grad():
        return [model(x) for x in xs]


def replayed_states(model, xs):
    batches = [{"x": x} for x in xs]
    stream = capture(model, list(model.blocks), batches, verify(model, *batches[:2]))
    for index, block in enumerate(model.blocks):
        for batch in range(len(xs)):
            stream.run(index, batch, block, CPU)
            stream.run(index, batch, block, CPU, keep=True)
    return [stream.hidden[batch] for batch in range(len(xs))]


def inputs(*sizes):
    return [torch.randn(rows, length, 8) for rows, length in sizes]


def test_what_blocks_hand_each_other_besides_the_hidden_state_is_handed_on():
    torch.manual_seed(0)
    xs = inputs((2, 5), (3, 4), (1, 7))
    for change in (None, lambda extra: extra):
        model = Sharing(change)
        for got, expected in zip(replayed_states(model, xs), final_states(model, xs), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_value_that_the_model_computes_with_between_its_blocks_is_named():
    model = Sharing(lambda extra: 2.0 * extra + torch.ones(8))
    with pytest.raises(
        UnsupportedModelError,
        match=r"block 0 of Sharing returns, beside its hidden state, a value at \[1\] that the model's own code",
    ):
        verify(model, {"x": torch.randn(2, 5, 8)})


class Store(UserDict):
    """A mapping that is no dict."""


class InSlots:
    """A mapping whose content lies neither in a dict of its own nor in ``__dict__``."""

    __slots__ = ("content",)

    def __init__(self, **content):
        self.content = content

    def values(self):
        return self.content.values()

    def __len__(self):
        return len(self.content)

    def __setitem__(self, key, value):
        self.content[key] = value


class InQueue:
    """The same in a deque, which grows only."""

    def __init__(self, given):
        self.queue = deque([given])

    def values(self):
        return self.queue

    def __len__(self):
        return len(self.queue)

    def __setitem__(self, key, value):
        self.queue.append(value)

    def __call__(self):
        return self


class Writing(nn.Module):
    """Adds what it finds in a store that all blocks share, and writes into it: by place, or at its end."""

    def __init__(self, place, *, grows):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.place = place
        self.grows = grows

    def forward(self, x, store):
        found = sum((value.mean((1, 2), keepdim=True) for value in store.values()), torch.zeros(1, 1, 1))
        store[len(store) if self.grows else self.place] = x
        return x + self.up(x) + found


class WithStore(nn.Module):
    def __init__(self, kind, *, grows):
        super().__init__()
        self.blocks = nn.ModuleList([Writing(place, grows=grows) for place in range(3)])
        self.kind = kind

    def forward(self, x):
        store = self.kind(given=x[:, :1] * 0.5)
        for block in self.blocks:
            x = block(x, store)
        return x


@pytest.mark.parametrize("kind", [Store, dict, InSlots, InQueue])
@pytest.mark.parametrize("grows", [False, True])
def test_every_batch_and_every_model_has_objects_of_its_own(kind, grows):
    torch.manual_seed(0)
    model, xs = WithStore(kind, grows=grows), inputs((2, 5), (2, 5), (1, 3))
    for got, expected in zip(replayed_states(model, xs), final_states(model, xs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [Store, dict, InSlots, InQueue])
def test_a_fork_has_objects_of_its_own(kind):
    torch.manual_seed(0)
    dense, xs = WithStore(kind, grows=True), inputs((2, 5), (1, 3))
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        for block in pruned.blocks:
            block.up.weight.mul_(0.3)
    batches = [{"x": x} for x in xs]
    one = capture(dense, list(dense.blocks), batches, verify(dense, *batches))
    two = one.fork("other")
    for index in range(3):
        for batch in range(len(xs)):
            one.run(index, batch, dense.blocks[index], CPU, keep=True)
            two.run(index, batch, pruned.blocks[index], CPU, keep=True)
    for stream, model in ((one, dense), (two, pruned)):
        for batch, expected in enumerate(final_states(model, xs)):
            torch.testing.assert_close(stream.hidden[batch], expected)


class Remembering(nn.Module):
    """Gives something else when it is run again in the same pass."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x + self.runs * self.up(x)


class Forgetting(Between):
    def __init__(self):
        super().__init__(1.0)
        self.blocks = nn.ModuleList([Remembering(), Remembering()])

    def forward(self, x):
        for block in self.blocks:
            block.runs = 0
        return super().forward(x)


def test_a_block_that_differs_on_its_second_run_is_refused():
    model = Forgetting()
    with pytest.raises(UnsupportedModelError, match=r"\(block 0: relative error"):
        verify(model, {"x": torch.randn(2, 5, 8)})


class CountsItsBatch(nn.Module):
    """Returns the number of rows beside its hidden state, and takes it from the block before."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, rows=1):
        return x + rows * self.up(x), len(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([CountsItsBatch(), CountsItsBatch()])

    def forward(self, x):
        rows = 1
        for block in self.blocks:
            x, rows = block(x, rows)
        return x


def test_a_number_that_depends_on_the_batch_is_refused():
    model = Counting()
    alike = [{"x": torch.randn(2, 5, 8)}, {"x": torch.randn(2, 3, 8)}]
    verify(model, *alike)
    with pytest.raises(UnsupportedModelError, match=r"returned 3 at \[1\] for a calibration batch, and 2 for a short"):
        verify(model, alike[0], {"x": torch.randn(3, 3, 8)})


class ByKeyword(nn.Module):
    """Is called with something else before the hidden state."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, scale, x):
        return x + scale * self.up(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([ByKeyword(), ByKeyword(), ByKeyword()])

    def forward(self, x):
        scale = torch.full((1,), 0.5)
        for block in self.blocks:
            x = block(scale, x)
        return x


def test_the_hidden_state_is_found_wherever_it_is_passed():
    model, xs = Scaled(), inputs((2, 5), (1, 3))
    for got, expected in zip(replayed_states(model, xs), final_states(model, xs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        ({"input_ids": tokens(3, 50)}, ((1, 32), (1, 24))),
        ({"input_ids": tokens(3, 20)}, ((1, 20), (1, 20))),
    ],
)
def test_short_samples_are_cut_along_rows_and_tokens(batch, shapes):
    first, second = replay.probe_batches([batch])
    assert (tuple(first["input_ids"].shape), tuple(second["input_ids"].shape)) == shapes
    assert torch.equal(first["input_ids"][0], batch["input_ids"][0, : shapes[0][1]])
    assert torch.equal(second["input_ids"][0], batch["input_ids"][-1, : shapes[1][1]])


def test_text_that_images_belong_to_is_not_cut():
    batch = {"input_ids": tokens(2, 50), "pixel_values": torch.zeros(2, 3, 16, 16)}
    assert [tuple(part["input_ids"].shape) for part in replay.probe_batches([batch])] == [(1, 50), (1, 50)]
    patches = {"input_ids": tokens(2, 50), "pixel_values": torch.zeros(128, 12)}  # rows that are not the batch's
    assert replay.probe_batches([patches]) == [patches, patches]


def test_stacks_are_listed_as_they_run():
    model = llava()
    found = find_stacks(model)
    text = {"input_ids": tokens(1).clamp(min=4)}
    assert [stack.tower for stack in replay.in_running_order(model, found, text)] == ["text"]
    model = encoder_decoder("bart")
    order = replay.in_running_order(model, find_stacks(model)[::-1], pairs("bart"))
    assert [stack.tower for stack in order] == ["encoder", "decoder"]


def test_a_cache_in_a_config_is_neither_used_nor_lost():
    model = decoder("llama")
    model.config.use_cache = True
    stack = list(model.model.layers)
    replay.verify_replay(model, stack, [{"input_ids": tokens(2)}])
    assert model.config.use_cache is True


class Downsampling(nn.Module):
    """A stage that halves the length and doubles the width."""

    def __init__(self, width):
        super().__init__()
        self.merge = nn.Linear(2 * width, 2 * width)

    def forward(self, x):
        return self.merge(x.reshape(len(x), x.shape[1] // 2, 2 * x.shape[2]))


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Downsampling(8), Downsampling(16)])
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        self.norm(x)
        return x


def test_blocks_may_change_the_shape_of_the_hidden_state():
    model, xs = Stages(), inputs((2, 8), (3, 8), (1, 12))
    for got, expected in zip(replayed_states(model, xs), final_states(model, xs), strict=True):
        torch.testing.assert_close(got, expected)


class Codebooks(nn.Module):
    """Takes four rows for each sample, as models of audio tokens do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)])

    def forward(self, input_ids):
        x = self.embedding(input_ids.reshape(-1, 4, input_ids.shape[-1])).sum(1)
        for block in self.blocks:
            x = block(x)
        return x


def test_rows_that_belong_together_are_not_cut_apart():
    model = Codebooks()
    short, running = replay.short_samples(model, find_stacks(model), [{"input_ids": tokens(8, 40)}])
    assert [tuple(batch["input_ids"].shape) for batch in short] == [(8, 32), (8, 24)]
    assert [stack.name for stack in running] == ["blocks"]


def test_a_model_that_fails_on_the_data_is_told_in_one_sentence():
    model = Codebooks()
    with pytest.raises(UnsupportedModelError, match=r"^Codebooks cannot be run on the calibration data: .*shape"):
        replay.short_samples(model, find_stacks(model), [{"input_ids": tokens(3, 40)}])


class LeavesSomething(nn.Module):
    """A block that the model asks for something else afterwards."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.left = None

    def forward(self, x):
        self.left = self.up(x)
        return x + self.left


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([LeavesSomething(), LeavesSomething()])

    def forward(self, x):
        for block in self.blocks:
            block.left = None
            x = block(x)
        return x + self.blocks[0].left


def test_a_model_that_uses_what_its_blocks_leave_elsewhere_is_refused():
    model = Asking()
    with pytest.raises(UnsupportedModelError, match=r"^Asking fails where its blocks are not computed \(TypeError"):
        verify(model, {"x": torch.randn(2, 5, 8)})


def test_a_value_that_is_not_finite_is_told_as_such_where_blocks_hand_something_on():
    model = Sharing(lambda extra: extra)
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="outputs of the dense model's block 1 are not finite"):
        verify(model, {"x": torch.randn(2, 5, 8)})


class Uncopied(Store):
    def __deepcopy__(self, memo):
        raise TypeError("this one is unique")


def test_an_object_that_cannot_be_copied_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"given a Uncopied, which cannot be copied \(TypeError: this"):
        verify(WithStore(Uncopied, grows=False), {"x": torch.randn(2, 5, 8)})


class TwoOfOne(nn.Module):
    """Blocks are given two objects that share what is in them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([WritesOneReadsOther(place) for place in range(3)])

    def forward(self, x):
        shared = {}
        one, other = SimpleNamespace(inner=shared), SimpleNamespace(inner=shared)
        for block in self.blocks:
            x = block(x, one, other)
        return x


class WritesOneReadsOther(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.place = place

    def forward(self, x, one, other):
        one.inner[self.place] = x
        return x + self.up(other.inner[self.place])


def test_what_objects_of_a_batch_share_stays_shared():
    torch.manual_seed(0)
    model, xs = TwoOfOne(), inputs((2, 5), (1, 3))
    for got, expected in zip(replayed_states(model, xs), final_states(model, xs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("read", "fed"), [(24, 24), (40, 24), (20, 50)])
def test_a_decoder_is_fed_less_than_its_encoder_reads(read, fed):
    for sample in replay.probe_batches([{"input_ids": tokens(2, read), "decoder_input_ids": tokens(2, fed)}]):
        assert sample["input_ids"].shape[1] != sample["decoder_input_ids"].shape[1]
