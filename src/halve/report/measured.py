"""``halve-measured.json``: what was measured of a run and is another number the next time — times, memory, perplexity.

It lies beside ``halve.json``, which holds what equal runs have in common.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halve.checkpoint.directory import MEASURED
from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.shards import read_json
from halve.errors import CorruptFileError
from halve.evaluation.perplexity import Perplexity
from halve.report.record import finite
from halve.run.events import RunReport

FORMAT = 1
"""Version of the layout of ``halve-measured.json``."""

_SAME_TEXT = ("source", "tokens_sha256")
_MOST = 1e18
"""No second, byte or perplexity on record is larger, and every such number fits a float and an integer."""


def measured_json(report: RunReport) -> dict[str, Any]:
    """Return what a run took, as plain JSON values.

    Args:
        report: the run, all but finished: what comes after is not counted.
    """
    return {
        "format": FORMAT,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": {phase: round(value, 3) for phase, value in report.seconds.items()},
        "peak_memory": dict(report.peak_memory),
        "peak_device_memory": dict(report.peak_device_memory),
        "resumed_blocks": report.resumed_blocks,
        "matrix_seconds": {m.name: round(m.facts["seconds"], 4) for m in report.matrices if "seconds" in m.facts},
        "perplexity": [],
    }


def read_measured(directory: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's ``halve-measured.json``; only ``format`` and no perplexity without one.

    Raises:
        CorruptFileError: the file is malformed.
    """
    path = directory / MEASURED
    if not path.exists():
        return {"format": FORMAT, "perplexity": []}
    found = read_json(path)
    numbers = [found.get(name, {}) for name in ("seconds", "peak_memory", "peak_device_memory", "matrix_seconds")]
    sound = (
        found.get("format") == FORMAT
        and all(map(_is_numbers, numbers))
        and _is_number(found.get("resumed_blocks", 0))
        and _is_scores(found.get("perplexity"))
    )
    if not sound:
        raise CorruptFileError(
            f"{path} is not as Halve writes it: remove it, and times and perplexities will be missing"
        )
    return found


_NLL = ("before_nll", "after_nll")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def _is_scores(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("source"), str)
        and isinstance(entry.get("tokens_sha256"), str)
        and all(_is_number(entry.get(name)) for name in ("seq_len", "windows"))
        and all(entry.get(name) is None or _is_number(entry[name]) for name in ("before", "after", *_NLL))
        for entry in value
    )


def write_measured(directory: Path, content: Mapping[str, Any]) -> str:
    """Write ``halve-measured.json`` whole or not at all, and return its sha256.

    Raises:
        HalveError: the volume is full or failed.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with writing(directory):
        return write_file(directory / MEASURED, [text.encode()], "measured")


def add_perplexity(directory: Path, before: Sequence[Perplexity], after: Sequence[Perplexity]) -> None:
    """Put perplexities on record; those of the same text, cut into the same windows, are replaced.

    Args:
        directory: of the pruned checkpoint.
        before: the dense model's, empty where it was not measured: what is on record of it then stays.
        after: the pruned model's, text by text as ``before``.

    Raises:
        CorruptFileError: as `read_measured`.
        HalveError: as `write_measured`.
    """
    content = read_measured(directory)
    for index, score in enumerate(after):
        facts = {name: value for name, value in asdict(score).items() if name not in {"value", "nll", "seconds"}}
        entry = {**facts, "after": finite(score.value), "after_nll": score.nll}
        same = [old for old in content["perplexity"] if all(old[key] == entry[key] for key in _SAME_TEXT)]
        if before:
            dense = before[index]
            entry |= {"before": finite(dense.value), "before_nll": dense.nll, "dtype_before": dense.dtype}
        else:
            known = same[-1] if same else {}
            entry |= {name: known.get(name) for name in ("before", "before_nll", "dtype_before")}
        content["perplexity"] = [*[old for old in content["perplexity"] if old not in same], entry]
    write_measured(directory, content)
