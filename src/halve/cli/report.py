"""The command ``halve report``, and how perplexities before and after are said."""

from pathlib import Path
from typing import Annotated, Any

import typer

from halve.cli.errors import reporting
from halve.cli.options import DeviceOption, TrustOption, taking
from halve.cli.terminal import err, out, say
from halve.errors import InputError
from halve.evaluation.figure import Perplexity, measured_as, said_difference
from halve.evaluation.request import Evaluation
from halve.evaluation.top_one import TopOne
from halve.report.before_after import dense_source, measure
from halve.report.card import write_card
from halve.report.page import COMPARISON, cautions, check_page, write_comparison, write_report
from halve.versions import named_versions

DenseOption = Annotated[
    str | None,
    typer.Option(help="The dense model, or none to leave it out.", show_default="the one that was pruned"),
]


@taking(Evaluation)
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Pruned checkpoints; several are compared.")
    ],
    given: dict[str, Any],
    dense: DenseOption = None,
    page: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write.", show_default="DIR/report.html; comparison.html for several"),
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Write the report and the model card of a pruned checkpoint again, or a page that compares several."""
    with reporting():
        if not given.get("data") and (dense is not None or given):
            idle = "dense" if not given else next(iter(given)).replace("_", "-")
            raise InputError(f"--{idle} goes with a text to measure on: give --data")
        check_page(directories, page)
        if given.get("data"):
            evaluation = Evaluation(**given)
            for directory in directories:
                dense_source(directory, dense, trust_remote_code=trust_remote_code)  # before a long measurement
            for directory in directories:
                if len(directories) > 1:
                    say(out, f"{directory}:")
                say_scores(
                    *measure(directory, evaluation, dense=dense, device=device, trust_remote_code=trust_remote_code)
                )
                write_report(directory)
                _write_card(directory)
        if len(directories) == 1:
            written = write_report(directories[0], page)
            if page is None and not given:
                _write_card(directories[0])
        else:
            written = write_comparison(directories, COMPARISON if page is None else page)
            for caution in cautions(directories):
                say(err, caution, label="warning", style="yellow")
    say(out, f"written: {written}")


def _write_card(directory: Path) -> None:
    if note := write_card(directory):
        say(err, note, label="note")


def say_scores(before: tuple[Perplexity, ...], after: tuple[Perplexity, ...]) -> None:
    """Say perplexities, dense and pruned, and how far their logarithms are apart, a line a text."""
    for index, score in enumerate(after):
        change = f"{before[index].value:.3f} → {score.value:.3f}" if before else f"{score.value:.3f}"
        how = measured_as(score.windows, score.seq_len, score.bos, score.dtype, score.scored)
        apart = ""
        if before and score.pairs_with(before[index]):
            apart = f", logarithm {said_difference(*score.minus(before[index]))}"
        say(out, f"perplexity {Path(score.source).name}: {change}{apart} ({how}; {named_versions(score.versions)})")
        if score.note:
            say(err, score.note, label="note")


def say_top_one(before: TopOne | None, after: TopOne | None) -> None:
    """Say top-1 accuracy, dense and pruned, and how far they are apart."""
    if after is None:
        return
    change = None if before is None else after.minus(before)
    first = "" if before is None else f"{100 * before.value:.2f} % → "
    low, high = after.interval
    apart = f", {change} ({change.lost} lost, {change.gained} gained, p = {change.p_value:.2g})" if change else ""
    how = f"{after.pictures} pictures, 95 % interval {100 * low:.2f} to {100 * high:.2f} %, {after.dtype}"
    say(out, f"top-1 {Path(after.source).name}: {first}{100 * after.value:.2f} %{apart} ({how})")
