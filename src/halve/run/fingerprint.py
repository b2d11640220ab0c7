"""Everything that decides the bytes of a result, field by field: a run is only ever continued as it was begun."""

from typing import Any

import torch

from halve.checkpoint.load import LoadedModel
from halve.checkpoint.shards import hash_tensors
from halve.images.picture_set import PictureSet
from halve.provenance import Fingerprint, deciding_environment, flat, hash_text, source_fields
from halve.run.request import Request
from halve.serial import to_plain
from halve.text.calibration import CalibrationData
from halve.text.pairs import PairSet
from halve.text.tokens import TokenSet

_GROUPS = ("calibration", "placement", "loading")
WITHOUT_EFFECT = frozenset(
    {
        *("source", "samples", "seq_len", "text_field", "bos", "pair_fields", "span_corruption"),  # the tokens count
        *("revision", "trust_remote_code"),  # the files of the model do
        *("offload", "work", "stream"),  # where something is kept
        *("workers", "worker_threads"),  # who works; the threads are of the environment
        "least_prunable",  # whether a model is refused
        "fallback",  # may be added to a run that stopped without one, and is compared by itself
    }
)
"""Fields of what was asked for that cannot change a finished block by themselves, or that count otherwise."""


def fingerprint(loaded: LoadedModel, data: CalibrationData, request: Request) -> Fingerprint:
    """Return the fingerprint of a run that is about to start.

    Every field of what was asked for is in it but those of `WITHOUT_EFFECT` and what is measured before and after.

    Args:
        loaded: the dense model.
        data: calibration tokens, pairs or batches.
        request: what is asked for.
    """
    settings, device = request.settings, request.placement.target
    plain = to_plain(request)
    asked = plain["settings"]
    options = asked.pop("options") | settings.all_options
    others = {name: value for group in _GROUPS for name, value in plain[group].items()}
    fields: dict[str, Any] = {
        **flat("model", _model(loaded)),
        **flat("options", options),
        **flat("", {name: value for name, value in (asked | others).items() if name not in WITHOUT_EFFECT}),
        "calibration": _calibration(data),
        "device": device_name(device),
        "forward_dtype": request.placement.precision,
        **flat("environment", deciding_environment()),
    }
    return {name: str(value) for name, value in sorted(fields.items())}


def device_name(device: torch.device) -> str:
    """Return what of a device decides bytes: of a GPU, which one it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _model(loaded: LoadedModel) -> dict[str, str]:
    """Hash the files a model was read from, or its tensors if it was built in memory."""
    if loaded.source is not None:
        return {name.removeprefix("model."): value for name, value in source_fields(loaded.source).items()}
    return {
        "class": type(loaded.model).__name__,
        "config": hash_text(loaded.model.config.to_json_string()),
        "tensors": hash_tensors(sorted(loaded.model.state_dict().items())),
    }


def _calibration(data: CalibrationData) -> str:
    if isinstance(data, TokenSet | PairSet | PictureSet):
        return data.sha256
    return hash_tensors(named for batch in data for named in sorted(batch.items()))
