"""Halve prunes trained neural networks to N:M sparsity.

The names below are loaded when they are first used, so that importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halve.errors import HalveError
    from halve.gram import GramAccumulator, Statistics
    from halve.matrix import prune_weight
    from halve.objective import Objective
    from halve.outcome import Outcome, Status
    from halve.pattern import Pattern
    from halve.perplexity import Perplexity, evaluate
    from halve.proximal import prox
    from halve.pruning import prune, resume
    from halve.reconstruct import Reconstruction
    from halve.report import write_comparison, write_report
    from halve.request import Evaluation
    from halve.runtime.accelerate import Acceleration, accelerate
    from halve.runtime.load import load
    from halve.runtime.packed_checkpoint import unpack_checkpoint as unpack
    from halve.runtime.packing import PackResult
    from halve.runtime.packing import pack_checkpoint as pack
    from halve.runtime.plan import SpeedPlan, plan
    from halve.verification import CheckResult, check
    from halve.where_faster import WhereFaster

_HOMES = {
    "Acceleration": "runtime.accelerate",
    "CheckResult": "verification",
    "Evaluation": "request",
    "HalveError": "errors",
    "GramAccumulator": "gram",
    "Objective": "objective",
    "Outcome": "outcome",
    "PackResult": "runtime.packing",
    "Pattern": "pattern",
    "Perplexity": "perplexity",
    "Pruned": "whole_model",
    "Reconstruction": "reconstruct",
    "SpeedPlan": "runtime.plan",
    "Statistics": "gram",
    "Status": "outcome",
    "WhereFaster": "where_faster",
    "accelerate": "runtime.accelerate",
    "check": "verification",
    "evaluate": "perplexity",
    "load": "runtime.load",
    "pack": "runtime.packing:pack_checkpoint",
    "plan": "runtime.plan",
    "prox": "proximal",
    "prune": "pruning",
    "prune_weight": "matrix",
    "resume": "pruning",
    "unpack": "runtime.packed_checkpoint:unpack_checkpoint",
    "write_comparison": "report",
    "write_report": "report",
}

__all__ = [
    "Acceleration",
    "CheckResult",
    "Evaluation",
    "GramAccumulator",
    "HalveError",
    "Objective",
    "Outcome",
    "PackResult",
    "Pattern",
    "Perplexity",
    "Pruned",
    "Reconstruction",
    "SpeedPlan",
    "Statistics",
    "Status",
    "WhereFaster",
    "accelerate",
    "check",
    "evaluate",
    "load",
    "pack",
    "plan",
    "prox",
    "prune",
    "prune_weight",
    "resume",
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
