"""Packing in one step: where integers of 4 bits are to be solved for first, a run does that beside the output."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from halve.checkpoint.directory import RECORD, refuse_packed, refuse_unfinished
from halve.checkpoint.load import resolve
from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.model.plan import place_of
from halve.option_groups import fill, group
from halve.packed.read import check_new
from halve.packed.write import PackResult, pack_checkpoint
from halve.pruning import prune_as
from halve.recorded import Record, pattern_of, read_record
from halve.report.card import rounded_card
from halve.report.page import write_report
from halve.report.schema import MatrixEntry
from halve.run.events import Listener
from halve.run.request import Loading, Placement, Request
from halve.run.settings import Settings
from halve.runtime.quantised_matrix import QUANTISED, Values, bits_of
from halve.solve.outcome import Status
from halve.text.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What packing can be told besides.

    Attributes:
        calibration: on what integers of 4 bits are solved for; None rounds each weight to the nearest.
        placement: where they are.

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

    With ``calibration``, integers of 4 bits are first solved for on the text: the same as pruning the checkpoint with
    method ``magnitude`` and refit ``int4``, and packing what comes out, which is not kept.

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
    asked = fill(PackOptions, options)
    place, target = Path(directory).expanduser(), Path(out).expanduser()
    if asked.calibration is None:
        return _packed(place, target, pattern, values, trust_remote_code, listen)
    request = _request(place, target, pattern, values, asked, trust_remote_code=trust_remote_code)
    above = next(path for path in target.resolve().parents if path.exists())
    with TemporaryDirectory(prefix=f".{target.name}-", dir=above, ignore_cleanup_errors=True) as name:
        solved = Path(name) / "solved"
        try:
            prune_as(place, solved, request, listen=solving)
        except HalveError as error:
            error.unfinished = None  # what is finished goes with the folder
            raise
        write_report(solved, place=target)
        return _packed(solved, target, None, values, trust_remote_code, listen)


def _packed(
    place: Path,
    out: Path,
    pattern: str | Pattern | None,
    values: Values,
    trust_remote_code: bool,
    listen: Callable[[int, int, str], None] | None,
) -> PackResult:
    card = rounded_card(place, values) if values in QUANTISED and (place / RECORD).is_file() else None
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
    if pattern is not None and Pattern.parse(pattern) != found:
        raise InputError(f"{place / RECORD} says that the matrices are {found}, not {pattern}: leave the pattern out")
    bits_of(values, found)
    check_new(out, resolve(place, trust_remote_code=trust_remote_code), 0)
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
