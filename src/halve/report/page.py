"""``report.html``: one self-contained page about a run, or about several side by side.

A page opens offline and asks for nothing: Plotly's script is in it, and its content security policy forbids requests.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from halve.checkpoint.directory import PAGE
from halve.checkpoint.durable import write_file, writing
from halve.errors import InputError, counted
from halve.report import charts
from halve.report.facts import PerplexityFacts, RunFacts, read_run
from halve.report.top_one_facts import TopOneFacts, percent

COMPARISON = "comparison.html"
MOST_ROWS = 2000
"""Matrices listed in a page; of more than that, those that lost most."""
MOST_TRAININGS = 20
"""Trainings told of in a page; of more than that, the last ones."""


def write_report(directory: str | Path, out: str | Path | None = None, *, place: Path | None = None) -> Path:
    """Write the report of one pruned checkpoint.

    Args:
        directory: of the checkpoint.
        out: the file to write; None is ``report.html`` in ``directory``.
        place: where the page says that the checkpoint lies, for one that is going to be moved; None is ``directory``.

    Returns:
        Path: the file.

    Raises:
        InputError: ``directory`` has no ``halve.json``, or ``out`` is a directory.
        CorruptFileError: what Halve left there was damaged.
        HalveError: the page could not be written.
    """
    run = read_run(Path(directory))
    target = Path(directory) / PAGE if out is None else Path(out)
    return _write(target, run_page(run if place is None else replace(run, directory=place)))


def check_page(directories: Sequence[str | Path], out: str | Path | None) -> None:
    """Check that a page about these checkpoints could be written, before anything long is done.

    Args:
        directories: of the checkpoints.
        out: the file to write, None for the usual one.

    Raises:
        InputError, CorruptFileError: as `write_report` and `write_comparison`.
    """
    places = [Path(directory) for directory in directories]
    if len({place.resolve() for place in places}) < len(places):
        raise InputError("a directory is given twice: a comparison needs different ones")
    for place in places:
        read_run(place)
    if out is not None:
        _check_target(Path(out))


def write_comparison(directories: Sequence[str | Path], out: str | Path = COMPARISON) -> Path:
    """Write a page that compares pruned checkpoints.

    Args:
        directories: of the checkpoints, at least two.
        out: the file to write.

    Returns:
        Path: the file.

    Raises:
        InputError: fewer than two directories, one twice, or as `write_report`.
        CorruptFileError, HalveError: as `write_report`.
    """
    places = [Path(directory) for directory in directories]
    if len({place.resolve() for place in places}) < max(2, len(places)):
        raise InputError("a comparison needs at least two different directories: give each once")
    return _write(Path(out), comparison_page([read_run(place) for place in places]))


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise InputError(f"{target} is a directory: give the name of a file to write")


def _write(target: Path, page: str) -> Path:
    _check_target(target)
    with writing(target):
        write_file(target, [page.encode(errors="replace")], "page")
    return target


def run_page(run: RunFacts) -> str:
    """Return the page of one run."""
    gigabytes = {phase: value / 1e9 for phase, value in run.memory.items()}
    figures = {
        "loss": charts.loss_by_layer(run),
        "training_loss": charts.training(run.trainings, "loss", most=MOST_TRAININGS),
        "training_kl": charts.training(run.trainings, "kl", most=MOST_TRAININGS),
        "training_perplexity": charts.training(run.trainings, "perplexity", most=MOST_TRAININGS),
        "reconstruction": charts.reconstruction(run),
        "seconds": charts.bars(run.seconds, "seconds"),
        "memory": charts.bars(gigabytes, "GB"),
    }
    listed = run.matrices
    if len(listed) > MOST_ROWS:
        listed = tuple(sorted(listed, key=lambda matrix: -(matrix.loss or 0.0))[:MOST_ROWS])
    return _render("run.html.j2", figures, run=run, listed=listed, trainings=run.trainings[-MOST_TRAININGS:])


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """Return the page that compares runs."""
    named = _named(runs)
    texts = list(dict.fromkeys(_same_text(score) for run in runs for score in run.perplexity))
    scores = {name: {_same_text(score): score for score in run.perplexity} for name, run in named.items()}
    seen = list(dict.fromkeys(_same_pictures(score) for run in runs for score in run.top_one))
    accuracies = {name: {_same_pictures(score): score for score in run.top_one} for name, run in named.items()}
    figures = {"losses": charts.losses_of_runs(named)}
    values = {
        "runs": named,
        "texts": texts,
        "scores": scores,
        "pictures": seen,
        "accuracies": accuracies,
        "sees": all(run.sees for run in runs),
        "trained": any(run.trainings for run in runs),
    }
    return _render("comparison.html.j2", figures, cautions=_cautions(named), **values)


def _same_text(score: PerplexityFacts) -> tuple[str, str, str]:
    """Return what must be equal for two perplexities to be comparable, and how to name it."""
    return score.title, score.measured_as, score.sha256


def _same_pictures(score: TopOneFacts) -> tuple[str, str, str]:
    """Return what must be equal for two accuracies to be comparable, and how to name it."""
    return score.title, ", ".join(filter(None, [score.pictures, score.how])), score.sha256


def _named(runs: Sequence[RunFacts]) -> dict[str, RunFacts]:
    """Name runs by their directory, as much of it as tells them apart."""
    for depth in range(1, 1 + max(len(run.directory.resolve().parts) for run in runs)):
        names = ["/".join(run.directory.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def cautions(directories: Sequence[str | Path]) -> list[str]:
    """Return what stands in the way of comparing pruned checkpoints, a sentence each.

    Args:
        directories: of the checkpoints.

    Raises:
        InputError, CorruptFileError: as `write_report`.
    """
    return _cautions(_named([read_run(Path(directory)) for directory in directories]))


def _cautions(runs: Mapping[str, RunFacts]) -> list[str]:
    found = []
    if len({run.model for run in runs.values()}) > 1:
        found.append("The runs pruned different models.")
    if len({run.pattern for run in runs.values()}) > 1:
        found.append("The runs have different patterns.")
    if len({run.calibration.get("sha256") for run in runs.values()}) > 1:
        found.append("The runs were calibrated on different data.")
    if matching := [name for name, run in runs.items() if run.matches_dense]:
        found.append(
            f"The losses of {', '.join(matching)} are against targets from the dense model (match_dense): they cannot "
            "be compared with losses of other runs."
        )
    if trained := [name for name, run in runs.items() if run.trainings and run.mean_loss is not None]:
        found.append(f"The losses of {', '.join(trained)} are of before the training.")
    return found


def _render(template: str, figures: Mapping[str, charts.Figure | None], **values: Any) -> str:
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    text = json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")  # no tag can end the script that holds it
    return (
        _templates()
        .get_template(template)
        .render(
            charts=drawn,
            charts_json=Markup(text),  # noqa: S704 - escaped above
            plotly=Markup(_plotly()),  # noqa: S704 - from the installed package
            style=Markup(_part("page.css")),  # noqa: S704 - ours
            script=Markup(_part("page.js")),  # noqa: S704 - ours
            **values,
        )
    )


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("halve.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "counted": counted,
        "number": number,
        "memory": memory,
        "percent": percent,
        "shell": shlex.quote,
        "python": repr,
    }
    return environment


@cache
def _plotly() -> str:
    return resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")


def _part(name: str) -> str:
    return resources.files("halve.report").joinpath("templates", name).read_text(encoding="utf-8")


def number(value: float | None, digits: int = 4) -> Markup:
    """Return a number rounded for the eye, in an element that holds it exactly; a dash for None."""
    if value is None:
        return Markup('<span aria-hidden="true">—</span><span class="visually-hidden">not measured</span>')
    if math.isinf(value):
        return Markup('<data value="Infinity">infinite</data>')
    return Markup('<data value="{}">{}</data>').format(repr(value), f"{value:.{digits}f}")


def memory(value: int) -> Markup:
    """Return bytes as gigabytes, in an element that holds the bytes."""
    return Markup('<data value="{}">{}</data>').format(value, f"{value / 1e9:.2f} GB")
