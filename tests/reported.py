"""Checkpoints to report on: a record as Halve writes it, changed at will."""

import json
from pathlib import Path
from typing import Any

import halve
from halve.evaluation.request import Evaluation
from halve.run.events import MatrixReport
from halve.solve.outcome import Status
from models import decoder, tokens


def matrix_report(name: str, facts: dict[str, float], **changes: Any) -> MatrixReport:
    """Return what a run says of one matrix, some of it changed."""
    fixed = {"parameter": name, "expert": None, "shape": (4, 8), "layout": "out_in", "asked": "wanda"}
    fixed |= {"method": "wanda", "refit": "cg", "status": Status.OK, "reason": ""}
    return MatrixReport(name=name, facts=facts, **{**fixed, **changes})


def write_record(directory: Path, *, measured: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a small ``halve.json``, some keys changed, and ``halve-measured.json`` if there is to be one."""
    facts = {"relative_loss": 0.1, "relative_loss_before_refit": 0.12, "tokens": 64.0, "iterations": 7.0}
    matrices = [
        {
            "name": f"model.layers.{block}.{kind}.weight",
            "tensors": [],
            "shape": [4, 8],
            "layout": "out_in",
            "asked": "wanda",
            "method": "wanda",
            "refit": "cg",
            "status": "ok",
            "reason": "",
            "facts": facts | {"relative_loss": 0.1 * (block + 1) + 0.01 * index},
            "kept_per_group": [index, 1, 15 - index],
            "mask_sha256": "0" * 64,
        }
        for block in range(3)
        for index, kind in enumerate(("self_attn.q_proj", "mlp.down_proj"))
    ]
    record = {
        "format": 1,
        "source": {"kind": "gguf", "name": "models/small.gguf", "revision": None},
        "pattern": "2:4",
        "method": "wanda",
        "refit": "cg",
        "options": {"refit_tolerance": 1e-4},
        "skip": [],
        "fallback": None,
        "min_expert_tokens": 32,
        "reconstruction": None,
        "objective": {"shrinkage": 0.0, "match_dense": 0.0, "match_ridge": 0.1},
        "calibration": {"seed": 0, "source": "text.txt", "samples": 4, "seq_len": 16, "sha256": "ab" * 32},
        "device": "cpu",
        "forward_dtype": "float32",
        "mean_relative_loss": 0.205,
        "matrices": matrices,
        "blocks": [],
        "excluded": [{"name": "lm_head.weight", "shape": [8, 8], "reason": "outside the blocks"}],
        "warnings": [],
        "environment": {"halve": "0.1.0", "torch": "2.13.0"},
        "files": {"model.safetensors": "cd" * 32},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "halve.json").write_text(json.dumps(record | changes), encoding="utf-8")
    if measured is not None:
        content = {"format": 1, "perplexity": []} | measured
        (directory / "halve-measured.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def training_entry(**changes: Any) -> dict[str, Any]:
    """Return what a record says of one fine-tuning, some of it changed."""
    entry = {
        "kind": "finetune",
        "method": "fixed mask",
        "trained": "all",
        "teacher": {"kind": "hub", "name": "org/small", "revision": "abc", "sha256": "12" * 32},
        "started_from": {"name": "small-2of4", "sha256": "34" * 32},
        "options": {"ce_share": 0.0, "schedule": {"batch_tokens": 64, "warmup": 0.05}, "text": {"data": ["a.txt"]}},
        "text": {
            "sources": {"texts/a.txt": 200, "self": 56},
            "sequences": 16,
            "seq_len": 16,
            "sha256": "56" * 32,
            "held_out_tokens": 32,
            "notes": ["a.txt is short: it is read 2 times"],
        },
        "learning_rate": 3e-4,
        "rates_tried": {"0.0001": 2.5, "0.0003": 2.25, "0.001": None},
        "steps": 4,
        "best_step": 2,
        "tokens": 256,
        "device": "cpu",
        "forward_dtype": "float32",
        "tensors": ["model.norm.weight"],
        "curve": [
            {"step": 0, "tokens": 0, "kl": 1.5, "perplexity": 40.0},
            {"step": 1, "tokens": 64, "loss": 1.25, "learning_rate": 1.5e-4},
            {"step": 2, "tokens": 128, "loss": 1.0, "learning_rate": 3e-4},
            {"step": 2, "tokens": 128, "kl": 0.75, "perplexity": 30.0},
            {"step": 4, "tokens": 256, "loss": 0.5, "learning_rate": 6e-6},
            {"step": 4, "tokens": 256, "kl": 0.875, "perplexity": 31.0},
        ],
        "perplexity": [
            {
                "source": "texts/wiki.txt",
                "tokens_sha256": "ee",
                "seq_len": 16,
                "windows": 2,
                "dtype": "float32",
                "bos": "",
                "scored": "",
                "before": 60.0,
                "before_nll": 4.09,
                "after": 45.0,
                "after_nll": 3.81,
                "log_difference": -0.2877,
                "log_difference_stderr": 0.01,
            }
        ],
        "environment": {"halve": "0.1.0", "torch": "2.13.0"},
    }
    return entry | changes


def fallen_back(directory: Path, name: str = "model.layers.1.mlp.down_proj.weight") -> dict[str, Any]:
    """Return the matrices of a record, one of them fallen back to magnitude."""
    matrices = json.loads((directory / "halve.json").read_text())["matrices"]
    changes = {"status": "fell_back", "method": "magnitude", "reason": "it <b>failed</b>"}
    return {"matrices": [matrix | (changes if matrix["name"] == name else {}) for matrix in matrices]}


def prune_and_measure(checkpoint: Path, text: str, out: Path, **options: Any) -> Path:
    """Prune the tiny model of the fixture, with perplexity before and after."""
    evaluation = Evaluation([text], seq_len=16, max_windows=2)
    halve.prune(checkpoint, out, calibration=text, samples=8, seq_len=16, evaluation=evaluation, **options)
    return out


def prune_mixture(out: Path) -> Path:
    """Prune a tiny mixture of experts, some of which saw too few tokens."""
    settings = {"method": "wanda", "fallback": "magnitude", "min_expert_tokens": 100}
    halve.prune(decoder("mixtral"), out, calibration=tokens(8), **settings)
    return out
