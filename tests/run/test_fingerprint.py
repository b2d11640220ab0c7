from dataclasses import replace

import pytest
import torch

from halve.checkpoint.load import LoadedModel, load_model
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction
from halve.option_groups import options_of
from halve.provenance import differences
from halve.run.fingerprint import fingerprint
from halve.run.request import Loading, Placement, Request
from halve.run.settings import Settings
from halve.solve.objective import Objective
from halve.text.tokens import TokenSet, hash_ids
from models import decoder

SETTINGS = Settings(method="prox-gradient", options={"beta": 1.02})


def token_set(seed=0):
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(seed))
    return TokenSet(ids, "tokens", hash_ids(ids), 2)


def mark(model=None, data=None, settings=SETTINGS, device="cpu", precision="float32", dtype=None):
    loaded = LoadedModel(model or decoder("llama"), None, None)
    request = Request(settings=settings, placement=Placement(device, precision), loading=Loading(dtype=dtype))
    return fingerprint(loaded, data or token_set(), request)


def test_the_same_run_has_the_same_fingerprint():
    assert mark() == mark()
    assert differences(mark(), mark()) == []
    assert all(isinstance(value, str) for value in mark().values())


def other_model():
    model = decoder("llama")
    model.lm_head.weight.data[3, 2] += 1e-6
    return model


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": other_model()}, "model.tensors"),
        ({"data": token_set(1)}, "calibration"),
        ({"data": [{"input_ids": token_set().ids}]}, "calibration"),
        ({"settings": replace(SETTINGS, pattern=Pattern("1:4"))}, "pattern"),
        ({"settings": replace(SETTINGS, options={"beta": 1.03})}, "options.beta"),
        ({"settings": replace(SETTINGS, refit="none")}, "refit"),
        ({"settings": replace(SETTINGS, skip=("*.q_proj.*",))}, "skip"),
        ({"settings": replace(SETTINGS, min_expert_tokens=5)}, "min_expert_tokens"),
        ({"settings": replace(SETTINGS, objective=Objective(match_dense=0.5))}, "objective.match_dense"),
        ({"settings": replace(SETTINGS, reconstruction=Reconstruction())}, "reconstruction.epochs"),
        ({"precision": "bfloat16"}, "forward_dtype"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_whatever_changes_the_result_is_named(change, field):
    found = differences(mark(), mark(**change))
    assert any(phrase.startswith(f"{field} was ") for phrase in found), found


def test_a_fallback_may_be_given_later():
    assert mark(settings=replace(SETTINGS, fallback="magnitude")) == mark()


def test_defaults_count_whether_they_are_given_or_not():
    given = replace(SETTINGS, options=SETTINGS.all_options)
    assert mark(settings=given) == mark()


def test_threads_and_versions_are_part_of_it(monkeypatch):
    before = mark()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(torch, "__version__", "9.9")
    found = differences(before, mark())
    assert [phrase.split(" was ")[0] for phrase in found] == ["environment.threads", "environment.torch"]
    assert found[0].endswith("and is 77")


def test_files_are_named_one_by_one(tmp_path):
    decoder("llama").save_pretrained(tmp_path / "a", max_shard_size="40KB")
    loaded = load_model(tmp_path / "a")
    request = Request(settings=SETTINGS, placement=Placement("cpu", "float32"))
    before = fingerprint(loaded, token_set(), request)
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    found = differences(before, fingerprint(loaded, token_set(), request))
    assert [phrase.split(" was ")[0] for phrase in found] == [f"model.{shard.name}"]
    assert "model.config.json" in before
    assert "model.model.safetensors.index.json" in before


def test_every_option_counts_or_is_named_as_one_that_does_not(tmp_path):
    loaded = LoadedModel(decoder("llama"), None, None)
    changed = {
        "pattern": "1:4",
        "method": "sparsegpt",
        "refit": "none",
        "reconstruct": "block",
        "skip": ["*.q_proj.*"],
        "fallback": "wanda",
        "min_expert_tokens": 5,
        "tower": "text",
        "least_prunable": 0.3,
        "batch_norm": "keep",
        "permute": "fold",
        "reconstruct_epochs": 2,
        "reconstruct_learning_rate": 0.1,
        "reconstruct_held_out": 0.5,
        "shrinkage": 0.5,
        "match_dense": 0.5,
        "match_ridge": 0.5,
        "only_where_faster": 1.5,
        "faster_at_batch": 2,
        "keep_dense": "20%",
        "keep_dense_tokens": 100,
        "calibration": "c4",
        "samples": 3,
        "seq_len": 3,
        "seed": 3,
        "text_field": "body",
        "bos": "always",
        "pair_fields": "source,target",
        "span_corruption": True,
        "shards": 3,
        "device": "cpu",
        "forward_dtype": "bfloat16",
        "offload": tmp_path,
        "work": tmp_path,
        "stream": "always",
        "workers": 2,
        "worker_threads": 1,
        "revision": "main",
        "trust_remote_code": True,
        "dtype": "float16",
        "attention": "eager",
        "eval_data": ["a"],
        "eval_seq_len": 3,
        "eval_max_windows": 3,
        "eval_images": "pictures",
        "eval_max_images": 3,
    }
    assert changed.keys() == {each.name for each in options_of(Request)}  # a new option needs a word here
    base = {"forward_dtype": "float32", "only_where_faster": 1.1, "reconstruct": "none", "eval_data": ["b"]}
    base |= {"keep_dense": "10%"}
    base |= {"shrinkage": 0.0, "match_dense": 0.1}
    idle = {
        "calibration",
        "samples",
        "seq_len",
        "text_field",
        "bos",
        "pair_fields",
        "span_corruption",
        "offload",
        "work",
        "stream",
        "workers",
        "worker_threads",
        "revision",
        "trust_remote_code",
    }
    idle |= {"fallback", "least_prunable", "device", "eval_data", "eval_seq_len", "eval_max_windows"}
    idle |= {"eval_images", "eval_max_images"}
    base |= {"eval_images": "others"}

    def of(**options):
        return fingerprint(loaded, token_set(), Request.of(options))

    for name, value in changed.items():
        within = base | ({"reconstruct": "block"} if name.startswith("reconstruct_") else {})
        within |= {"workers": 1} if name == "worker_threads" else {}
        assert (of(**within) == of(**within | {name: value})) is (name in idle), name
