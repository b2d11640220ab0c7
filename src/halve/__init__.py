"""Halve prunes trained neural networks to N:M sparsity.

The names below are loaded when they are first used, so that importing the package is cheap. No module of the package
may have one of their names: once imported, it would hide what is public.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halve.comparison import Comparison, compare
    from halve.engines.gguf_export import export_gguf as export
    from halve.engines.llama_cpp import LlamaCpp
    from halve.errors import HalveError
    from halve.evaluation.figure import Perplexity
    from halve.evaluation.perplexity import evaluate
    from halve.evaluation.request import Evaluation
    from halve.evaluation.top_one import ImageEvaluation, TopOne, top_one
    from halve.learned_masks import apply_masks, learn
    from halve.learning.callback import KeepMasks
    from halve.learning.finetuning import finetune
    from halve.learning.keeping import KeptMasks, keep_masks
    from halve.learning.lesson import Taught
    from halve.maths.gram import Gradient, GramAccumulator, Statistics
    from halve.maths.pattern import Pattern
    from halve.maths.proximal import prox
    from halve.merging import Merged, merge
    from halve.model.reconstruct import Reconstruction
    from halve.packed.load import load
    from halve.packed.read import unpack_checkpoint as unpack
    from halve.packed.write import PackResult
    from halve.packing import pack
    from halve.planner.speed_plan import SpeedPlan, plan
    from halve.planner.where_faster import WhereFaster
    from halve.pruning import prune, resume
    from halve.report.page import write_comparison, write_report
    from halve.run.request import Loading, Placement
    from halve.runtime.accelerate import Acceleration, accelerate
    from halve.sensitivity.keep_dense import KeepDense
    from halve.solve.matrix import prune_weight
    from halve.solve.objective import Objective
    from halve.solve.outcome import Outcome, Status
    from halve.text.calibration import Calibration
    from halve.verification import CheckResult, check
    from halve.whole_model import Pruned

_HOMES = {
    "Acceleration": "runtime.accelerate",
    "Calibration": "text.calibration",
    "CheckResult": "verification",
    "Comparison": "comparison",
    "Evaluation": "evaluation.request",
    "HalveError": "errors",
    "KeepDense": "sensitivity.keep_dense",
    "Gradient": "maths.gram",
    "GramAccumulator": "maths.gram",
    "ImageEvaluation": "evaluation.top_one",
    "KeepMasks": "learning.callback",
    "KeptMasks": "learning.keeping",
    "LlamaCpp": "engines.llama_cpp",
    "Loading": "run.request",
    "Merged": "merging",
    "Objective": "solve.objective",
    "Outcome": "solve.outcome",
    "PackResult": "packed.write",
    "Pattern": "maths.pattern",
    "Perplexity": "evaluation.figure",
    "Placement": "run.request",
    "Pruned": "whole_model",
    "Reconstruction": "model.reconstruct",
    "SpeedPlan": "planner.speed_plan",
    "Statistics": "maths.gram",
    "Status": "solve.outcome",
    "Taught": "learning.lesson",
    "TopOne": "evaluation.top_one",
    "WhereFaster": "planner.where_faster",
    "accelerate": "runtime.accelerate",
    "check": "verification",
    "compare": "comparison",
    "evaluate": "evaluation.perplexity",
    "export": "engines.gguf_export:export_gguf",
    "finetune": "learning.finetuning",
    "apply_masks": "learned_masks",
    "learn": "learned_masks",
    "keep_masks": "learning.keeping",
    "load": "packed.load",
    "merge": "merging",
    "pack": "packing",
    "plan": "planner.speed_plan",
    "prox": "maths.proximal",
    "prune": "pruning",
    "prune_weight": "solve.matrix",
    "resume": "pruning",
    "top_one": "evaluation.top_one",
    "unpack": "packed.read:unpack_checkpoint",
    "write_comparison": "report.page",
    "write_report": "report.page",
}

__all__ = [
    "Acceleration",
    "Calibration",
    "CheckResult",
    "Comparison",
    "Evaluation",
    "Gradient",
    "GramAccumulator",
    "HalveError",
    "ImageEvaluation",
    "KeepDense",
    "KeepMasks",
    "KeptMasks",
    "LlamaCpp",
    "Loading",
    "Merged",
    "Objective",
    "Outcome",
    "PackResult",
    "Pattern",
    "Perplexity",
    "Placement",
    "Pruned",
    "Reconstruction",
    "SpeedPlan",
    "Statistics",
    "Status",
    "Taught",
    "TopOne",
    "WhereFaster",
    "accelerate",
    "apply_masks",
    "check",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "keep_masks",
    "learn",
    "load",
    "merge",
    "pack",
    "plan",
    "prox",
    "prune",
    "prune_weight",
    "resume",
    "top_one",
    "unpack",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    module, _, inner = _HOMES[name].partition(":")  # the inner name, where that module means more than one matrix
    return getattr(import_module(f"halve.{module}"), inner or name)


def __dir__() -> list[str]:
    return sorted(__all__)
