"""The command that measures: ``halve eval``."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from halve.checkpoint.directory import is_packed
from halve.checkpoint.load import LoadedModel, Source, has_tokenizer, resolve
from halve.checkpoint.streamed import ALWAYS, AUTO, NEVER, check_stream, loaded_to_measure
from halve.checks import check_count
from halve.cli.errors import reporting
from halve.cli.options import DeviceOption, JsonOption, TrustOption, taking
from halve.cli.terminal import err, out, progress_bar, say
from halve.device import forward_precision, resolve_device
from halve.errors import InputError
from halve.evaluation.figure import Perplexity, said_difference
from halve.evaluation.request import Evaluation
from halve.evaluation.top_one import ImageEvaluation, TopOne
from halve.versions import named_versions

if TYPE_CHECKING:
    import torch

    from halve.evaluation.tasks import TaskResults, TaskSet


@dataclass(frozen=True)
class _Measured:
    """What one model came to."""

    model: str
    perplexities: list[Perplexity]
    tasks: "TaskResults | None"
    top_one: TopOne | None = None


_OF_IMAGES = ("images", "max_images")


@taking(Evaluation, ImageEvaluation)
def evaluate_command(
    models: Annotated[list[str], typer.Argument(help="Directories, .gguf files or hub ids, one or more to compare.")],
    given: dict[str, Any],
    tasks: Annotated[
        str | None,
        typer.Option(help="For accuracy: groups such as wanda-7, openllm-v1, or tasks of lm-eval; comma-separated."),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(help="Task definitions of your own (YAML). They can run Python code: read them first."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first examples of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question.", show_default="the task's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of --tasks: requests in one forward.")] = 8,
    device: DeviceOption = "auto",
    stream: Annotated[
        str, typer.Option(help="Leave the weights on disk: always, never, or auto, where they would fill the memory.")
    ] = AUTO,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity (--data), accuracy on tasks (--tasks) or pictures (--images) of one model, or of several.

    A packed checkpoint is measured on the CPU, and all others beside it, by the products that its packed layers decode
    by, which round inputs where it holds integers.
    """
    measured: list[_Measured] = []
    with reporting():
        packed = [model for model in models if is_packed(Path(model).expanduser())]
        place = _place_of(packed, device, stream)
        if 0 < len(packed) < len(models) and resolve_device(device) != place:
            say(err, f"every model is measured on the CPU, as {packed[0]} has to be", label="note", style="yellow")
        forward_precision(given.get("forward_dtype", Evaluation.forward_dtype), place)
        check_count("batch_size", batch_size)
        check_stream(stream)
        if tasks is not None and stream == ALWAYS:
            raise InputError("--tasks runs the whole model for every batch, so that its weights cannot stay on disk")
        of_tasks = {"tasks-path": tasks_path, "limit": limit, "num-fewshot": num_fewshot}
        _check_wanted(given, tasks, of_tasks)
        of_text = {name: value for name, value in given.items() if name not in _OF_IMAGES}
        evaluation = Evaluation(**of_text) if given.get("data") else None
        if evaluation is not None:
            evaluation.check(place)
        shared = {name: given[name] for name in (*_OF_IMAGES, "forward_dtype") if name in given}
        pictures = ImageEvaluation(**shared) if "images" in given else None
        if pictures is not None:
            pictures.check(place)
        reads = evaluation is not None or tasks is not None
        sources = [_resolve(model, trust_remote_code=trust_remote_code, reads=reads) for model in models]
        opened = None if tasks is None else _open_tasks(tasks, tasks_path, limit, num_fewshot)
        try:
            for source in sources:
                settings = {"device": place, "forward_dtype": given.get("forward_dtype", Evaluation.forward_dtype)}
                measured.append(_measure(source, evaluation, pictures, opened, batch_size, settings, stream))
        finally:  # what is finished is worth having, whatever stopped the rest
            if as_json and measured:
                out.print_json(json.dumps([entry for one in measured for entry in _entries(one, measured[0])]))
            else:
                _show(measured)


def _place_of(packed: list[str], device: str, stream: str) -> "torch.device":
    """Return where to run, which for packed checkpoints is the CPU.

    Raises:
        InputError: a packed checkpoint is asked to run elsewhere, or with its weights on disk.
    """
    if packed and (device not in {"auto", "cpu"} or stream == ALWAYS):
        asked = "with its weights on disk" if stream == ALWAYS else f"on {device}"
        raise InputError(
            f"{packed[0]} is packed, and measured on the CPU in memory, not {asked}: restore the plain checkpoint with "
            f"`halve unpack {packed[0]} --out DIR`, and give that"
        )
    return resolve_device("cpu" if packed else device)


def _check_wanted(given: dict[str, Any], tasks: str | None, of_tasks: dict[str, Any]) -> None:
    images = given.get("images")
    if not given.get("data") and tasks is None and images is None:
        raise InputError(
            "nothing to measure: give --data for perplexity, --tasks or --images for accuracy, or several of them"
        )
    if given.get("data") and "seq_len" not in given:
        raise InputError("--data needs --seq-len: perplexities depend on it, so there is no default")
    of_data = {name.replace("_", "-"): given.get(name) for name in ("seq_len", "max_windows", "text_field", "bos")}
    of_images = {"max-images": given.get("max_images")}
    for flag, wanted, others in (
        ("--data", given.get("data"), of_data),
        ("--tasks", tasks, of_tasks),
        ("--images", images, of_images),
    ):
        idle = [name for name, value in others.items() if not wanted and value is not None]
        if idle:
            raise InputError(f"--{idle[0]} is for {flag}, which is not given: leave it out, or give {flag}")


def _resolve(model: str, *, trust_remote_code: bool, reads: bool) -> Source:
    if is_packed(Path(model).expanduser()):
        from halve.packed.read import open_packed

        source = open_packed(model, trust_remote_code=trust_remote_code).source
    else:
        source = resolve(model, trust_remote_code=trust_remote_code)
    if reads and not has_tokenizer(source):
        raise InputError(f"{model} has no tokenizer, and text needs one: put its files beside the weights")
    return source


def _open_tasks(tasks: str, tasks_path: Path | None, limit: int | None, num_fewshot: int | None) -> "TaskSet":
    from halve.evaluation.tasks import open_tasks

    say(err, "reading the tasks …")
    names = [name.strip() for name in tasks.split(",")]
    return open_tasks(names, tasks_path=tasks_path, limit=limit, num_fewshot=num_fewshot)


def _measure(
    source: Source,
    evaluation: Evaluation | None,
    images: ImageEvaluation | None,
    tasks: "TaskSet | None",
    batch_size: int,
    settings: dict[str, Any],
    stream: str,
) -> _Measured:
    wide = settings["forward_dtype"] == "float32"
    with _loaded(source, stream if tasks is None else NEVER, wide=wide) as loaded:
        if tasks is not None:
            from halve.evaluation.harness import check_model

            check_model(loaded.model, loaded.tokenizer)
        perplexities: list[Perplexity] = []
        if evaluation is not None:
            texts = evaluation.texts(loaded, None)
            perplexities += evaluation.measure(loaded.model, texts, settings["device"], loaded.weights)
        seen = None if images is None else images.measure(loaded, images.ready(loaded), settings["device"])
        if tasks is None:
            return _Measured(source.name, perplexities, None, seen)
        from halve.evaluation.tasks import measure_tasks

        with _progress(source.name) as show:
            scores = measure_tasks(
                loaded.model, loaded.tokenizer, tasks, batch_size=batch_size, **settings, progress=show
            )
        return _Measured(source.name, perplexities, scores, seen)


@contextmanager
def _loaded(source: Source, stream: str, *, wide: bool) -> Iterator[LoadedModel]:
    """Load a model to measure it, a packed one with the products that it decodes by, in float32 if they are wide."""
    if source.kind != "packed":
        with loaded_to_measure(source, stream) as loaded:
            yield loaded
        return
    import torch

    from halve.packed.load import load
    from halve.runtime.linear import multiplied_as_decoded

    dtype = torch.float32 if wide else None
    loaded = load(source.path, dtype=dtype, trust_remote_code=source.trust_remote_code, one_call=False)
    for note in loaded.notes:
        say(err, note, label="note", style="yellow")
    with multiplied_as_decoded(loaded.model):
        yield loaded


@contextmanager
def _progress(model: str) -> Iterator[Any]:
    """Show a bar on a terminal, and nothing elsewhere."""
    if not err.is_terminal:
        yield None
        return
    # Bound to the stream of now: while lm-eval runs, sys.stderr goes nowhere, for its own bars.
    with progress_bar(Console(file=sys.stderr)) as bar:
        task = bar.add_task(model, total=None, last="")

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{Path(model).name}: {name}", completed=done, total=total)

        yield show


def _entries(measured: _Measured, first: _Measured) -> Iterator[dict[str, Any]]:
    """Return what ``--json`` prints of a model: an entry a perplexity, one of top-1, and one of all tasks."""
    for index, result in enumerate(measured.perplexities):
        of_first = None if measured is first else first.perplexities[index]
        yield {"model": measured.model, **result.as_json(of_first)}
    if measured.top_one is not None:
        yield {"model": measured.model, **measured.top_one.as_json(None if measured is first else first.top_one)}
    if measured.tasks is not None:
        from halve.cli.task_tables import task_entry

        yield {"model": measured.model, **task_entry(measured.tasks, first.model, first.tasks or measured.tasks)}


def _show(measured: list[_Measured]) -> None:
    if any(one.perplexities for one in measured):
        out.print(_perplexity_table(measured))
    accuracies = [one.top_one for one in measured if one.top_one is not None]
    if accuracies:
        from halve.cli.task_tables import top_one_table

        out.print(top_one_table([one.model for one in measured], accuracies))
    notes = [result.note for one in measured for result in one.perplexities]
    results = [one.tasks for one in measured if one.tasks is not None]
    if results:
        from halve.cli.task_tables import paired_tables, score_table, sentences

        names = [one.model for one in measured]
        out.print(score_table(names, results), *paired_tables(names, results), sep="\n")
        notes += sentences(names, results)
    for note in dict.fromkeys(filter(None, notes)):
        say(out, note, label="note")


def _perplexity_table(measured: list[_Measured]) -> Table:
    """Return a row a model and text; with several models, the differences of the logarithms to the first one's."""
    several = len(measured) > 1
    apart = [Column(Text(f"logarithm - {Path(measured[0].model).name}'s"), justify="right")] if several else []
    meant = ["± standard error over the windows, paired; empty where the tokens differ"] if several else []
    scored = dict.fromkeys(result.scored for one in measured for result in one.perplexities if result.scored)
    meant += [f"of encoder-decoders {how}" for how in scored]
    by = named_versions(measured[0].perplexities[0].versions)
    table = Table(
        "model",
        "data",
        "perplexity",
        *apart,
        "sequence length",
        "windows",
        "BOS",
        "dtype",
        "seconds",
        caption=Text("; ".join([*meant, by])),
    )
    for one in measured:
        for index, result in enumerate(one.perplexities):
            first = measured[0].perplexities[index]
            known = one is not measured[0] and result.pairs_with(first)
            differences = [said_difference(*result.minus(first)) if known else ""] if several else []
            table.add_row(
                Text(one.model),
                Text(result.source),
                f"{result.value:.3f}",
                *differences,
                str(result.seq_len),
                str(result.windows),
                result.bos,
                result.dtype,
                f"{result.seconds:.1f}",
            )
    return table
