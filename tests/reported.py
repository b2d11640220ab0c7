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
