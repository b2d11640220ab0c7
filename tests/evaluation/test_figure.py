"""A perplexity as a figure: how it was measured, and how far it is from another."""

import json
import math
from dataclasses import replace

import pytest
import torch

from halve.errors import InputError
from halve.evaluation.figure import Perplexity, measured_as, paired_difference, said_difference
from halve.evaluation.perplexity import perplexity
from halve.text.tokens import TokenSet, hash_ids
from models import decoder, tokens


def figure(window_nll, **settings):
    nll = sum(window_nll) / len(window_nll)
    of = {"windows": len(window_nll), "seq_len": 16, "dtype": "float32", "source": "a.txt", "tokens_sha256": "0"}
    of |= {"bos": "each", "versions": {"halve": "1"}, "seconds": 1.0} | settings
    return Perplexity(value=math.exp(nll), nll=nll, window_nll=tuple(window_nll), **of)


@pytest.mark.parametrize("count", [2, 3, 200])
def test_the_paired_error_is_that_of_the_differences(count):
    torch.manual_seed(count)
    hard = 3 * torch.rand(count, dtype=torch.float64)  # what both models find hard
    before, after = hard, hard + 0.1 + 0.01 * torch.randn(count, dtype=torch.float64)
    difference, stderr = figure(after.tolist()).minus(figure(before.tolist()))
    assert difference == pytest.approx((after - before).mean().item())
    assert stderr == pytest.approx((after - before).std().item() / math.sqrt(count))
    if count > 100:
        unpaired = math.hypot(before.std().item(), after.std().item()) / math.sqrt(count)
        assert stderr < 0.02 * unpaired
    assert figure(before.tolist()).minus(figure(after.tolist())) == pytest.approx((-difference, stderr))


def test_the_error_covers_what_other_windows_would_have_said():
    """Of 400 samples of windows, the difference lies within two errors of the truth in about 95 of 100."""
    torch.manual_seed(0)
    found = 0
    for _ in range(400):
        before = torch.rand(50, dtype=torch.float64)
        after = before + 0.3 + 0.2 * torch.randn(50, dtype=torch.float64)
        difference, stderr = paired_difference(after.tolist(), before.tolist())
        found += abs(difference - 0.3) < 2 * stderr
    assert 0.91 < found / 400 < 0.985


def test_one_window_has_no_error():
    assert figure([2.0]).minus(figure([1.5])) == (0.5, None)
    assert said_difference(0.5, None) == "+0.5000"
    assert said_difference(-0.5, 0.01234) == "-0.5000 ± 0.0123"


@pytest.mark.parametrize(
    "other", [{"tokens_sha256": "1"}, {"seq_len": 8}, {"bos": "never"}, {"window_nll": ()}, {"window_nll": (1.0,)}]
)
def test_other_windows_are_not_compared(other):
    first = figure([1.0, 2.0])
    second = replace(first, **other)
    assert not second.pairs_with(first)
    with pytest.raises(InputError, match="are of other tokens or windows, so they cannot be compared: measure both"):
        second.minus(first)
    assert "log_difference" not in second.as_json(first)


def test_json_has_all_that_a_figure_needs():
    first, second = figure([1.0, 2.0]), figure([1.25, 2.5 + 1e-9])
    content = json.loads(json.dumps(second.as_json(first)))
    assert content["window_nll"] == [1.25, 2.5]
    assert (content["log_difference"], content["log_difference_stderr"]) == pytest.approx((0.375, 0.125))
    assert {"seq_len", "bos", "dtype", "versions", "tokens_sha256", "value", "nll"} <= content.keys()
    assert "log_difference" not in first.as_json()
    assert replace(first, value=math.inf).as_json()["value"] is None


def test_how_it_was_measured_is_said():
    assert measured_as(1, 64, "each", "bfloat16") == "1 window of 64 tokens, BOS in each, bfloat16"
    assert measured_as(3, 64, "once", "float32") == "3 windows of 64 tokens, BOS in the first alone, float32"
    assert measured_as(3, 64, "none", "float32") == "3 windows of 64 tokens, no BOS, float32"
    assert measured_as(3, 64, "", "float32") == "3 windows of 64 tokens, float32"


def test_two_models_on_the_same_windows():
    ids = tokens(6, 24, 0)
    data = TokenSet(ids, "random", hash_ids(ids), 1)
    found = [perplexity(decoder("llama", seed=seed), data, forward_dtype="float32") for seed in (0, 1)]
    difference, stderr = found[1].minus(found[0])
    assert difference == pytest.approx(math.log(found[1].value / found[0].value), rel=1e-6)
    assert stderr > 0.0
    assert found[0].minus(found[0]) == (0.0, 0.0)
