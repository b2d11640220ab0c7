"""Packing in one step: where integers of 4 bits are to be solved for first, a run does that beside the output."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from halve.checkpoint.directory import (
    CARD,
    MEASURED,
    PACKED,
    PAGE,
    RECORD,
    card_of_base,
    contained,
    is_sealed,
    refuse_packed,
    refuse_unfinished,
)
from halve.checkpoint.durable import file_chunks, sync_directory, write_file, writing
from halve.checkpoint.load import resolve
from halve.checkpoint.shards import read_json
from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.model.plan import place_of
from halve.option_groups import fill, group
from halve.packed.read import check_new
from halve.packed.write import PackResult, pack_checkpoint
from halve.pruning import prune_as
from halve.recorded import Record, pattern_of, read_record
from halve.report.card import leave_beside, rounded_card
from halve.report.schema import MatrixEntry
from halve.run.events import Listener
from halve.run.request import Loading, Placement, Request
from halve.run.settings import Settings
from halve.runtime.quantised_matrix import Values, bits_of, check_values, quantised_bytes
from halve.solve.outcome import Status
from halve.text.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What packing can be told besides.

    Attributes:
        calibration: the text on which integers of 4 bits are solved for; None rounds each weight to the nearest.
        placement: where the work is done, and in which precision.

    Raises:
        InputError: an option is given that has no effect.
    """

    calibration: Calibration | None = group(None)
    placement: Placement = group(factory=Placement)

    def __post_init__(self) -> None:
        if self.calibration is not None and self.calibration.source is None:
            raise InputError("samples and the like go with calibration, which names no text: give it, or leave all out")
        if self.calibration is None and self.placement != Placement():
            raise InputError("nothing is solved for without calibration, wherever that is: give it, or leave all out")
        if self.placement.work is not None or self.placement.workers is not None:
            raise InputError("work and workers are for halve prune: leave them out")


_WEIGHTS = ".safetensors"
WITHOUT = ("work", "workers", "worker_threads")
"""Options of the groups that packing does not take."""


def pack(
    directory: str | Path,
    out: str | Path,
    pattern: str | Pattern | None = None,
    *,
    values: Values = "own",
    trust_remote_code: bool = False,
    listen: Callable[[int, int, str], None] | None = None,
    solving: Listener | None = None,
    **options: Any,
) -> PackResult:
    """Pack the pruned matrices of a checkpoint, and quantise them if asked; everything else is taken along as it is.

    With ``calibration``, integers of 4 bits are first solved for on the text. The weights are those of pruning the
    checkpoint with method ``magnitude`` and refit ``int4``, which is not kept; the record stays that of ``directory``,
    and has solving as another rounding. What can go wrong with the report or the card is in the result's ``notes``.

    Args:
        directory: of a plain checkpoint.
        out: the directory to write, absent or empty; taken back if anything fails.
        pattern: that the matrices have, where no ``halve.json`` says which were pruned, and to what. Then the weights
            of all linear layers in the model's blocks that have it are packed.
        values: ``own`` keeps the weights as they are, ``bf16`` does and refuses others. ``int8`` and ``int4`` round
            each to the nearest integer of a scale that 64 columns share.
        trust_remote_code: whether to accept a model that comes with Python code of its own, and, with calibration data,
            to run it.
        listen: told after every matrix how many are packed, how many there are, and its name.
        solving: called with a `halve.run.events.Progress` at every step of solving for integers.
        **options: of `Calibration` and `Placement` by their flat names, or the groups themselves.

    Raises:
        InputError: as `halve.packed.write.pack_checkpoint`; calibration data that nothing is solved for with, or that
            cannot be used.
        UnsupportedModelError, CorruptFileError: as `halve.packed.write.pack_checkpoint` and `halve.prune`.
        CalibrationError: as `halve.prune`.
        HalveError: the volume is full, or failed.
    """
    check_values(values)
    wanted = None if pattern is None else Pattern.parse(pattern)
    asked = fill(PackOptions, options)
    place, target = Path(directory).expanduser(), Path(out).expanduser()
    if asked.calibration is None:
        return _packed(place, target, wanted, values, trust_remote_code, listen)
    request = _request(place, target, wanted, values, asked, trust_remote_code=trust_remote_code)
    inside = target.is_dir()
    above = next(path for path in (target.resolve(), *target.resolve().parents) if path.exists())
    with writing(above):
        folder = TemporaryDirectory(prefix=f".{target.name}-", dir=above, ignore_cleanup_errors=True)
    with folder as name:
        solved, packed = Path(name) / "solved", Path(name) / "packed"
        try:
            notes = list(prune_as(place, solved, request, listen=solving).notes)
        except HalveError as error:
            error.unfinished = None  # what is finished goes with the folder
            raise
        notes += _told_as_rounding(place, solved, target)
        own = _taken_over(place, solved)
        notes = [note for note in notes if note != own]
        result = _packed(solved, packed if inside else target, None, values, trust_remote_code, listen)
        if inside:
            _move(packed, target)
    if Path(name).exists():
        notes.append(f"{name}, in which was solved for integers, could not be removed: remove it")
    notes += [note.replace(f"{solved}/", f"{place}/") for note in result.notes]
    return replace(result, out=target, notes=tuple(dict.fromkeys(notes)))


def _told_as_rounding(place: Path, solved: Path, out: Path) -> list[str]:
    """Give what was solved for the record of what it was made of, to which solving adds a rounding, and a card.

    The weights are still of the method, the trainings and the merges before, and so is what was calibrated on.

    Returns:
        list[str]: what there is to say, sentences.
    """
    before, after = read_json(place / RECORD), read_json(solved / RECORD)
    old, new = before.get("files") or {}, after["files"]
    rounding = {
        "values": after["refit"],
        "weights_before": {name: old[name] for name in sorted(old.keys() & new.keys()) if name.endswith(_WEIGHTS)},
        "calibration": after["calibration"],
        "mean_relative_loss": after["mean_relative_loss"],
    }
    told = "the kept weights were made integers of 4 bits, solved for on text, after all else here was measured"
    warnings = [*before.get("warnings", []), *after.get("warnings", []), told]
    record = before | {
        "files": new,
        "quantised": [*before.get("quantised", []), rounding],
        "warnings": list(dict.fromkeys(warnings)),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    with writing(solved):
        write_file(solved / RECORD, [text.encode()], RECORD)
        for name in (MEASURED, PAGE):  # of solving alone
            (solved / name).unlink(missing_ok=True)
    return leave_beside(solved, None, out)[1]


def _taken_over(place: Path, solved: Path) -> str:
    """Take a card that somebody has changed over to what was solved for; return what was said of leaving it out."""
    if not (place / CARD).is_file() or is_sealed(place / CARD):
        return ""
    with writing(solved):
        write_file(solved / CARD, file_chunks(contained(place, place / CARD)), "card")
    return card_of_base(place)[1]


def _move(packed: Path, out: Path) -> None:
    """Move a packed checkpoint into an empty directory of the same volume, its manifest last; all of it or nothing."""
    names = sorted((path.name for path in packed.iterdir()), key=lambda name: name == PACKED)
    moved = []
    try:
        with writing(out):
            for name in names:
                (packed / name).rename(out / name)
                moved.append(name)
            sync_directory(out)
    except BaseException:
        for name in moved:
            (out / name).rename(packed / name)
        raise


def _packed(
    place: Path,
    out: Path,
    pattern: str | Pattern | None,
    values: Values,
    trust_remote_code: bool,
    listen: Callable[[int, int, str], None] | None,
) -> PackResult:
    card = partial(rounded_card, place, values)
    return pack_checkpoint(
        place, out, pattern, values=values, trust_remote_code=trust_remote_code, card=card, listen=listen
    )


class _Dense(Record, frozen=True, kw_only=True):
    """What is read of the record besides."""

    matrices: tuple[MatrixEntry, ...] = ()
    excluded: tuple[dict[str, Any], ...] = ()
    tower: str | None = None


def _request(
    place: Path,
    out: Path,
    pattern: str | Pattern | None,
    values: Values,
    asked: PackOptions,
    *,
    trust_remote_code: bool,
) -> Request:
    """Return the run that solves for integers, everything checked that can be before it."""
    if values != "int4":
        raise InputError(
            f"calibration decides integers of 4 bits, and values is {values}: give int4 (--values int4), or leave "
            "calibration out"
        )
    if not place.is_dir():
        raise InputError(f"{place} is not a directory: give the directory of a pruned checkpoint")
    refuse_packed(place)
    refuse_unfinished(place)
    if not (place / RECORD).is_file():
        raise InputError(
            f"{place} has no {RECORD}, which says what was pruned in it: give the checkpoint that `halve prune` wrote, "
            "or leave calibration out"
        )
    record = read_record(place, _Dense)
    found = pattern_of(record, place)
    if found is None:
        raise InputError(f"nothing was pruned in {place}: there is nothing to pack")
    if pattern is not None and pattern != found:
        raise InputError(f"{place / RECORD} says that the matrices are {found}, not {pattern}: leave the pattern out")
    bits_of(values, found)
    source = resolve(place, trust_remote_code=trust_remote_code)
    sizes = [each.shape for each in record.matrices if each.status is not Status.FAILED]
    saved = sum(2 * d_out * d_in - quantised_bytes(d_out, d_in, 4) for d_out, d_in in sizes)  # of 16 bits at least
    check_new(out, source, 2 * source.size - saved)
    left = [str(entry.get("name")) for entry in record.excluded]
    failed = [each.name.partition("[")[0] for each in record.matrices if each.status is Status.FAILED]
    settings = Settings(
        pattern=found,
        method="magnitude",
        refit="int4",
        fallback="magnitude",
        skip=tuple(dict.fromkeys([*(name for name in left if place_of(name)[0] is not None), *failed])),
        tower=record.tower,
        least_prunable=0.0,
    )
    assert asked.calibration is not None  # noqa: S101 - the caller has looked
    request = Request(
        settings=settings,
        calibration=asked.calibration,
        placement=asked.placement,
        loading=Loading(trust_remote_code=trust_remote_code),
    )
    request.check()
    return request
