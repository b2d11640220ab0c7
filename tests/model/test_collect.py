from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from halve.errors import CalibrationError, UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model import blocks, layers, replay
from halve.model.classify import BYPASSED, make_plan
from halve.model.collect import Collector
from halve.model.observe import observe
from halve.model.plan import Matrix
from halve.model.stacks import find_stack
from models import DECODERS, MIXTURES, Attention, decoder, tokens

CPU = torch.device("cpu")


def collect_first_block(model, batches, skip=(), spared=None):
    """Plan and statistics of block 0; in a list for them, whether the last matrix was left out of each batch."""
    name, stack = find_stack(model)
    members = list(stack)
    short = replay.probe_batches(batches)
    with blocks.eager_experts(model):
        behaviour = replay.verify_replay(model, members, short)
        observed = observe(model, members, [partial(blocks.run_model, model, batch) for batch in short])
        plan = make_plan(model, Pattern("2:4"), observed, skip)
        stream = blocks.capture(model, members, batches, behaviour)
        once = None if spared is None else set()
        full = [stream.run(0, batch, members[0], CPU) for batch in range(len(batches))]
        collector = Collector(members[0], plan.blocks[0], plan.of_block(0), CPU, once=once)
        with collector.watching():
            for batch in range(len(batches)):
                collector.start_batch(stream.valid[batch], shape=stream.hidden[batch].shape)
                output = stream.run(0, batch, members[0], CPU)
                if spared is not None:
                    spared.append(collector.end_batch())
                    assert torch.equal(output, full[batch]) != spared[-1]
    assert plan.blocks[0] == f"{name}.0"
    return plan, collector.finish()


def inputs_of_linears(model, plan, batches):
    """The oracle: every plain matrix's inputs in the model's own forward, in float64."""
    seen = {}
    hooks = []
    for matrix in plan.of_block(0):
        if matrix.expert is None:
            module = model.get_submodule(matrix.parameter.rpartition(".")[0])

            def note(_module, args, name=matrix.name):
                seen.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))

            hooks.append(module.register_forward_pre_hook(note))
    for batch in batches:
        blocks.run_model(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", DECODERS)
def test_gram_equals_the_float64_reference(family):
    model = decoder(family)
    batches = [{"input_ids": tokens(4, seed=1)}, {"input_ids": tokens(3, seed=2)}]
    plan, statistics = collect_first_block(model, batches)
    for name, x in inputs_of_linears(model, plan, batches).items():
        expected = x.T @ x / len(x)
        got = statistics[name]
        assert got.tokens == len(x) == 7 * 24
        torch.testing.assert_close(got.gram.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", DECODERS)
def test_the_last_matrix_is_spared_in_batches_like_one_that_called_each_once(family):
    model, spared = decoder(family), []
    batches = [{"input_ids": tokens(count, seed=count)} for count in (4, 3, 4, 3, 2)]
    _, expected = collect_first_block(model, batches)
    plan, statistics = collect_first_block(model, batches, spared=spared)
    whole = not any(matrix.routed or matrix.repeated for matrix in plan.of_block(0))
    assert spared == [False, False, whole, whole, False]
    assert whole or family in MIXTURES
    assert statistics.keys() == expected.keys()
    for name, each in statistics.items():
        assert (each is None) == (expected[name] is None)
        assert each is None or torch.equal(each.gram, expected[name].gram)


class Chunked(nn.Module):
    """Multiplies with its last layer once for every two sequences."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + torch.cat([self.down(part) for part in self.up(x).relu().split(2)])


def test_a_layer_that_longer_batches_call_more_often_is_not_spared():
    block, once = Chunked(), set()
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    plan = make_plan(model, Pattern("2:4"), observe(model, [block], [lambda: block(torch.randn(1, 5, 8))]))
    sizes = (2, 6, 2, 6)
    collector = Collector(block, plan.blocks[0], plan.of_block(0), CPU, once=once)
    spared = []
    with collector.watching():
        for rows in sizes:
            x = torch.randn(rows, 5, 8)
            collector.start_batch(None, shape=x.shape)
            block(x)
            spared.append(collector.end_batch())
    assert spared == [False, False, True, False]
    assert once == {torch.Size((2, 5, 8))}
    assert {each.tokens for each in collector.finish().values()} == {sum(sizes) * 5}
    assert "forward" not in block.down.__dict__


def test_a_layer_that_is_called_again_after_all_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.again = nn.Linear(8, 16), nn.Linear(16, 8), False

        def forward(self, x):
            once = self.down(self.up(x))
            return x + (self.down(self.up(once)) if self.again else once)

    block, x = Fickle(), torch.randn(2, 5, 8)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    plan = make_plan(model, Pattern("2:4"), observe(model, [block], [lambda: block(x)]))
    collector = Collector(block, plan.blocks[0], plan.of_block(0), CPU, once=set())
    with collector.watching():
        for block.again in (False, True):
            collector.start_batch(None, shape=x.shape)
            block(x)
            if not block.again:
                assert not collector.end_batch()
        with pytest.raises(CalibrationError, match=r"layers\.0\.up\.weight was called 2 times in one batch"):
            collector.end_batch()


def test_matrices_with_the_same_input_share_their_statistics():
    _, statistics = collect_first_block(decoder("llama"), [{"input_ids": tokens()}, {"input_ids": tokens(seed=1)}])
    by_leaf = {name.split(".")[-2]: value for name, value in statistics.items()}
    assert by_leaf["q_proj"] is by_leaf["k_proj"] is by_leaf["v_proj"]
    assert by_leaf["gate_proj"] is by_leaf["up_proj"]
    assert len({id(value) for value in by_leaf.values()}) == 4


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_get_the_tokens_routed_to_them(family):
    model = decoder(family)
    batches = [{"input_ids": tokens(4, seed=1)}]
    plan, statistics = collect_first_block(model, batches)
    layer = find_stack(model)[1][0]
    experts = layer.mlp.experts
    received = {}
    hook = experts.register_forward_pre_hook(lambda _m, args: received.update(x=args[0], index=args[1]))
    with blocks.eager_experts(model):
        blocks.run_model(model, batches[0])
    hook.remove()
    counted = 0
    for matrix in plan.of_block(0):
        if matrix.expert is None:
            continue
        rows = (received["index"] == matrix.expert).any(-1)
        x = received["x"][rows].double()
        if matrix.parameter.endswith("down_proj"):
            gate, up = (x @ experts.gate_up_proj[matrix.expert].double().T).chunk(2, dim=-1)
            x = experts.act_fn(gate) * up
        got = statistics[matrix.name]
        counted += got.tokens
        torch.testing.assert_close(got.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert counted == 2 * 2 * 96  # two matrices, two experts a token


def test_an_expert_that_no_token_reaches_has_no_statistics():
    # One token reaches two of four experts.
    plan, statistics = collect_first_block(decoder("mixtral"), [{"input_ids": tokens(1, length=1)}])
    experts = [statistics[m.name] for m in plan.of_block(0) if m.expert is not None]
    assert sum(value is None for value in experts) == 4
    assert [value.tokens for value in experts if value is not None] == [1] * 4


def test_padding_is_not_counted():
    model = decoder("llama")
    ids = tokens(2, length=24)
    padded = torch.cat([ids, torch.zeros(2, 8, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 8, dtype=torch.long)], dim=1)
    _, plain = collect_first_block(model, [{"input_ids": ids}])
    _, masked = collect_first_block(model, [{"input_ids": padded, "attention_mask": mask}])
    for name, value in plain.items():
        assert masked[name].tokens == value.tokens == 48
        torch.testing.assert_close(masked[name].gram, value.gram, rtol=1e-5, atol=1e-6)


def test_padding_with_experts_is_refused():
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[0, 20:] = 0
    with pytest.raises(CalibrationError, match="pack the data without padding"):
        collect_first_block(decoder("mixtral"), [{"input_ids": tokens(4), "attention_mask": mask}])


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_weight_used_without_calling_its_layer_stays_dense():
    plan, statistics = collect_first_block(Stack(), [{"x": torch.randn(2, 5, 8)}])
    assert {entry.reason for entry in plan.excluded if "out_proj" in entry.name} == {BYPASSED}
    assert list(statistics) == ["layers.0.up.weight"]


def test_a_matrix_that_was_planned_and_never_called_is_an_error_not_zeros():
    model = Stack()
    plan = make_plan(model, Pattern("2:4"))
    collector = Collector(model.layers[0], plan.blocks[0], plan.of_block(0), CPU)
    with collector.watching():
        collector.start_batch(None)
        model(torch.randn(2, 5, 8))
    with pytest.raises(UnsupportedModelError, match=r"out_proj\.weight was never called"):
        collector.finish()


class CalledTwice(nn.Module):
    """Calls one layer on the input that another shares, and once more on something of its own."""

    def __init__(self):
        super().__init__()
        self.key, self.value = (nn.Linear(8, 8) for _ in range(2))
        self.positions = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return x + self.value(x) + self.key(x) + self.key(self.positions).sum(0)


@pytest.mark.parametrize("paired", [False, True])
def test_a_layer_that_is_called_several_times_has_statistics_of_its_own(paired):
    """The oracle sums up both calls of one layer and the one call of the other by hand."""
    model = nn.Module()
    model.layers = nn.ModuleList([CalledTwice()])
    block, x, dense = model.layers[0], torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    plan = make_plan(model, Pattern("2:4"), observe(model, [block], [lambda: block(x)]))
    assert {matrix.name: matrix.repeated for matrix in plan.matrices} == {
        "layers.0.key.weight": True,
        "layers.0.value.weight": False,
    }
    collector = Collector(block, plan.blocks[0], plan.of_block(0), CPU)
    with collector.watching():
        if paired:
            collector.start_batch(None, dense=True)
            block(dense)
        collector.start_batch(None)
        block(x)
    found = collector.finish()
    rows = {
        "value": (x.flatten(0, 1), dense.flatten(0, 1)),
        "key": tuple(torch.cat([each.flatten(0, 1), block.positions]) for each in (x, dense)),
    }
    for name, (ours, theirs) in rows.items():
        statistics = found[f"layers.0.{name}.weight"]
        torch.testing.assert_close(statistics.gram, ours.T @ ours / len(ours))
        if paired:
            torch.testing.assert_close(statistics.cross, theirs.T @ ours / len(ours))


class TransposedExperts(nn.Module):
    """Experts stored as (E, d_in, d_out), all multiplied at once or one after the other."""

    def __init__(self, batched):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8) / 4)
        self.batched = batched

    def forward(self, x):
        if self.batched:
            return x + torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.w).sum(0).view_as(x)
        return x + sum(x @ self.w[e] for e in range(3))


@pytest.mark.parametrize("batched", [True, False])
def test_transposed_square_experts_are_told_from_straight_ones(batched):
    model = Stack()
    model.layers = nn.ModuleList([TransposedExperts(batched), TransposedExperts(batched)])
    x = torch.randn(2, 5, 8)
    plan, statistics = collect_first_block(model, [{"x": x}])
    assert {matrix.layout for matrix in plan.matrices} == {"in_out"}
    flat = x.flatten(0, 1)
    for matrix in plan.of_block(0):
        torch.testing.assert_close(statistics[matrix.name].gram, flat.T @ flat / 10)


class ListedExperts(nn.Module):
    """Experts in a module list, each called with the rows routed to it, be there none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        which = (x.sum(-1) > 0).long()
        parts = [expert(x[which == index]) for index, expert in enumerate(self.experts)]
        out = x.clone()
        for index, part in enumerate(parts):
            out[which == index] = part
        return out


def test_an_expert_called_with_no_rows_counts_as_unseen():
    model = Stack()
    model.layers = nn.ModuleList([ListedExperts(), ListedExperts()])
    _, statistics = collect_first_block(model, [{"x": torch.randn(2, 50, 8)}])
    seen = [value.tokens if value else 0 for value in statistics.values()]
    assert seen[0] + seen[1] == 100
    assert seen[2] == 0


class Branches(nn.Module):
    """A block with two matrices that share their input, and one behind them."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.behind = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.behind(torch.tanh(self.one(x)) * torch.tanh(self.two(x)))


def collector_of(model, *, halves=False):
    members = list(model.layers)
    observed = observe(model, members, [lambda: model(torch.randn(2, 5, 8))])
    plan = make_plan(model, Pattern("2:4"), observed, ())
    return Collector(members[0], plan.blocks[0], plan.of_block(0), CPU, halves=halves, once=set())


def branches():
    model = Stack()
    model.layers = nn.ModuleList([Branches(), Branches()])
    return model


def inputs_by_leaf(block, x):
    x = x.double().flatten(0, -2)
    one, two = block.one.weight.double(), block.two.weight.double()
    inner = torch.tanh(x @ one.T + block.one.bias.double()) * torch.tanh(x @ two.T + block.two.bias.double())
    return {"one": x, "two": x, "behind": inner}


def two_streams(batches=3):
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(2, 5, 8, generator=generator) for _ in range(batches)]
    return dense, [x + 0.5 * torch.randn(x.shape, generator=generator) for x in dense]


@torch.no_grad()
def collect_both(block, collector, dense, pruned, valid=None):
    with collector.watching():
        for x, noisy in zip(dense, pruned, strict=True):
            collector.start_batch(valid, dense=True, shape=x.shape)
            block(x)
            assert not collector.end_batch()
            collector.start_batch(valid, shape=noisy.shape)
            block(noisy)
            collector.end_batch()
    return collector.finish()


@pytest.mark.parametrize("masked", [False, True])
def test_dense_batches_are_paired_with_those_of_the_pruned_model(masked):
    model = branches()
    block, collector = model.layers[0], collector_of(model)
    dense, pruned = two_streams()
    valid = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        valid[0, 1:3] = False
    statistics = collect_both(block, collector, dense, pruned, valid if masked else None)
    kept = valid.flatten().repeat(len(dense))
    mine, theirs = inputs_by_leaf(block, torch.cat(pruned)), inputs_by_leaf(block, torch.cat(dense))
    for leaf, noisy in mine.items():
        got = statistics[f"layers.0.{leaf}.weight"]
        noisy, x = noisy[kept], theirs[leaf][kept]  # noqa: PLW2901 - only those that count
        assert got.tokens == len(noisy) == (24 if masked else 30)
        torch.testing.assert_close(got.gram.double(), noisy.T @ noisy / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.cross.double(), x.T @ noisy / len(x), rtol=1e-4, atol=1e-6)
        assert float((got.cross - got.gram).abs().max()) > 0.01
        assert got.halves is None
    assert statistics["layers.0.one.weight"] is statistics["layers.0.two.weight"]


def test_batches_without_dense_ones_are_as_ever():
    model = branches()
    block, collector = model.layers[0], collector_of(model)
    dense, pruned = two_streams()
    with_dense = collect_both(block, collector, dense, pruned)
    alone = collector_of(model)
    with torch.no_grad(), alone.watching():
        for noisy in pruned:
            alone.start_batch(None)
            block(noisy)
    for name, value in alone.finish().items():
        assert value.cross is None
        assert value.halves is None
        assert torch.equal(value.gram, with_dense[name].gram)


def test_halves_of_every_batch_reach_the_statistics():
    model = branches()
    block, collector = model.layers[0], collector_of(model, halves=True)
    dense, pruned = two_streams()
    statistics = collect_both(block, collector, dense, pruned)
    for leaf in ("one", "behind"):
        firsts = torch.cat([inputs_by_leaf(block, x)[leaf][:5] for x in pruned])
        seconds = torch.cat([inputs_by_leaf(block, x)[leaf][5:] for x in pruned])
        got = statistics[f"layers.0.{leaf}.weight"]
        for half, x in zip(got.halves, (firsts, seconds), strict=True):
            torch.testing.assert_close(half.double(), x.T @ x / 15, rtol=1e-4, atol=1e-6)
        assert got.cross is not None


class Pictures(nn.Module):
    """A block of convolutions: two share their input and their geometry, a third the input alone; one has groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, groups=2)

    def forward(self, x):
        return self.grouped(self.a(x) + self.b(x) + self.wide(x))


def unfolded(x, layer):
    """Float64 patches (tokens, taps * channels) as PyTorch's own ``unfold`` makes them."""
    columns = nn.functional.unfold(x.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("paired", [False, True])
def test_patches_are_what_convolutions_are_judged_by(paired, monkeypatch):
    monkeypatch.setattr(layers, "_PATCHES", 8 * 9 * 36 * 2)  # two samples at a time
    torch.manual_seed(0)
    model = nn.Sequential(Pictures()).eval()
    block, batches = model[0], [torch.randn(3, 8, 6, 6) for _ in range(2)]
    dense = [batch + 0.1 * torch.randn_like(batch) for batch in batches]
    seen = observe(model, [block], [lambda: model(batches[0])])
    found = nn.Module()
    found.layers = model
    plan = make_plan(found, Pattern("2:4"), replace(seen, called={f"layers.{n}": c for n, c in seen.called.items()}))
    collector = Collector(block, "layers.0", plan.matrices, CPU, halves=True, once=set())
    inputs = {"a": [], "wide": [], "grouped": []}
    with collector.watching(), torch.no_grad():
        for batch, other in zip(batches, dense, strict=True):
            pair = []
            for x, first in ((other, True), (batch, False)) if paired else ((batch, False),):
                collector.start_batch(None, dense=first, shape=x.shape)
                block(x)
                assert not collector.end_batch()
                pair.append({"a": x, "wide": x, "grouped": block.a(x) + block.b(x) + block.wide(x)})
            for name, parts in inputs.items():
                parts.append([each[name] for each in pair])
    statistics = collector.finish()
    assert statistics["layers.0.a.weight"] is statistics["layers.0.b.weight"]
    assert statistics["layers.0.a.weight"] is not statistics["layers.0.wide.weight"]
    for name, parts in inputs.items():
        layer = block.get_submodule(name)
        for group in range(layer.groups):
            matrix = f"layers.0.{name}.weight" + (f"[{group}]" if layer.groups > 1 else "")
            sides = [
                torch.cat([unfolded(x.chunk(layer.groups, 1)[group], layer) for x in side])
                for side in zip(*parts, strict=True)
            ]
            ours, tokens_seen = sides[-1], len(sides[-1])
            stats = statistics[matrix]
            assert stats.tokens == tokens_seen
            torch.testing.assert_close(stats.gram, (ours.T @ ours / tokens_seen).float())
            torch.testing.assert_close(sum(stats.halves) / 2, stats.gram)
            if paired:
                torch.testing.assert_close(stats.cross, (sides[0].T @ ours / tokens_seen).float())


def test_padding_before_a_convolution_is_refused():
    block = nn.Sequential(nn.Conv2d(8, 8, 3))
    matrix = Matrix(name="b.0.weight", parameter="b.0.weight", block=0, d_out=8, d_in=72, layout="conv", taps=9)
    collector = Collector(block, "b", [matrix], CPU)
    collector.start_batch(torch.tensor([[True, False]]))
    with collector.watching(), pytest.raises(CalibrationError, match=r"the patches of a convolution .* mix padding"):
        block(torch.randn(1, 8, 5, 5))


class InPlace(nn.Module):
    """Gives one tensor to two layers, and writes into it in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = x.clone()
        a = self.first(h)
        return a + self.second(h.relu_())


def test_what_was_written_into_since_is_not_the_same_input():
    block = InPlace()
    matrices = [
        Matrix(name=f"b.{name}.weight", parameter=f"b.{name}.weight", block=0, d_out=8, d_in=8)
        for name in ("first", "second")
    ]
    collector = Collector(block, "b", matrices, CPU)
    dense, x = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    with collector.watching(), torch.no_grad():
        for given in (dense, x):
            collector.start_batch(None, dense=given is dense)
            block(given)
    statistics = collector.finish()
    for name, change in (("first", torch.clone), ("second", torch.relu)):
        ours, theirs = (change(each).flatten(0, 1).double() for each in (x, dense))
        torch.testing.assert_close(statistics[f"b.{name}.weight"].gram, (ours.T @ ours / 15).float())
        torch.testing.assert_close(statistics[f"b.{name}.weight"].cross, (theirs.T @ ours / 15).float())
