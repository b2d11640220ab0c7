"""The command ``halve report``, and the options by which other commands measure perplexity at their end."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.errors import reporting
from halve.cli.options import DeviceOption, FieldOption, ForwardOption, TrustOption
from halve.cli.terminal import err, out, say
from halve.errors import InputError

if TYPE_CHECKING:
    from halve.evaluation.perplexity import Perplexity
    from halve.evaluation.request import Evaluation

EvalDataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-data", help="Then measure perplexity, dense and pruned: wikitext2, c4, or a file. Repeatable."
    ),
]
EvalSeqLenOption = Annotated[
    int | None, typer.Option(help="Window length of that measurement.", show_default="as in calibration")
]
EvalWindowsOption = Annotated[int | None, typer.Option(help="Only the first windows of each text.")]
DenseOption = Annotated[
    str | None,
    typer.Option(help="The dense model, or none to leave it out.", show_default="the one that was pruned"),
]


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Pruned checkpoints; several are compared.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="First measure perplexity, dense and pruned, on wikitext2, c4 or a file. Repeatable."),
    ] = None,
    seq_len: EvalSeqLenOption = None,
    max_windows: EvalWindowsOption = None,
    dense: DenseOption = None,
    page: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write.", show_default="DIR/report.html; comparison.html for several"),
    ] = None,
    field: FieldOption = "text",
    device: DeviceOption = "auto",
    forward_dtype: ForwardOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Write the report of a pruned checkpoint again, or a page that compares several."""
    from halve.evaluation.request import Evaluation
    from halve.report.before_after import dense_source, measure
    from halve.report.page import COMPARISON, cautions, check_page, write_comparison, write_report

    with reporting():
        if not data and any(option is not None for option in (seq_len, max_windows, dense)):
            raise InputError("--seq-len, --max-windows and --dense go with a text to measure on: give --data")
        check_page(directories, page)
        if data:
            evaluation = Evaluation(data, seq_len, max_windows, field, forward_dtype)
            for directory in directories:
                dense_source(directory, dense, trust_remote_code=trust_remote_code)  # before a long measurement
            for directory in directories:
                if len(directories) > 1:
                    say(out, f"{directory}:")
                say_scores(
                    *measure(directory, evaluation, dense=dense, device=device, trust_remote_code=trust_remote_code)
                )
                write_report(directory)
        if len(directories) == 1:
            written = write_report(directories[0], page)
        else:
            written = write_comparison(directories, COMPARISON if page is None else page)
            for caution in cautions(directories):
                say(err, caution, label="warning", style="yellow")
    say(out, f"written: {written}")


def evaluation_of(
    data: list[str] | None, seq_len: int | None, max_windows: int | None, field: str, forward_dtype: str
) -> "Evaluation | None":
    """Return what a pruning command is to measure at its end, None if nothing.

    Raises:
        InputError: options of a measurement without a text to measure on.
    """
    from halve.evaluation.request import Evaluation

    if data:
        return Evaluation(data, seq_len, max_windows, field, forward_dtype)
    if seq_len is not None or max_windows is not None:
        raise InputError("--eval-seq-len and --max-windows go with a text to measure perplexity on: give --eval-data")
    return None


def say_scores(before: "tuple[Perplexity, ...]", after: "tuple[Perplexity, ...]") -> None:
    """Say perplexities, dense and pruned, a line a text."""
    from halve.evaluation.perplexity import measured_as

    for index, score in enumerate(after):
        change = f"{before[index].value:.3f} → {score.value:.3f}" if before else f"{score.value:.3f}"
        how = measured_as(score.windows, score.seq_len, score.dtype)
        say(out, f"perplexity {Path(score.source).name}: {change} ({how})")
        if score.note:
            say(err, score.note, label="note")
