"""Speed plans: their sums against a plain reckoning of their own, and a tiny model measured for real."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import halve
from dense_engines import Steady
from halve.errors import CorruptFileError, InputError, PatternError
from halve.planner import speed_plan as planner
from halve.planner.rest import Rest
from halve.runtime import speed
from halve.runtime.packed_matrix import pack
from halve.runtime.quantised_matrix import quantised_bytes
from halve.runtime.speed import Speed
from models import decoder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def small_caches(monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)


def seconds_of(d_out, d_in, batch):
    """Some seconds that are exact in binary, dense and sparse: narrow matrices lose, large batches gain less."""
    dense = d_out * d_in * (4 + batch) / 2**20
    return dense, dense * (2 if d_out < 32 else 0.5 + batch / 16)


@pytest.fixture
def made_up(monkeypatch):
    """Replace every measurement by numbers known beforehand; return the shapes that were asked for."""
    asked = []

    def measure(d_out, d_in, batches, *, pattern, dtype, device, bits):
        assert bits is None
        asked.append((d_out, d_in, tuple(batches), str(pattern), dtype, device.type))
        return [
            Speed(
                d_out=d_out,
                d_in=d_in,
                batch=batch,
                dense_seconds=dense,
                sparse_seconds=sparse,
                dense_call_seconds=0.0,
                sparse_call_seconds=0.0,
            )
            for batch in batches
            for dense, sparse in [seconds_of(d_out, d_in, batch)]
        ]

    def measure_rest(_skeleton, batches, *, listen, **_):
        for batch in batches:
            listen(batch)
        return {
            batch: Rest(
                batch=batch,
                sequences=batch,
                length=1,
                measured_blocks=2,
                blocks=3,
                outside_seconds=0.25,
                block_seconds=0.125 * batch,
                linear_seconds=9.0,
            )
            for batch in batches
        }

    monkeypatch.setattr(planner.speed, "measure", measure)
    monkeypatch.setattr(planner.rest, "measure_rest", measure_rest)
    return asked


def test_the_whole_is_put_together_by_amdahls_law(made_up):
    found = halve.plan(decoder("llama"), batches=[1, 8])
    blocks, shapes = 3, [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    for batch in (1, 8):
        rest = 0.25 + blocks * 0.125 * batch
        dense = sparse = faster = 0.0
        for _, shape in itertools.product(range(blocks), shapes):
            one, other = seconds_of(*shape, batch)
            dense, sparse, faster = dense + one, sparse + other, faster + min(one, other)
        gain = found.gain(batch)
        assert (gain.rest_seconds, gain.dense_seconds, gain.sparse_seconds) == (rest, dense, sparse)
        assert gain.faster_seconds == faster
        assert gain.everywhere == pytest.approx((rest + dense) / (rest + sparse))
        assert gain.where_faster == pytest.approx((rest + dense) / (rest + faster))
        assert gain.where_faster >= max(1.0, gain.everywhere)
    assert found.gain(1).where_faster > found.gain(1).everywhere > 1.0 > found.gain(8).everywhere
    assert len(made_up) == 4  # each shape once, at all batches
    assert {row[2] for row in made_up} == {(1, 8)}


@pytest.mark.usefixtures("made_up")
def test_the_json_holds_it_all_in_the_same_order():
    found = halve.plan(decoder("mixtral"), batches=[8, 1])
    record = found.as_json()
    assert list(record) == [
        "format",
        "model",
        "pattern",
        "values",
        "dtype",
        "device",
        "batches",
        "machine",
        "matrices",
        "left_dense",
        "products",
        "left_out",
        "rest",
        "end_to_end",
        "against",
        "conclusion",
    ]
    assert json.loads(json.dumps(record)) == record
    assert (record["batches"], record["dtype"], record["device"]) == ([8, 1], "float32", "cpu")
    assert [row["batch"] for row in record["end_to_end"]] == [8, 1]
    assert {row["name"] for row in record["left_dense"]} >= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["sparse_products"] == speed.describe(torch.device("cpu"))
    for row in record["products"]:
        assert row["speedup"] == row["dense_seconds"] / row["sparse_seconds"]
    for row in record["end_to_end"]:
        before = row["rest_seconds"] + row["dense_seconds"]
        assert row["speedup"] == before / (row["rest_seconds"] + row["sparse_seconds"])
        assert row["speedup_where_faster"] == before / (row["rest_seconds"] + row["faster_seconds"])
    assert json.dumps(record) == json.dumps(halve.plan(decoder("mixtral"), batches=[8, 1]).as_json() | machine(record))


def machine(record):
    """The load of the machine is another one every time."""
    return {"machine": record["machine"]}


@pytest.mark.usefixtures("made_up")
def test_bytes_are_those_of_packed_matrices():
    found = halve.plan(decoder("llama"), pattern="1:4", dtype=torch.bfloat16, batches=[1])
    kind = next(kind for kind in found.kinds if kind.name == "mlp.down_proj")
    assert found.dense_bytes(kind) == 3 * 32 * 64 * 2
    one = pack(halve.Pattern("1:4").project(torch.randn(32, 64)).bfloat16(), "1:4")
    assert found.packed_bytes(kind) == 3 * one.nbytes


def test_the_pattern_is_the_records_unless_another_is_given(made_up, llama):
    (Path(llama) / "halve.json").write_text('{"pattern": "8:16"}')
    assert halve.plan(llama, batches=[1]).pattern == "8:16"
    assert {pattern for _, _, _, pattern, _, _ in made_up} == {"8:16"}
    assert halve.plan(llama, batches=[1], pattern="1:4").pattern == "1:4"
    (Path(llama) / "halve.json").write_text('{"pattern": "16:8"}')
    with pytest.raises(
        CorruptFileError, match=r"halve\.json is not as Halve writes it: pattern '16:8' is not understood"
    ):
        halve.plan(llama, batches=[1])
    (Path(llama) / "halve.json").unlink()
    assert halve.plan(llama, batches=[1]).pattern == "2:4"


def test_what_does_not_fit_is_left_out_with_what_it_needs(made_up, monkeypatch):
    monkeypatch.setattr(planner, "free_memory", lambda _device: 5000)
    monkeypatch.setattr(planner.speed, "needed_bytes", lambda d_out, _d_in, batch, **_: d_out * batch)
    found = halve.plan(decoder("llama"), batches=[1, 100])
    assert [(row.d_out, row.d_in, row.batch, row.needed_bytes, row.free_bytes) for row in found.left_out] == [
        (64, 32, 100, 6400, 5000)
    ]
    assert found.gain(100) == "mlp.gate_proj does not fit into the memory"
    assert found.gain(1).everywhere > 0
    assert (64, 32, (1,), "2:4", torch.float32, "cpu") in made_up
    monkeypatch.setattr(planner, "free_memory", lambda _device: 0)
    found = halve.plan(decoder("llama"), batches=[1])
    assert found.speeds == ()
    assert "no product was measured" in found.sentence
    monkeypatch.setattr(planner, "free_memory", lambda _device: 1 << 60)
    assert halve.plan(decoder("llama"), batches=[1]).left_out == ()


def test_the_cpu_has_a_name_even_where_linux_tells_none(monkeypatch):
    name = planner.describe_machine(torch.device("cpu"))["cpu"]
    assert name
    monkeypatch.setattr(planner.Path, "read_text", lambda *_, **__: "processor : 0\nBogoMIPS : 48.00\n")
    monkeypatch.setattr(planner.platform, "processor", lambda: "")
    monkeypatch.setattr(planner.platform, "machine", lambda: "aarch64")
    assert planner.describe_machine(torch.device("cpu"))["cpu"] == "aarch64"
    monkeypatch.setattr(planner.Path, "read_text", lambda *_, **__: "processor : 0\nmodel name : Fast 9000 @ 3 GHz\n")
    assert planner.describe_machine(torch.device("cpu"))["cpu"] == "Fast 9000 @ 3 GHz"


@pytest.mark.usefixtures("made_up")
def test_the_papers_preset_has_its_batches_and_no_end_to_end():
    found = halve.plan("paper")
    assert found.batches == (1, 16, 32, 8192, 16384, 32768)
    assert len({kind.shape for kind in found.kinds}) == 8
    assert found.gain(1) == "paper is the matrices of more than one model"
    assert "single products are up to" in found.sentence
    assert halve.plan("paper", batches=[4]).batches == (4,)
    assert halve.plan("llama-8b").batches == (1, 8, 64, 2048)


def test_a_listener_hears_of_every_measurement(made_up):
    heard = []
    halve.plan(decoder("llama"), batches=[1, 8], listen=lambda *step: heard.append(step))
    assert [step[1:] for step in heard] == [(done, 6) for done in range(6)]
    assert heard[0][0] == "32 x 32"
    assert heard[-1][0] == "the rest of the model at batch 8"
    assert len(made_up) == 4


def test_a_dense_engine_is_measured_beside_packed_weights(made_up, monkeypatch):
    heard, engine = [], Steady()
    monkeypatch.setattr(planner.packed_decoding, "packed_seconds", lambda _skeleton, blocks, *_: 0.5 * blocks)
    found = halve.plan(
        decoder("llama"), batches=[8, 1], against=engine, listen=lambda *step: heard.append(step), values="own"
    )
    assert [(row.contender, row.seconds) for row in found.against] == [
        ("Halve 2:4 in float32", 1.5),
        ("steady x1", 1.75),
        ("steady x2", 0.875),
    ]
    assert [row["packed_speedup"] for row in found.as_json()["against"]] == [1.0, 1.75 / 1.5, 0.875 / 1.5]
    assert [step[1:] for step in heard] == [(done, 9) for done in range(9)]
    assert heard[-1][0] == "decoding by steady x2"
    assert {threads for *_, threads in engine.asked} == {torch.get_num_threads()}
    without = halve.plan(decoder("llama"), batches=[8, 1])
    assert found.sentence.startswith(f"{without.sentence} Decoding one sequence with a short context, Halve 2:4")
    assert made_up


def test_what_an_engine_refuses_is_refused_before_anything_is_measured(made_up):
    with pytest.raises(InputError, match="let the batches have 1 among them"):
        halve.plan(decoder("llama"), batches=[8], against=Steady())
    with pytest.raises(InputError, match="paper is not one model"):
        halve.plan("paper", against=Steady())
    assert made_up == []


@pytest.mark.usefixtures("made_up")
def test_only_what_will_be_measured_is_announced(monkeypatch):
    heard = []
    halve.plan("paper", batches=[1, 16], listen=lambda *step: heard.append(step))
    assert [step[1:] for step in heard] == [(done, 8) for done in range(8)]
    monkeypatch.setattr(planner, "free_memory", lambda _device: 5000)
    monkeypatch.setattr(planner.speed, "needed_bytes", lambda d_out, _d_in, batch, **_: d_out * batch)
    heard.clear()
    halve.plan(decoder("llama"), batches=[100, 1000], listen=lambda *step: heard.append(step))
    assert [step[1:] for step in heard] == [(done, 4) for done in range(4)]  # 64 x 32 fits at neither
    assert heard[-1][0] == "the rest of the model at batch 100"


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize("values", ["own", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tiny_model_measured_for_real(family, values, monkeypatch):
    measure, measure_rest = speed.measure, planner.rest.measure_rest
    monkeypatch.setattr(planner.speed, "measure", lambda *a, **k: measure(*a, **k, seconds=0))
    monkeypatch.setattr(planner.rest, "measure_rest", lambda *a, **k: measure_rest(*a, **k, seconds=0))
    found = halve.plan(decoder(family), batches=[1, 65], dtype=torch.float32, device="cpu", values=values)
    assert found.as_json()["values"] == values
    if values != "own":
        kind = found.kinds[0]
        assert found.packed_bytes(kind) == kind.count * quantised_bytes(*kind.shape, int(values.removeprefix("int")))
    assert {kind.count for kind in found.kinds} == {3}
    for kind, batch in itertools.product(found.kinds, (1, 65)):
        row = found.speed(kind, batch)
        assert 0 < row.dense_seconds < 1
        assert 0 < row.sparse_seconds < 1
    for batch in (1, 65):
        gain = found.gain(batch)
        assert 0 < gain.rest_seconds < 10
        assert 0 < gain.everywhere <= gain.where_faster
    assert "end to end" in found.sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": [0]}, "batch must be a whole number of at least 1, got 0"),
        ({"batches": [1.5]}, r"batch must be a whole number of at least 1, got 1\.5"),
        ({"batches": []}, r"batches is \[\]: give a list of numbers"),
        ({"batches": 1}, "batches is 1: give a list of numbers"),
        ({"dtype": torch.float64}, r"bfloat16, float16 or float32, not torch\.float64"),
        ({"pattern": "5:4"}, "pattern '5:4' is not understood"),
        ({"device": "tpu"}, "device 'tpu' is not understood"),
        ({"pattern": "1:7"}, r"nothing to prune: .* is not divisible by 7"),
        ({"values": "int5"}, "values is 'int5': give own, bf16, int8 or int4"),
        ({"values": "int5", "pattern": "5:4"}, "values is 'int5': give own, bf16, int8 or int4"),
        ({"values": "int8", "pattern": "1:4"}, "weights are quantised at 2:4 alone, not at 1:4"),
        ({"values": "bf16", "dtype": torch.float32}, "values is 'bf16', and the model is float32"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_measured(made_up, changes, message):
    with pytest.raises((InputError, PatternError), match=message):
        halve.plan(decoder("llama"), **changes)
    assert made_up == []


def test_a_pattern_that_a_gpu_cannot_run_is_refused_before_the_model_is_looked_at(monkeypatch):
    monkeypatch.setattr(planner, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(planner.speed.semi_structured, "unusable", lambda _device: "")
    monkeypatch.setattr(planner, "outline", None)
    with pytest.raises(InputError, match=r"sparse tensor cores multiply 2:4 .* not 1:4"):
        halve.plan("org/model", pattern="1:4", dtype=torch.bfloat16)
    monkeypatch.setattr(planner.speed.semi_structured, "unusable", lambda _device: "it is too old")
    with pytest.raises(InputError, match="no sparse products on cuda: it is too old"):
        halve.plan("org/model")


def test_weights_of_no_known_dtype_are_refused():
    with pytest.raises(InputError, match=r"not torch\.float64"):
        halve.plan(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))).double())


@needs_gpu
def test_on_a_gpu():
    if speed.semi_structured.unusable():
        pytest.skip(speed.semi_structured.unusable())
    model = decoder("llama", hidden_size=1024, intermediate_size=2048)
    found = halve.plan(model, batches=[8, 256], dtype=torch.bfloat16, device="cuda")
    assert found.gain(8).everywhere > 0
    kind = next(kind for kind in found.kinds if kind.name == "mlp.down_proj")
    assert found.packed_bytes(kind) == found.dense_bytes(kind) * 9 // 16
    assert found.sentence.endswith("what launching its work costs is not counted.")
