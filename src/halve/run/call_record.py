"""The arguments of `halve.prune` as JSON values, and back: what `halve.resume` goes by."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halve.errors import InputError
from halve.evaluation.request import Evaluation
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction
from halve.planner.where_faster import WhereFaster
from halve.solve.objective import Objective

_NOT_KEPT = {"out", "tokenizer", "listen", "work"}
"""Arguments that a run that goes on is given anew, finds in its directory, or cannot do with."""
_PLACES = ("model", "calibration", "offload")
"""Arguments that may be paths."""
_DIRECTORY = "directory"


def written_down(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `halve.prune` as JSON values, and the directory that relative paths among them are of.

    Args:
        arguments: checked ones, by name; options of method and refit under ``options``.

    Returns:
        dict[str, Any] | None: None if model, tokenizer or data are objects in memory.

    Raises:
        InputError: a value is none that JSON has.
    """
    places = {name: arguments[name] for name in _PLACES}
    if arguments["tokenizer"] is not None or not all(
        value is None or isinstance(value, str | Path) for value in places.values()
    ):
        return None
    objective, tuning, dtype = (arguments[name] for name in ("objective", "reconstruct", "dtype"))
    evaluation, faster = arguments["evaluation"], WhereFaster.of(arguments["only_where_faster"])
    texts = [] if evaluation is None else [str(text) for text in evaluation.data]
    call = {
        **{name: value for name, value in arguments.items() if name not in _NOT_KEPT},
        **{name: None if value is None else str(value) for name, value in places.items()},
        "pattern": Pattern.parse(arguments["pattern"]).text,
        "device": str(arguments["device"]),
        "objective": asdict(objective or Objective()),
        "reconstruct": asdict(tuning) if isinstance(tuning, Reconstruction) else tuning,
        "evaluation": None if evaluation is None else asdict(evaluation) | {"data": texts},
        "only_where_faster": None if faster is None else asdict(faster),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        _DIRECTORY: str(Path.cwd()) if any(_is_relative(value) for value in (*places.values(), *texts)) else None,
    }
    try:
        return dict(json.loads(json.dumps(call)))
    except TypeError as error:
        raise InputError(
            f"an argument cannot be kept for resuming the run ({error}): give plain Python numbers and strings"
        ) from error


def read_back(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `halve.prune` that `written_down` has kept, options among them.

    Raises:
        InputError: relative paths among them are of another directory than the current one.
    """
    arguments = dict(call)
    directory = arguments.pop(_DIRECTORY)
    if directory is not None and directory != str(Path.cwd()):
        raise InputError(f"the run was begun in {directory}, with paths relative to it: resume it from there")
    objective, tuning, dtype = (arguments.pop(name) for name in ("objective", "reconstruct", "dtype"))
    evaluation, options = arguments.pop("evaluation"), arguments.pop("options")
    faster = arguments.pop("only_where_faster", None)  # runs begun before there was such an argument have none
    return {
        **arguments,
        **options,
        "objective": Objective(**objective),
        "reconstruct": Reconstruction(**tuning) if isinstance(tuning, dict) else tuning,
        "evaluation": None if evaluation is None else Evaluation(**evaluation),
        "only_where_faster": None if faster is None else WhereFaster(**faster),
        "dtype": None if dtype is None else getattr(torch, dtype),
    }


def _is_relative(value: str | Path | None) -> bool:
    """Whether this is a path that depends on the current directory; names on the hub are none."""
    return value is not None and not Path(value).expanduser().is_absolute() and Path(value).exists()
