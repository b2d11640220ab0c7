"""Matrices left dense for their speed: decided once by measurements, here replaced by numbers."""

import json

import pytest
import torch

import halve
from halve import memory, pruning
from halve.checkpoint.directory import is_unfinished
from halve.errors import InputError, ResumeMismatchError
from halve.maths.pattern import Pattern
from halve.model.plan import Matrix
from halve.planner.where_faster import WhereFaster
from halve.run import request
from halve.run.settings import Settings
from halve.runtime import speed
from halve.runtime.speed import Speed
from models import OF_ONE_RUN, decoder, tokens

CPU = torch.device("cpu")
PATTERN = Pattern("2:4")
FAST = {"method": "wanda", "refit": "none", "samples": 4, "seq_len": 16}
RATIOS = {(32, 32): 1.5, (16, 32): 0.968, (64, 32): 1.0951, (32, 64): 1.0949}
"""Of the tiny Llama's shapes: q and o, k and v, gate and up, down."""
SLOW = {"k_proj", "v_proj", "down_proj"}
"""At a factor of 1.1, two decimals counted."""


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurements; return what was asked for."""
    asked = []

    def measure(d_out, d_in, batches, *, pattern, dtype, device):
        asked.append((d_out, d_in, *batches, str(pattern), dtype, device.type))
        return [
            Speed(
                d_out=d_out,
                d_in=d_in,
                batch=batches[0],
                dense_seconds=RATIOS[d_out, d_in],
                sparse_seconds=1.0,
                dense_call_seconds=0.0,
                sparse_call_seconds=0.0,
            )
        ]

    monkeypatch.setattr(speed, "measure", measure)
    return asked


def prune(model, out=None, **changes):
    return halve.prune(model, out, calibration=tokens(4, 16), **{"method": "wanda", "refit": "none", **changes})


def test_what_is_not_fast_enough_stays_dense_and_is_listed_with_the_reason(measured, tmp_path):
    dense = decoder("llama").to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    pruned = prune(dense, tmp_path / "out", only_where_faster=1.1)
    assert sorted(measured) == sorted((*shape, 1, "2:4", torch.bfloat16, "cpu") for shape in RATIOS)
    record = json.loads((tmp_path / "out" / "halve.json").read_text())
    assert record["only_where_faster"] == {
        "factor": 1.1,
        "batch": 1,
        "ratios": {"32x32": 1.5, "16x32": 0.97, "64x32": 1.1, "32x64": 1.09},
    }
    reasons = {entry["name"]: entry["reason"] for entry in record["excluded"]}
    said = "2:4 is {} times as fast as dense at batch 1 on this machine, less than the 1.1 asked for"
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == said.format("0.97")
    assert reasons["model.layers.2.mlp.down_proj.weight"] == said.format("1.09")
    assert len(record["matrices"]) == 12
    for name, parameter in pruned.model.named_parameters():
        kind = name.split(".")[-2]
        if kind in {"q_proj", "o_proj", "gate_proj", "up_proj"}:
            assert PATTERN.satisfied_by(parameter)
        else:
            assert torch.equal(parameter, before[name])
        assert (kind in SLOW) == ("layers" in name and parameter.ndim > 1 and name in reasons)
    assert halve.check(tmp_path / "out").ok


def test_batch_device_and_what_is_skipped_are_minded(measured):
    pruned = prune(decoder("llama"), only_where_faster=WhereFaster(1.2, 8), skip=["*mlp*"])
    assert sorted(measured) == [(16, 32, 8, "2:4", torch.float32, "cpu"), (32, 32, 8, "2:4", torch.float32, "cpu")]
    assert pruned.record["only_where_faster"]["batch"] == 8
    assert {report.name.split(".")[-2] for report in pruned.report.matrices} == {"q_proj", "o_proj"}


def test_experts_in_one_parameter_cannot_be_faster(monkeypatch):
    monkeypatch.setattr(
        speed,
        "measure",
        lambda *_, **__: [
            Speed(
                d_out=1,
                d_in=1,
                batch=1,
                dense_seconds=2.0,
                sparse_seconds=1.0,
                dense_call_seconds=0.0,
                sparse_call_seconds=0.0,
            )
        ],
    )
    pruned = prune(decoder("mixtral"), only_where_faster=1.5)
    reasons = {entry.name: entry.reason for entry in pruned.report.excluded}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"].startswith("experts in one parameter")
    assert len(pruned.report.matrices) == 12


@pytest.mark.usefixtures("measured")
def test_nothing_fast_enough_is_refused_and_nothing_is_done(tmp_path):
    model = decoder("llama")
    message = r"no matrix is 2 times as fast at 2:4 as dense at batch 1 on this machine, the best 1\.50 times \(32x32\)"
    with pytest.raises(InputError, match=message):
        prune(model, tmp_path / "out", only_where_faster=2)
    assert not (tmp_path / "out").exists()
    assert not PATTERN.satisfied_by(model.model.layers[0].self_attn.q_proj.weight)


def test_numbers_that_make_no_sense_are_refused_before_the_model_is_looked_at():
    for factor in (0, -1, float("nan"), float("inf"), True, "fast"):
        with pytest.raises(InputError, match="only_where_faster must be a finite number above 0"):
            halve.prune("no/such/model", only_where_faster=factor)
    for batch in (0, 1.5, True):
        with pytest.raises(InputError, match="faster_at_batch must be a whole number of at least 1"):
            WhereFaster(1.1, batch)
    with pytest.raises(InputError, match=r"float16 or float32, not torch\.float64"):
        prune(decoder("llama").double(), only_where_faster=1.1)


@pytest.mark.usefixtures("measured")
def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1)
    with pytest.raises(InputError, match=r"of 32 x 32 to measure at batch 1 need .* or leave only_where_faster out"):
        prune(decoder("llama"), only_where_faster=1.1)


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


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in OF_ONE_RUN}


@pytest.mark.parametrize("again", ["resume", "the same call"])
def test_a_run_that_goes_on_does_not_measure_again(checkpoint, text, tmp_path, measured, monkeypatch, again):
    def call(out):
        return halve.prune(checkpoint, out, calibration=text, only_where_faster=WhereFaster(1.1, 4), **FAST)

    call(tmp_path / "whole")
    interrupted(monkeypatch, lambda: call(tmp_path / "out"))
    assert is_unfinished(tmp_path / "out")
    measured.clear()
    monkeypatch.setitem(RATIOS, (32, 32), 0.5)  # another day, another speed
    halve.resume(tmp_path / "out") if again == "resume" else call(tmp_path / "out")
    assert measured == []
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_model_in_memory_goes_on_too(tmp_path, measured, monkeypatch):
    interrupted(monkeypatch, lambda: prune(decoder("llama"), tmp_path / "out", only_where_faster=1.1))
    measured.clear()
    prune(decoder("llama"), tmp_path / "out", only_where_faster=1.1)
    assert measured == []
    assert halve.check(tmp_path / "out").ok


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (1.2, r"only_where_faster\.factor was 1\.1 and is 1\.2"),
        (WhereFaster(1.1, 8), r"only_where_faster\.batch was 1 and is 8"),
        (None, r"only_where_faster was absent and is None"),
    ],
)
def test_another_factor_is_another_run(tmp_path, monkeypatch, changed, message):
    interrupted(monkeypatch, lambda: prune(decoder("llama"), tmp_path / "out", only_where_faster=1.1))
    with pytest.raises(ResumeMismatchError, match=message):
        prune(decoder("llama"), tmp_path / "out", only_where_faster=changed)


def test_a_run_without_it_cannot_go_on_with_it(tmp_path, measured, monkeypatch):
    interrupted(monkeypatch, lambda: prune(decoder("llama"), tmp_path / "out"))
    with pytest.raises(ResumeMismatchError, match=r"only_where_faster\.factor was absent and is 1\.1"):
        prune(decoder("llama"), tmp_path / "out", only_where_faster=1.1)
    assert measured == []


def test_the_reason_of_a_matrix():
    found = WhereFaster(1.1, 1, {"8x4": 1.09, "4x8": 1.1})
    settings = Settings(pattern=PATTERN, method="wanda", refit="none", only_where_faster=found)
    assert settings.why_dense(Matrix(name="a", parameter="a", block=0, d_out=4, d_in=8)) == ""
    reason = "2:4 is 1.09 times as fast as dense at batch 1 on this machine, less than the 1.1 asked for"
    assert settings.why_dense(Matrix(name="a", parameter="a", block=0, d_out=8, d_in=4)) == reason
    assert reason in found.reasons(PATTERN)
    assert len(found.reasons(PATTERN)) == 3
    convolution = Matrix(name="a", parameter="a", block=0, d_out=4, d_in=8, layout="conv")
    assert settings.why_dense(convolution) == "a convolution, for which there is no sparse product"
    assert settings.why_dense(convolution) in found.reasons(PATTERN)
    assert (
        Settings(pattern=PATTERN, method="wanda", refit="none").why_dense(
            Matrix(name="a", parameter="a", block=0, d_out=8, d_in=4)
        )
        == ""
    )


def test_a_shape_without_a_product_stays_dense_and_is_not_measured(measured, monkeypatch):
    monkeypatch.setattr(speed, "unfit", lambda d_out, d_in, *_: "odd" if (d_out, d_in) == (32, 64) else "")
    run = prune(decoder("llama"), only_where_faster=0.1)
    assert (32, 64) not in [row[:2] for row in measured]
    reasons = {entry["name"]: entry["reason"] for entry in run.record["excluded"]}
    said = "there is no sparse product of its shape at 2:4 on this machine"
    assert [name for name in reasons if reasons[name] == said] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)
    ]


def test_a_factor_is_enough():
    assert WhereFaster.of(1.1) == WhereFaster(1.1, 1)
    assert WhereFaster.of(WhereFaster(1.1, 3)) == WhereFaster(1.1, 3)
    assert WhereFaster.of(None) is None


def test_where_there_are_no_sparse_products_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(request, "resolve_device", lambda _name: torch.device("cuda"))
    monkeypatch.setattr(pruning, "find", lambda *_arguments, **_options: pytest.fail("looked for the model"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no sparse products on cuda"):
        halve.prune("anything", pattern="2:4", forward_dtype="float32", only_where_faster=1.1)
