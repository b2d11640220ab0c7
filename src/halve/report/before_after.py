"""Perplexity of a pruned checkpoint and of the model it was made from, on the same tokens, put on record beside it."""

import os
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from halve.checkpoint.directory import RECORD
from halve.checkpoint.load import Source, resolve
from halve.checkpoint.streamed import loaded_to_measure
from halve.checkpoint.validated import wrong
from halve.device import resolve_device
from halve.errors import InputError
from halve.evaluation.figure import Perplexity
from halve.evaluation.request import Evaluation
from halve.provenance import files_sha256, source_fields
from halve.recorded import Origin, Record
from halve.report.measured import add_perplexity, read_measured
from halve.report.schema import record_of

NO_DENSE = "none"
"""As the dense model: measure the pruned one alone."""


def measure(
    directory: str | Path,
    evaluation: Evaluation,
    *,
    dense: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[tuple[Perplexity, ...], tuple[Perplexity, ...]]:
    """Measure the perplexity of a pruned checkpoint and of its dense model, and put both on record.

    The models are in memory one after the other, or stay on disk where they would fill it. What is on record of the
    same text and windows is replaced.

    Args:
        directory: of the pruned checkpoint.
        evaluation: on what, and how.
        dense: the dense model, as `halve.checkpoint.load.resolve` takes it; None is the one that ``halve.json`` names,
            and ``none`` measures the pruned one alone, as is done where the dense one had been in memory.
        device: ``auto``, ``cpu``, ``cuda``, …
        trust_remote_code: whether to run Python code that comes with the models.

    Returns:
        tuple[tuple[Perplexity, ...], tuple[Perplexity, ...]]: the dense and the pruned model's, one entry a text; an
        empty tuple for the dense one where it was not measured.

    Raises:
        InputError: no ``halve.json``; the dense model is not where it was; a text is not usable, or does not fit.
        HalveError: a model cannot be loaded, see `halve.checkpoint.load.load_model`, or the record cannot be written.
    """
    place, target = Path(directory), resolve_device(device)
    evaluation.check(target)
    original = dense_source(place, dense, trust_remote_code=trust_remote_code)
    record = record_of(place, _Record)
    if original is not None:
        _check_same(original, record)
    with loaded_to_measure(resolve(place, trust_remote_code=trust_remote_code)) as pruned:
        texts = evaluation.texts(pruned, record.calibration.seq_len)
        after = evaluation.measure(pruned.model, texts, target, pruned.weights)
    del pruned  # one model in memory at a time
    before: tuple[Perplexity, ...] = ()
    if original is not None:
        with loaded_to_measure(original) as loaded:
            before = evaluation.measure(loaded.model, texts, target, loaded.weights)
    add_perplexity(place, before, after)
    return before, after


def dense_source(place: Path, dense: str | Path | None, *, trust_remote_code: bool = False) -> Source | None:
    """Find the files of the dense model of a pruned checkpoint; None where there are none, or none are wanted.

    Args:
        place: directory of the pruned checkpoint.
        dense: see `measure`.
        trust_remote_code: see `measure`.

    Raises:
        InputError: as `measure`; also where what would be written to is damaged, or cannot be written.
    """
    record_of(place, _Record)
    read_measured(place)  # a damaged one is to be told now
    if not os.access(place, os.W_OK):
        raise InputError(f"{place} cannot be written to: perplexities are put on record there")
    return find_dense(place, dense, trust_remote_code=trust_remote_code)


def find_dense(place: Path, dense: str | Path | None, *, trust_remote_code: bool = False) -> Source | None:
    """Find the files of the dense model of a pruned checkpoint that is only read; arguments as for `dense_source`.

    Raises:
        InputError: it is not there.
    """
    if dense is not None:
        return None if str(dense) == NO_DENSE else resolve(dense, trust_remote_code=trust_remote_code)
    source = record_of(place, _Record).source
    if source.kind == "memory":
        return None
    if source.kind == "hub" and source.revision is None:
        raise wrong(place / RECORD, "it does not say which revision was pruned", "give dense (--dense)")
    if source.kind == "hub":
        return resolve(source.name, revision=source.revision, trust_remote_code=trust_remote_code)
    if not Path(source.name).expanduser().exists():
        raise InputError(
            f"{place} was made from {source.name}, which is not here: say where that model is (--dense PATH), "
            f"or measure the pruned one alone (--dense {NO_DENSE})"
        )
    return resolve(source.name, trust_remote_code=trust_remote_code)


class _Calibration(Struct, frozen=True, kw_only=True):
    seq_len: Annotated[int, Meta(ge=2)] | None = None


class _Record(Record, frozen=True, kw_only=True):
    """What a measurement needs of a record."""

    source: Origin
    calibration: _Calibration


def was_pruned(place: Path, source: Source) -> bool:
    """Whether a model is, by the sha256 of its files, the one that a checkpoint was pruned from."""
    return record_of(place, _Record).source.sha256 == files_sha256(source_fields(source))


def _check_same(original: Source, record: _Record) -> None:
    """Refuse a model that is not the one that was pruned: its perplexity would be no "before"."""
    expected = record.source.sha256
    if expected is not None and files_sha256(source_fields(original)) != expected:
        raise InputError(
            f"{original.name} is not the model that was pruned, or was changed since: say where that one is "
            f"(--dense PATH), or measure the pruned one alone (--dense {NO_DENSE})"
        )
