"""Several methods on one model, one calibration set and the same texts or pictures: one row each."""

import copy
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from halve.checkpoint import write
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.room import check_destination
from halve.errors import HalveError, InputError
from halve.evaluation.figure import Perplexity
from halve.evaluation.perplexity import perplexity
from halve.evaluation.top_one import TopOne
from halve.images.labelled import LabelledPictures
from halve.images.picture_set import PictureSet
from halve.provenance import environment
from halve.report.card import leave_beside
from halve.report.measured import add_perplexity, add_top_one
from halve.report.page import COMPARISON, write_comparison
from halve.report.record import finite, settings_json
from halve.run.contender import Contender, make_requests
from halve.run.directory import open_run
from halve.run.events import Listener, Progress, announce, writing_told_to
from halve.run.phases import Phase, Phases
from halve.run.request import Request
from halve.text.calibration import refuse_text
from halve.text.calibration_record import calibration_record
from halve.text.limits import check_fits
from halve.text.pairs import PairSet
from halve.text.tokens import TokenSet
from halve.whole_model import as_written, choose_dense, find, load_found, prune_loaded

if TYPE_CHECKING:
    from halve.sensitivity.keep_dense import KeepDense

DENSE = "dense"
METHODS = ("magnitude", "wanda", "wanda+cg", "sparsegpt", "sparsegpt+cg", "auto+cg")
"""What is compared where nobody says."""

_NOTHING = (
    "there is nothing to compare: give at least one contender, and a text to measure perplexity on (data) or pictures "
    "with their classes (eval_images)"
)
CompareListener = Callable[[Contender | None, Progress], None]
"""Called with the contender that runs, None before the first, and its progress."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one contender achieved.

    Attributes:
        name: the contender, or ``dense``.
        perplexities: one for each evaluation text; empty if the contender failed.
        top_one: accuracy on the pictures; None without any, and if the contender failed.
        mean_relative_loss: mean over the matrices; None for the dense model, or if nothing was measured.
        seconds: of pruning, without copying the model, writing and evaluation.
        phases: by phase of the run (`halve.run.events.RunReport`), those of writing among them. Measuring what stays
            dense for its cost is done once, and counts for every contender that it serves.
        fallbacks: number of matrices pruned by another method than asked.
        warnings: sentences the user should read.
        error: why the contender failed, empty if it did not.
    """

    name: str
    perplexities: tuple[Perplexity, ...] = ()
    top_one: TopOne | None = None
    mean_relative_loss: float | None = None
    seconds: float = 0.0
    fallbacks: int = 0
    warnings: tuple[str, ...] = ()
    error: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)


class Comparison:
    """What `compare` returns: iterate over it for the rows, the dense model's first, as each is finished.

    A contender that fails has a row with its ``error``, and the others go on.

    Args:
        loaded: the dense model; it stays as it is, a copy is pruned (so twice its memory is needed).
        requests: what to compare, and how to prune for it (`make_requests`).
        calibration: tokens, pairs or pictures, the same for all.
        evaluation: texts to evaluate on.
        pictures: with their classes, to measure top-1 accuracy on; None measures none.
        out: directory under which each pruned checkpoint is written, and ``comparison.html`` in the end; None to
            write none.
        listen: called at every step of pruning.

    Attributes:
        calibration: see above.
        evaluation: see above.
        pictures: see above.
        rows: what is finished so far.

    Raises:
        InputError: there is nothing to compare or to evaluate on, tokens do not fit the model, or ``out`` cannot be
            written to (`check_destinations`).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        requests: Mapping[Contender, Request],
        calibration: TokenSet | PairSet | PictureSet,
        evaluation: Sequence[TokenSet],
        *,
        pictures: LabelledPictures | None = None,
        out: Path | None = None,
        listen: CompareListener | None = None,
    ) -> None:
        if not requests or not (evaluation or pictures):
            raise InputError(_NOTHING)
        for texts in (*([calibration] if isinstance(calibration, TokenSet) else []), *evaluation):
            check_fits(texts, loaded.model)
        self.calibration = calibration
        self.evaluation = tuple(evaluation)
        self.pictures = pictures
        self.rows: list[Row] = []
        self._loaded = loaded
        self._requests = requests
        self._any = next(iter(requests.values()))  # they differ in their settings alone
        self._out = out
        self._listen = listen
        self._complete: list[Path] = []
        self._dense = Row(name=DENSE)
        self._kept: dict[tuple[str, int], tuple[KeepDense | None, float, tuple[str, ...]]] = {}
        if out is not None:
            needed = write.output_bytes(loaded, self._any.loading.written_dtype)
            check_destinations(out, requests, loaded.source, needed)

    def __iter__(self) -> Iterator[Row]:
        """Measure the dense model, then prune and measure for one contender after the other; done once."""
        if self.rows:  # what is finished is not done again
            yield from self.rows
            return
        self._dense = self._measured(self._dense, self._loaded)
        yield self._finished(self._dense)
        for contender, request in self._requests.items():
            yield self._finished(self._compete(contender, request))

    @property
    def pattern(self) -> str:
        """What all prune to."""
        return self._any.settings.pattern.text

    def as_json(self) -> dict[str, Any]:
        """Return the record of what is finished as plain JSON values; numbers that are not finite become None."""
        source = self._loaded.source
        return {
            "model": type(self._loaded.model).__name__ if source is None else source.name,
            "pattern": self.pattern,
            "calibration": {**_calibration_json(self.calibration), "seed": self._any.calibration.seed},
            "environment": environment(),
            "contenders": {
                str(contender): settings_json(request.settings) for contender, request in self._requests.items()
            },
            "rows": [_row_json(row, self._dense) for row in self.rows],
        }

    def _finished(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def _measured(self, row: Row, loaded: LoadedModel) -> Row:
        placement, images = self._any.placement, self._any.image_evaluation
        scores = tuple(
            perplexity(loaded.model, text, device=placement.target, forward_dtype=placement.forward_dtype)
            for text in self.evaluation
        )
        row = replace(row, perplexities=scores)
        if images is None or self.pictures is None:
            return row
        return replace(row, top_one=images.measure(loaded, self.pictures, placement.target))

    def _chosen(self, request: Request, listen: Listener) -> tuple[Request, Phases, tuple[str, ...]]:
        """Return a request with the choice of what stays dense, made once for all that ask for the same.

        With it the time that the choice took, and what there was to beware of.
        """
        asked, phases = request.settings.keep_dense, Phases(request.placement.target)
        if asked is None:
            return request, phases, ()
        cautions: list[str] = []

        def tell(step: Progress) -> None:
            cautions.extend([step.caution] if step.caution else [])
            listen(step)

        key = asked.amount, asked.tokens
        if key not in self._kept:
            begun = time.perf_counter()
            found = choose_dense(self._loaded, self.calibration, request.settings, request.placement.target, tell)
            self._kept[key] = found, time.perf_counter() - begun, tuple(cautions)
        found, phases.seconds[Phase.DAMAGE], said = self._kept[key]
        return replace(request, settings=replace(request.settings, keep_dense=found)), phases, said

    def _compete(self, contender: Contender, request: Request) -> Row:
        gc.collect()  # the previous copy, should it sit in a reference cycle: at most two models at a time
        place = None if self._out is None else checkpoint_directory(self._out, contender)
        row = Row(name=str(contender))

        def tell(step: Progress) -> None:
            if self._listen is not None:
                self._listen(contender, step)

        try:
            request, phases, cautions = self._chosen(request, tell)
            candidate = replace(self._loaded, model=copy.deepcopy(self._loaded.model))
            with nullcontext() if place is None else open_run(place) as run:
                pruned = prune_loaded(candidate, self.calibration, request, run, listen=tell, phases=phases)
            report = pruned.report
            row = replace(
                row,
                mean_relative_loss=finite(report.mean_relative_loss),
                seconds=report.seconds_of_pruning,
                fallbacks=len(report.fallbacks),
                warnings=(*self._loaded.notes, *cautions, *report.warnings),
                phases=report.seconds,
            )
            row = self._measured(row, as_written(candidate, pruned, request))
            if place is not None:
                row = replace(row, warnings=(*row.warnings, *self._put_on_record(place, row)))
        except HalveError as error:
            row = replace(row, error=str(error))
        return row

    def _put_on_record(self, place: Path, row: Row) -> tuple[str, ...]:
        """Write what was measured of a checkpoint; what stands in the way of that is no failure of the contender."""
        self._complete.append(place)
        try:
            if row.perplexities:
                add_perplexity(place, self._dense.perplexities, row.perplexities)
            if row.top_one is not None:
                add_top_one(place, self._dense.top_one, row.top_one)
            _, notes = leave_beside(place, None)
            if len(self._complete) > 1 and self._out is not None:
                write_comparison(self._complete, self._out / COMPARISON)
        except HalveError as error:
            return (f"pruned and measured, but not put on record: {error}",)
        return tuple(notes)


def compare(
    model: nn.Module | str | Path,
    data: Sequence[str | Path] = (),
    *,
    methods: Sequence[str | Contender] = METHODS,
    out: str | Path | None = None,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    listen: CompareListener | None = None,
    **options: Any,
) -> Comparison:
    """Prune a model with several methods, calibrated on the same data, and measure each on the same texts or pictures.

    Everything is checked, the model loaded and the texts tokenised at the call; the work is done as the rows of the
    result are asked for: ``for row in halve.compare(…)``.

    Args:
        model: a model in memory, which stays as it is, a local directory, a ``.gguf`` file, or a hub id.
        data: texts to measure perplexity on; none for a model that sees, with ``eval_images``.
        methods: ``wanda`` is as published, ``wanda+cg`` adds a refit, ``+block`` tunes blocks, ``+keep-dense=10%``
            leaves dense what costs most (``keep_dense`` does so for all whose name does not say it).
        out: directory under which each pruned checkpoint is written, to ``out/METHOD``, and ``comparison.html``; new
            or empty. None writes nothing.
        method_options: options by name of a method, a refit (``{"cg": {"max_iterations": 200}}``) or ``block``.
        tokenizer: of a model in memory, what turns data into tensors for it: its tokenizer, or the image processor of
            one that sees (the ``processing_class`` of transformers' Trainer); otherwise the checkpoint's own.
        listen: called at every step.
        **options: those of `halve.prune` that do not belong to one method, such as ``samples`` and ``device``,
            ``eval_seq_len`` and ``eval_max_windows`` for the windows of the texts, and ``eval_images`` and
            ``eval_max_images`` for pictures with their classes, on which top-1 accuracy is measured.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        HalveError: as `halve.prune`.
    """
    contenders = [each if isinstance(each, Contender) else Contender.parse(each) for each in methods]
    if options.keys() & {"eval_data", "evaluation"}:
        raise InputError("texts to measure on are the argument data, their windows eval_seq_len and eval_max_windows")
    if data:
        options["eval_data"] = list(data)
    requests = make_requests(contenders, method_options or {}, **options)
    asked = next(iter(requests.values()), None)
    if asked is None or (asked.evaluation is None and asked.image_evaluation is None):
        raise InputError(_NOTHING)
    asked.check_texts()
    place = None if out is None else Path(out)
    source = find(model, asked, writes=place is not None)
    if place is not None and isinstance(source, Source):
        check_destinations(place, requests, source, source.size)
    loaded = load_found(source, tokenizer)
    texts = [] if asked.evaluation is None else asked.evaluation.texts(loaded, asked.calibration.length)
    pictures = None if asked.image_evaluation is None else asked.image_evaluation.ready(loaded)
    tell = None if listen is None else partial(listen, None)
    if asked.calibration.is_self_written:
        refuse_text(loaded.model)
        announce(tell, Phase.GENERATE)
    found = asked.calibration.data(loaded, writing_told_to(tell))
    if not isinstance(found, TokenSet | PairSet | PictureSet):
        raise InputError(
            "calibration is a list of batches, and a comparison needs tokens or pictures: give text, token ids, a "
            "folder of pictures or a tensor of them"
        )
    return Comparison(loaded, requests, found, texts, pictures=pictures, out=place, listen=listen)


def check_destinations(out: Path, contenders: Iterable[Contender], source: Source | None, size: int) -> None:
    """Check that every contender's checkpoint can be written, before any work.

    Args:
        out: the directory under which they are written.
        contenders: what will be compared.
        source: the dense model's files, None for a model in memory.
        size: bytes of one checkpoint.

    Raises:
        InputError: a directory is in use, cannot be written, or the volume is too full for all.
    """
    places = [checkpoint_directory(out, contender) for contender in contenders]
    for place in places:
        check_destination(place, source, size * len(places))
    if (out / COMPARISON).is_dir():
        raise InputError(f"{out / COMPARISON} is a directory, where a file is going to be written: remove it")


def _calibration_json(data: TokenSet | PairSet | PictureSet) -> dict[str, Any]:
    if isinstance(data, PictureSet):
        return calibration_record(data)
    names = ("source", "samples", "seq_len", "bos", "sha256")
    return {name: getattr(data, name) for name in names}


def _row_json(row: Row, first: Row) -> dict[str, Any]:
    dense = first if row.name != DENSE else None
    of_dense = [None] * len(first.perplexities) if dense is None else dense.perplexities
    accuracy = None if row.top_one is None else row.top_one.as_json(None if dense is None else dense.top_one)
    scores = [score.as_json(other) for score, other in zip(row.perplexities, of_dense, strict=False)]
    times = {
        "seconds": round(row.seconds, 2),
        "phases": {phase: round(seconds, 2) for phase, seconds in row.phases.items()},
    }
    return {**asdict(row), "perplexities": scores, "top_one": accuracy, **times, "warnings": list(row.warnings)}


def checkpoint_directory(parent: Path, contender: Contender) -> Path:
    """Return where ``compare --out`` writes a contender's checkpoint."""
    return parent / str(contender).replace("+", "-").replace("=", "-")
