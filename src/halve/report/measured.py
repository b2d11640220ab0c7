"""``halve-measured.json``: what was measured of a run and is another number the next time — times, memory, perplexity.

It lies beside ``halve.json``, which holds what equal runs have in common.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from halve.checkpoint.directory import MEASURED
from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.shards import read_json
from halve.checkpoint.validated import validated, wrong
from halve.evaluation.figure import Perplexity, paired_difference, rounded
from halve.evaluation.top_one import Change, TopOne, wilson
from halve.recorded import MOST
from halve.report.record import finite
from halve.run.events import RunReport

FORMAT = 1
"""Version of the layout of ``halve-measured.json``."""

_SAME_TEXT = ("source", "tokens_sha256")
_OF_ONE = {"value", "nll", "seconds", "window_nll"}  # of a perplexity, kept under other names, or not at all
_OF_DENSE = ("before", "before_nll", "before_windows", "dtype_before", "versions_before")
_REMEDY = "remove it, and times and perplexities will be missing"


def measured_json(report: RunReport) -> dict[str, Any]:
    """Return what a run took, as plain JSON values.

    Args:
        report: the run, all but finished: what comes after is not counted.
    """
    taken = measured_by_phase(report.seconds, report.peak_memory, report.peak_device_memory)
    return taken | {
        "resumed_blocks": report.resumed_blocks,
        "matrix_seconds": {m.name: round(m.facts["seconds"], 4) for m in report.matrices if "seconds" in m.facts},
        "workers": [asdict(worker) | {"shards": list(worker.shards)} for worker in report.workers],
    }


def measured_by_phase(
    seconds: Mapping[str, float], peak_memory: Mapping[str, int], peak_device_memory: Mapping[str, int]
) -> dict[str, Any]:
    """Return what anything took that leaves a checkpoint, a training say, as plain JSON values.

    Args:
        seconds: wall-clock, by phase.
        peak_memory: bytes of resident memory, by phase.
        peak_device_memory: bytes on a GPU, by phase; empty without one.
    """
    return {
        "format": FORMAT,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory": dict(peak_memory),
        "peak_device_memory": dict(peak_device_memory),
        "resumed_blocks": 0,
        "matrix_seconds": {},
        "perplexity": [],
    }


class Score(Struct, frozen=True, kw_only=True):
    """Perplexity of one text, dense and pruned.

    Attributes:
        source: of the text.
        seq_len: tokens in a window.
        windows: number of windows.
        dtype: that the pruned model was measured in.
        dtype_before: that the dense model was measured in, None where it was not measured.
        bos: which windows begin with BOS (`halve.text.tokens.TokenSet`), empty where that is not known.
        scored: what of each window is scored, empty for all of it.
        tokens_sha256: of the tokens measured.
        before: the dense model's, None where it is not known, or not finite.
        before_nll: its logarithm.
        after: the pruned model's.
        after_nll: its logarithm.
        before_windows: the dense model's mean loss of each window, in nats a token, to 6 decimals.
        after_windows: the pruned model's.
        versions: of the packages that measured the pruned model.
        versions_before: of those that measured the dense one.
    """

    source: str
    seq_len: float
    windows: float
    dtype: str = ""
    dtype_before: str | None = None
    bos: str = ""
    scored: str = ""
    tokens_sha256: str
    before: float | None = None
    before_nll: float | None = None
    after: float | None = None
    after_nll: float | None = None
    before_windows: tuple[float, ...] | None = None
    after_windows: tuple[float, ...] | None = None
    versions: dict[str, str] = {}
    versions_before: dict[str, str] | None = None

    @property
    def log_difference(self) -> tuple[float, float | None] | None:
        """By how much pruning raised the logarithm, and its paired standard error; None where that is not known."""
        before, after = self.before_windows, self.after_windows
        if not before or not after or len(before) != len(after):
            return None
        return paired_difference(after, before)


class TopOneScore(Struct, frozen=True, kw_only=True):
    """Top-1 accuracy on one set of pictures, dense and pruned.

    Attributes:
        source: of the pictures.
        pictures: number of them.
        sha256: of their pixels and classes.
        dtype: that the pruned model was measured in.
        processor: class of the image processor.
        before: pictures that the dense model has right, None where it was not measured.
        after: pictures that the pruned model has right.
        lost: pictures that only the dense model has right.
        gained: pictures that only the pruned model has right.
        versions: of the packages that measured the pruned model.
    """

    source: str
    pictures: Annotated[int, Meta(ge=1)]
    sha256: str = ""
    dtype: str = ""
    processor: str = ""
    before: Annotated[int, Meta(ge=0)] | None = None
    after: Annotated[int, Meta(ge=0)]
    lost: Annotated[int, Meta(ge=0)] | None = None
    gained: Annotated[int, Meta(ge=0)] | None = None
    versions: dict[str, str] = {}

    @property
    def change(self) -> Change | None:
        """How the two models differ on the same pictures; None where that is not known."""
        known = self.lost is not None and self.gained is not None
        return Change(self.lost or 0, self.gained or 0, self.pictures) if known else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the pruned model's accuracy."""
        return wilson(min(self.after, self.pictures), self.pictures)


class WorkerSeconds(Struct, frozen=True, kw_only=True):
    """What one of several workers did (`halve.run.events.WorkerReport`)."""

    number: float
    node: str
    shards: tuple[float, ...]
    seconds: dict[str, float]
    waited: float


class Measured(Struct, frozen=True, kw_only=True):
    """What a checkpoint's ``halve-measured.json`` says; what ``measured_json`` says of a run, and what was measured."""

    format: int = FORMAT
    finished: str = ""
    seconds: dict[str, float] = {}
    peak_memory: dict[str, float] = {}
    peak_device_memory: dict[str, float] = {}
    resumed_blocks: float = 0
    matrix_seconds: dict[str, float] = {}
    workers: tuple[WorkerSeconds, ...] = ()
    perplexity: tuple[Score, ...]
    top_one: tuple[TopOneScore, ...] = ()

    def numbers(self) -> Iterator[float | None]:
        """Yield every number."""
        for group in (self.seconds, self.peak_memory, self.peak_device_memory, self.matrix_seconds):
            yield from group.values()
        yield self.resumed_blocks
        for worker in self.workers:
            yield from (worker.number, *worker.shards, *worker.seconds.values(), worker.waited)
        for each in self.top_one:
            yield from (each.pictures, each.before, each.after, each.lost, each.gained)
        for score in self.perplexity:
            yield from (score.seq_len, score.windows, score.before, score.before_nll, score.after, score.after_nll)
            yield from (*(score.before_windows or ()), *(score.after_windows or ()))


def read_measured(directory: Path) -> Measured:
    """Return what a checkpoint's ``halve-measured.json`` says: nothing was measured where there is none.

    Raises:
        CorruptFileError: the file is malformed.
        UnreadableFileError: it cannot be read.
    """
    path = directory / MEASURED
    return _checked(read_json(path), path) if path.exists() else Measured(perplexity=())


def _checked(content: dict[str, Any], path: Path) -> Measured:
    found = validated(content, Measured, path, _REMEDY)
    if found.format != FORMAT:
        raise wrong(path, f"its format is {found.format}, and this version of Halve reads {FORMAT}", _REMEDY)
    for number in found.numbers():
        if number is not None and not abs(number) < MOST:
            raise wrong(path, f"{number} is nothing that was measured", _REMEDY)
    return found


def write_measured(directory: Path, content: Mapping[str, Any]) -> str:
    """Write ``halve-measured.json`` whole or not at all, and return its sha256.

    Raises:
        HalveError: the volume is full or failed.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with writing(directory):
        return write_file(directory / MEASURED, [text.encode()], "measured")


def _on_record(directory: Path) -> dict[str, Any]:
    """Return what was measured of a checkpoint, checked; where nothing was, an empty record.

    Raises:
        CorruptFileError: as `read_measured`.
    """
    path = directory / MEASURED
    content: dict[str, Any] = read_json(path) if path.exists() else {"format": FORMAT, "perplexity": []}
    _checked(content, path)
    return content


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
    content = _on_record(directory)
    for index, score in enumerate(after):
        facts = {name: value for name, value in asdict(score).items() if name not in _OF_ONE}
        windows = rounded(score.window_nll)
        entry = {**facts, "after": finite(score.value), "after_nll": score.nll, "after_windows": windows}
        same = [old for old in content["perplexity"] if all(old[key] == entry[key] for key in _SAME_TEXT)]
        if before:
            dense = before[index]
            entry |= {
                "before": finite(dense.value),
                "before_nll": dense.nll,
                "before_windows": rounded(dense.window_nll),
                "dtype_before": dense.dtype,
                "versions_before": dict(dense.versions),
            }
        else:
            known = same[-1] if same else {}
            entry |= {name: known.get(name) for name in _OF_DENSE}
        content["perplexity"] = [*[old for old in content["perplexity"] if old not in same], entry]
    write_measured(directory, content)


def add_top_one(directory: Path, before: TopOne | None, after: TopOne) -> None:
    """Put the top-1 accuracy on record; that of the same pictures is replaced.

    Args:
        directory: of the pruned checkpoint.
        before: the dense model's, None where it was not measured.
        after: the pruned model's.

    Raises:
        CorruptFileError: as `read_measured`.
        HalveError: as `write_measured`.
    """
    content = _on_record(directory)
    entry = {name: value for name, value in asdict(after).items() if name not in ("right", "seconds")}
    change = None if before is None else after.minus(before)
    entry |= {
        "pictures": after.pictures,
        "before": None if before is None else sum(before.right),
        "after": sum(after.right),
        "lost": None if change is None else change.lost,
        "gained": None if change is None else change.gained,
    }
    kept = [old for old in content.get("top_one", []) if old["sha256"] != after.sha256]
    write_measured(directory, {**content, "top_one": [*kept, entry]})
