import pytest
import torch

from halve.errors import CalibrationError, InputError
from halve.maths.gram import GramAccumulator
from layer_oracles import correlated_inputs


def accumulate(*batches, d_in=None, name="layer"):
    accumulator = GramAccumulator(d_in or batches[0].shape[-1], name=name)
    for batch in batches:
        accumulator.add(batch)
    return accumulator


def reference(x):
    x = x.reshape(-1, x.shape[-1]).double()
    return x.mT @ x / len(x)


def worst(gram, expected):
    """Largest error relative to the scales of the two features."""
    scales = expected.diagonal().sqrt()
    return float(((gram.double() - expected).abs() / (scales * scales[:, None])).max())


@pytest.mark.parametrize("d_in", [1, 255, 256, 257, 600, 1100, 2100])
def test_every_width_is_summed_whole_and_symmetric(d_in):
    """The upper triangle alone is computed, in panels; several of them, and more columns than are mirrored at once."""
    x = torch.randn(50, d_in, generator=torch.Generator().manual_seed(0))
    accumulator = GramAccumulator(d_in, halves=True)
    for part in x.split(20):
        accumulator.add(part)
    early, found = accumulator.finish(), accumulator.finish(last=True)
    expected = (x.double().mT @ x.double() / 50).float()
    torch.testing.assert_close(found.gram, expected, rtol=1e-5, atol=1e-5)
    for gram in (found.gram, *found.halves):
        assert torch.equal(gram, gram.mT)
    assert torch.equal(early.gram, found.gram)
    torch.testing.assert_close((found.halves[0] + found.halves[1]) / 2, expected, rtol=1e-4, atol=1e-4)


def test_sums_of_two_parts_are_added():
    d_in = 300
    x = torch.randn(64, d_in, generator=torch.Generator().manual_seed(1))
    whole, first, second = (GramAccumulator(d_in) for _ in range(3))
    whole.add(x)
    first.add(x[:40])
    second.add(x[40:])
    kept = {name: tensor.clone() for name, tensor in second.tensors.items()}
    first.absorb(GramAccumulator.of("other", d_in, second.counts, kept))
    assert first.tokens == 64
    torch.testing.assert_close(first.finish().gram, whole.finish().gram, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="are not of the same kind"):
        first.absorb(GramAccumulator(d_in, halves=True))
    with pytest.raises(InputError, match=r"must be \(8, 8\) float32"):
        GramAccumulator.of("other", 8, [3], kept)
    second.finish(last=True)
    with pytest.raises(InputError, match="finished"):
        second.absorb(first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_matches_float64_for_every_dtype(dtype):
    x = correlated_inputs(3000, 24, seed=0).to(dtype).reshape(3, 1000, 24)
    statistics = accumulate(x).finish()
    assert statistics.tokens == 3000
    assert statistics.gram.dtype == torch.float32
    assert torch.equal(statistics.gram, statistics.gram.mT)
    assert worst(statistics.gram, reference(x)) < 1e-6


def test_large_half_precision_inputs_do_not_overflow():
    x = (torch.sign(torch.randn(4096, 16, generator=torch.Generator().manual_seed(1))) * 3e4).half()
    assert worst(accumulate(x).finish().gram, reference(x)) < 1e-5


def test_rounding_of_the_product_cannot_make_the_gram_asymmetric():
    accumulator = accumulate(torch.ones(10, 4))
    accumulator._sums[0][0, 1] += 1.0
    gram = accumulator.finish().gram
    assert torch.equal(gram, gram.mT)
    assert float(gram[0, 1]) == pytest.approx(1.05)


def test_many_batches_and_long_batches_stay_accurate():
    x = correlated_inputs(20_000, 8, seed=2)
    assert worst(accumulate(x.float()).finish().gram, reference(x)) < 1e-5
    assert worst(accumulate(*x.float().split(37)).finish().gram, reference(x)) < 1e-5


def test_autocast_and_reduced_precision_products_are_ignored():
    x = correlated_inputs(500, 64, seed=3).float()
    accumulator = GramAccumulator(64)
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulator.add(x)
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert worst(accumulator.finish().gram, reference(x)) < 1e-6


def test_finish_may_be_called_in_between_and_leaves_no_trace():
    x = correlated_inputs(300, 8, seed=5)
    accumulator = accumulate(x[:100])
    early = accumulator.finish().gram.clone()
    accumulator.add(x[100:])
    assert worst(early, reference(x[:100])) < 1e-6
    assert worst(accumulator.finish().gram, reference(x)) < 1e-6


def test_the_last_statistics_have_the_memory_of_the_sums():
    x = correlated_inputs(100, 8, seed=5)
    for make in (accumulate, by_halves):
        accumulator, places = make(x), set()
        places = {total.data_ptr() for total in accumulator._sums}
        expected, found = accumulator.finish(), accumulator.finish(last=True)
        assert torch.equal(found.gram, expected.gram)
        kept = {part.data_ptr() for part in (found.gram, *(found.halves or ()))}
        assert places <= kept
        with pytest.raises(InputError, match="are finished: begin with another accumulator"):
            accumulator.add(x)


def test_large_sums_are_made_symmetric_square_by_square(monkeypatch):
    x = correlated_inputs(300, 37, seed=5)
    whole = accumulate(x).finish()
    monkeypatch.setattr("halve.maths.gram._SIDE", 10)
    parts = accumulate(x).finish()
    assert torch.equal(parts.gram, parts.gram.mT)
    assert torch.equal(parts.gram, whole.gram)


def test_works_across_inference_mode():
    x = correlated_inputs(50, 8, seed=6)
    with torch.inference_mode():
        accumulator = accumulate(x)
        early = accumulator.finish().gram
    accumulator.add(x)
    early.add_(1.0)
    assert accumulator.finish().tokens == 100


def test_inputs_that_require_gradients_leave_no_graph():
    x = torch.randn(10, 4, requires_grad=True)
    assert not accumulate(x).finish().gram.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_named(bad):
    first, second = torch.ones(2, 5, 4), torch.ones(2, 5, 4)
    second[1, 2, 3] = bad
    second[1, 4, 0] = bad
    accumulator = accumulate(first, name="layers.3.mlp")
    with pytest.raises(CalibrationError, match=r"layers\.3\.mlp .* token 17\b"):
        accumulator.add(second)
    assert torch.equal(accumulator.finish().gram, torch.ones(4, 4))


def test_finite_inputs_with_an_overflowing_sum_are_accepted():
    x = torch.full((4, 2), 3e38)
    accumulator = GramAccumulator(2, name="big")
    accumulator.add(x)
    with pytest.raises(CalibrationError, match=r"big overflowed float32"):
        accumulator.finish()


def test_nothing_seen_is_an_error():
    with pytest.raises(CalibrationError, match=r"experts\.7 saw no calibration token"):
        GramAccumulator(4, name="experts.7").finish()
    with pytest.raises(CalibrationError, match="no calibration token"):
        accumulate(torch.empty(0, 4)).finish()


@pytest.mark.parametrize("x", [torch.ones(3, 5), torch.ones(3, 4, dtype=torch.int64), torch.tensor(1.0)])
def test_wrong_inputs_are_refused(x):
    with pytest.raises(InputError, match="inputs of here must be floating point with last dimension 4"):
        GramAccumulator(4, name="here").add(x)


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="d_in of layer must be at least 1, got 0"):
        GramAccumulator(0)


def by_halves(*batches):
    accumulator = GramAccumulator(batches[0].shape[-1], halves=True)
    for batch in batches:
        accumulator.add(batch)
    return accumulator


def noisy_twin(x):
    return x + 0.3 * x.roll(1, dims=-1).abs()


@pytest.mark.parametrize("lengths", [(100, 100), (31, 7, 2), (1, 40), (9001, 20_000)])
def test_halves_are_those_of_every_batch(lengths):
    x = correlated_inputs(sum(lengths), 8, seed=7).float()
    batches = x.split(lengths)
    statistics = by_halves(*batches).finish()
    taken = ([], [])
    for batch in batches:  # an odd token goes to the half that has fewer
        counts = [sum(map(len, half)) for half in taken]
        middle = len(batch) // 2 + (len(batch) % 2 if counts[0] <= counts[1] else 0)
        taken[0].append(batch[:middle])
        taken[1].append(batch[middle:])
    parts = tuple(map(torch.cat, taken))
    for half, part in zip(statistics.halves, parts, strict=True):
        assert worst(half, reference(part)) < 1e-5
        assert torch.equal(half, half.mT)
    mean = sum(len(part) * half.double() for half, part in zip(statistics.halves, parts, strict=True)) / len(x)
    assert worst(statistics.gram, mean) < 1e-6
    assert worst(statistics.gram, reference(x)) < 1e-5
    assert statistics.tokens == len(x)


def test_a_batch_of_sequences_is_halved_by_its_sequences():
    x = correlated_inputs(4 * 10, 8, seed=8).reshape(4, 10, 8)
    first, second = by_halves(x).finish().halves
    assert worst(first, reference(x[:2])) < 1e-6
    assert worst(second, reference(x[2:])) < 1e-6


def test_an_empty_half_counts_as_no_halves():
    x = correlated_inputs(1, 8, seed=9)
    alone = by_halves(x).finish()
    assert alone.halves is None
    assert alone.tokens == 1
    assert worst(alone.gram, reference(x)) < 1e-6
    assert by_halves(x, x).finish().halves is not None
    assert accumulate(x).finish().halves is None


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_is_of_the_dense_inputs_by_the_pruned_ones(halves, dtype):
    x = correlated_inputs(20_000, 8, seed=10)
    dense, pruned = x.to(dtype), noisy_twin(x).to(dtype)
    accumulator = GramAccumulator(8, halves=halves)
    for start in (0, 37, 9000):
        stop = {0: 37, 37: 9000, 9000: 20_000}[start]
        accumulator.add(pruned[start:stop].reshape(1, -1, 8), dense[start:stop].reshape(1, -1, 8))
    statistics = accumulator.finish()
    expected = dense.double().mT @ pruned.double() / 20_000
    scales = dense.double().square().mean(0).sqrt()[:, None] * pruned.double().square().mean(0).sqrt()
    assert float(((statistics.cross.double() - expected).abs() / scales).max()) < 1e-5
    assert float(((expected - expected.mT).abs() / scales).max()) > 1e-2  # so that a transposed one would be seen
    assert worst(statistics.gram, reference(pruned)) < 1e-5
    assert accumulate(pruned).finish().cross is None


def test_dense_inputs_that_are_not_finite_are_named():
    x = torch.ones(5, 4)
    dense = x.clone()
    dense[2, 1] = float("nan")
    accumulator = GramAccumulator(4, name="layers.3.mlp")
    with pytest.raises(
        CalibrationError, match=r"layers\.3\.mlp have NaN or infinity, first at token 2 of those summed together"
    ):
        accumulator.add(x, dense)


def test_single_tokens_reach_both_halves():
    x = correlated_inputs(9, 8, seed=5).float()
    accumulator = GramAccumulator(8, halves=True)
    for token in x:
        accumulator.add(token)
    first, second = accumulator.finish().halves
    torch.testing.assert_close(first, x[::2].mT @ x[::2] / 5)
    torch.testing.assert_close(second, x[1::2].mT @ x[1::2] / 4)


def test_statistics_move_as_a_whole():
    accumulator = GramAccumulator(8, halves=True)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    accumulator.add(x, 2 * x)
    found = accumulator.finish()
    assert found.to(torch.device("cpu")).gram is found.gram
    moved = found.to(torch.device("meta"))
    assert {each.device.type for each in (moved.gram, *moved.halves, moved.cross)} == {"meta"}
    assert moved.tokens == 6
    single = GramAccumulator(8)
    single.add(x)
    assert single.finish().to(torch.device("meta")).halves is None
