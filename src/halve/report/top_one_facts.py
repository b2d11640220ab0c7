"""What the report says of top-1 accuracy, dense and pruned."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halve.report.measured import TopOneScore
from halve.versions import named_versions


@dataclass(frozen=True, kw_only=True)
class TopOneFacts:
    """One set of pictures; shares are from 0 to 1, ``before`` is None where the dense model was not measured.

    Attributes:
        source: of the pictures.
        before: share that the dense model has right.
        after: share that the pruned model has right.
        difference: of the two in points with its standard error, and the exact test, in words; empty where it is not
            known.
        pictures: number of pictures, in words.
        interval: confidence interval of ``after``, in words.
        how: dtype and image processor, in words.
        sha256: of the pictures.
        versions: of the packages that measured.
    """

    source: str
    before: float | None
    after: float
    difference: str
    pictures: str
    interval: str
    how: str
    sha256: str
    versions: str

    @property
    def title(self) -> str:
        """The name of the pictures without its directory."""
        return Path(self.source).name

    @property
    def measured_as(self) -> str:
        """Number of pictures, confidence interval, dtype and image processor."""
        return ", ".join(filter(None, [self.pictures, self.interval, self.how]))

    @classmethod
    def of(cls, entry: TopOneScore) -> "TopOneFacts":
        """Put what is on record into words.

        Raises:
            ValueError: more pictures are right than there are.
        """
        if max(entry.after, entry.before or 0, (entry.lost or 0) + (entry.gained or 0)) > entry.pictures:
            raise ValueError("`top_one` has more pictures right than there are")
        low, high = entry.interval
        change = entry.change
        said = f"{change}, {change.lost} lost, {change.gained} gained, p = {change.p_value:.2g}" if change else ""
        return cls(
            source=entry.source,
            before=None if entry.before is None else entry.before / entry.pictures,
            after=entry.after / entry.pictures,
            difference=said,
            pictures=f"{entry.pictures} pictures",
            interval=f"95 % interval {percent(low)} to {percent(high)}",
            how=", ".join(filter(None, [entry.dtype, entry.processor])),
            sha256=entry.sha256,
            versions=named_versions(entry.versions),
        )


def percent(share: float | None) -> str:
    """Return a share as per cent to two decimals; a dash for None."""
    return "—" if share is None else f"{100 * share:.2f} %"


def saw_pictures(calibration: Mapping[str, str]) -> bool:
    """Whether a record's calibration data, as texts, are pictures."""
    return "pictures" in calibration
