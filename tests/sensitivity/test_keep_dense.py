"""`--keep-dense`, as a user meets it: what stays dense, on record, resumed, streamed, and refused."""

import copy
import json

import pytest
import torch
from torch import nn

import halve
from halve import pruning, whole_model
from halve.errors import InputError, ResumeMismatchError
from halve.maths.pattern import Pattern
from halve.planner.where_faster import WhereFaster
from halve.sensitivity import keep_dense
from halve.sensitivity.keep_dense import KeepDense
from models import OF_ONE_RUN, decoder, encoder_decoder, pairs, tokens

PATTERN = Pattern("2:4")
FAST = {"method": "wanda", "refit": "none", "samples": 4, "seq_len": 16}


def prune(model, out=None, **changes):
    return halve.prune(model, out, calibration=tokens(4, 16), **{"method": "wanda", "refit": "none", **changes})


def weights_of(model, names):
    return sum(model.get_parameter(name).numel() for name in names)


def test_what_costs_most_stays_dense_and_is_on_record(tmp_path):
    dense = decoder("llama").to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    pruned = prune(dense, tmp_path / "out", keep_dense="20%")
    record = json.loads((tmp_path / "out" / "halve.json").read_text())["keep_dense"]
    assert record["amount"] == "20%"
    assert record["tokens"] == 512
    kept, others = record["kept"], record["pruned"]
    whole = weights_of(pruned.model, {**kept, **others})
    assert 0.15 * whole < weights_of(pruned.model, kept) <= 0.2 * whole
    costs = {name: damage / before[name].numel() for name, damage in {**kept, **others}.items()}
    left = 0.2 * whole - weights_of(pruned.model, kept)
    cheapest = min(costs[name] for name in kept)
    assert all(costs[name] <= cheapest or before[name].numel() > left for name in others)
    for name in kept:
        assert torch.equal(pruned.model.get_parameter(name), before[name])
    assert all(PATTERN.satisfied_by(pruned.model.get_parameter(name)) for name in others)
    assert {matrix.parameter for matrix in pruned.report.matrices} == set(others)
    reasons = {entry.name: entry.reason for entry in pruned.report.excluded}
    assert {reasons[name] for name in kept} == {"kept dense: it costs most per weight (keep_dense 20%)"}
    assert halve.check(tmp_path / "out").ok
    assert "keep_dense.amount" in (tmp_path / "out" / "report.html").read_text()


def test_a_budget_of_perplexity_keeps_more_the_tighter_it_is():
    counts = [len(prune(decoder("llama"), keep_dense=f"{ratio}x").record["keep_dense"]["kept"]) for ratio in (1.001, 9)]
    assert counts[0] > counts[1] == 0


def test_experts_and_pairs_are_measured_too():
    found = prune(decoder("mixtral"), keep_dense="60%", min_expert_tokens=1, fallback="magnitude").record["keep_dense"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in {**found["kept"], **found["pruned"]}
    batches = [pairs("t5", seed=seed) for seed in range(2)]
    pruned = halve.prune(encoder_decoder("t5"), calibration=batches, method="wanda", refit="none", keep_dense="10%")
    parts = {name.partition(".")[0] for name in pruned.record["keep_dense"]["pruned"]}
    assert parts == {"encoder", "decoder"}


def test_what_is_stored_together_stays_dense_together(monkeypatch):
    layers = [f"model.layers.{block}.self_attn" for block in range(3)]
    groups = [(f"{layer}.q_proj.weight", f"{layer}.v_proj.weight") for layer in layers]
    monkeypatch.setattr(whole_model, "stored_together", lambda _loaded: groups)
    found = prune(decoder("llama"), keep_dense="20%").record["keep_dense"]
    kept = set(found["kept"])
    assert any(set(group) <= kept for group in groups)
    assert all(set(group) <= kept or not set(group) & kept for group in groups)
    for query, value in groups:
        assert {**found["kept"], **found["pruned"]}[query] == {**found["kept"], **found["pruned"]}[value]


def test_what_is_slow_is_left_out_of_the_share(monkeypatch):
    slow = WhereFaster(1.1, 1, {"32x32": 1.5, "16x32": 0.9, "64x32": 1.5, "32x64": 0.9})
    monkeypatch.setattr(WhereFaster, "measured", lambda *_, **__: slow)
    pruned = prune(decoder("llama"), only_where_faster=1.1, keep_dense="20%")
    found = pruned.record["keep_dense"]
    kinds = {name.split(".")[-2] for name in {**found["kept"], **found["pruned"]}}
    assert kinds == {"q_proj", "o_proj", "gate_proj", "up_proj"}
    reasons = {entry.name: entry.reason for entry in pruned.report.excluded}
    assert "0.90 times as fast" in reasons["model.layers.0.self_attn.k_proj.weight"]


def test_streamed_weights_give_the_same_bytes(checkpoint, text, tmp_path):
    for stream in ("never", "always"):
        halve.prune(checkpoint, tmp_path / stream, calibration=text, keep_dense="15%", stream=stream, **FAST)
    assert files(tmp_path / "always") == files(tmp_path / "never")


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in OF_ONE_RUN}


class Killed(BaseException):
    """Stands for the end of the process."""


def interrupted(monkeypatch, call):
    """Run ``call`` and stop it once a block is finished."""
    commit = pruning.RunDirectory.commit

    def once(self, *arguments):
        commit(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pruning.RunDirectory, "commit", once)
        with pytest.raises(Killed):
            call()


@pytest.mark.parametrize("again", ["resume", "the same call"])
def test_a_run_that_goes_on_goes_by_what_was_chosen(checkpoint, text, tmp_path, monkeypatch, again):
    def call(out):
        return halve.prune(checkpoint, out, calibration=text, keep_dense="15%", **FAST)

    call(tmp_path / "whole")
    interrupted(monkeypatch, lambda: call(tmp_path / "out"))
    monkeypatch.setattr(keep_dense, "damages_alone", None)  # nothing is measured again
    halve.resume(tmp_path / "out") if again == "resume" else call(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("30%", r"keep_dense\.amount was 20% and is 30%"),
        (KeepDense("20%", 100), r"keep_dense\.tokens was 512 and is 100"),
        (None, r"keep_dense was absent and is None"),
    ],
)
def test_another_amount_is_another_run(tmp_path, monkeypatch, changed, message):
    interrupted(monkeypatch, lambda: prune(decoder("llama"), tmp_path / "out", keep_dense="20%"))
    with pytest.raises(ResumeMismatchError, match=message):
        prune(decoder("llama"), tmp_path / "out", keep_dense=changed)


def test_amounts_that_make_no_sense_are_refused_before_the_model_is_looked_at():
    for amount in ("0%", "100%", "10", "1x", "0.5x", "lots", "-3%", "nan%", 0.1, ""):
        with pytest.raises(InputError, match="is neither a share of the weights between 0% and 100%, such as 10%, nor"):
            halve.prune("no/such/model", keep_dense=amount)
    with pytest.raises(InputError, match="keep_dense_tokens must be a whole number of at least 1"):
        KeepDense("10%", 0)
    assert (KeepDense("2.5 %").share, KeepDense("2.5 %").ratio) == (0.025, None)
    assert (KeepDense("1.05x").share, KeepDense("1.05x").ratio) == (None, 1.05)


def test_a_share_that_holds_no_matrix_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"keep_dense = 1% of 27,648 weights .* smallest matrix has, 512: ask for 1\.9%"
    ):
        prune(decoder("llama"), tmp_path / "out", keep_dense="1%")
    assert not (tmp_path / "out").exists()


def listed_experts():
    """Return a decoder with a mixture of experts that are layers of their own, the last of which nothing reaches."""
    model = decoder("llama")

    class Mixture(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

        def forward(self, hidden):
            flat, which = hidden.flatten(0, -2), torch.arange(hidden[..., 0].numel()) % 2
            out = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                out[which == index] = expert(flat[which == index])
            return out.view_as(hidden)

    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp)
    return model


def test_experts_that_nothing_reached_are_warned_of():
    heard = []
    options = {"forward_dtype": "float32", "min_expert_tokens": 1, "fallback": "magnitude", "keep_dense": "10%"}
    found = prune(listed_experts(), listen=heard.append, **options).record["keep_dense"]
    (caution,) = [step.caution for step in heard if step.phase == "damage" and step.caution]
    name = "model.layers.0.mlp.experts.2.gate_proj.weight"
    assert f"no token that damage is measured on reached 9 of 39 matrices (the first is {name})" in caution
    assert found["pruned"][name] == 0.0
