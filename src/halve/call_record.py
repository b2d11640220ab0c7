"""The arguments of `halve.prune` as JSON values, and back: what `halve.resume` goes by."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halve.objective import Objective
from halve.pattern import Pattern
from halve.reconstruct import Reconstruction

_NOT_KEPT = {"out", "tokenizer", "listen", "work"}
"""Arguments that a run that goes on is given anew, finds in its directory, or cannot do with."""


def written_down(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `halve.prune` as JSON values; None if model, tokenizer or data are objects in memory."""
    places = {name: arguments[name] for name in ("model", "calibration", "offload")}
    if arguments["tokenizer"] is not None or not all(
        value is None or isinstance(value, str | Path) for value in places.values()
    ):
        return None
    objective, tuning, dtype = (arguments[name] for name in ("objective", "reconstruct", "dtype"))
    return {
        **{name: value for name, value in arguments.items() if name not in _NOT_KEPT},
        **{name: None if value is None else str(value) for name, value in places.items()},
        "pattern": Pattern.parse(arguments["pattern"]).text,
        "objective": asdict(objective or Objective()),
        "reconstruct": asdict(tuning) if isinstance(tuning, Reconstruction) else tuning,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def read_back(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `halve.prune` that `written_down` has kept, options among them."""
    arguments = dict(call)
    objective, tuning, dtype = (arguments.pop(name) for name in ("objective", "reconstruct", "dtype"))
    options = arguments.pop("options")
    return {
        **arguments,
        **options,
        "objective": Objective(**objective),
        "reconstruct": Reconstruction(**tuning) if isinstance(tuning, dict) else tuning,
        "dtype": None if dtype is None else getattr(torch, dtype),
    }
