"""Several methods on one model, one calibration set and the same texts: one row each."""

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from halve.checkpoint import write
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.room import check_destination
from halve.errors import HalveError, InputError
from halve.evaluation.figure import Perplexity
from halve.evaluation.perplexity import perplexity
from halve.model.reconstruct import BLOCK, parse_reconstruction
from halve.provenance import environment
from halve.report.card import leave_beside
from halve.report.measured import add_perplexity
from halve.report.page import COMPARISON, write_comparison
from halve.report.record import finite, settings_json
from halve.run.contender import Contender
from halve.run.directory import open_run
from halve.run.events import Progress, announce, writing_told_to
from halve.run.phases import Phase
from halve.run.request import Request
from halve.text.limits import check_fits
from halve.text.pairs import PairSet
from halve.text.tokens import TokenSet
from halve.whole_model import as_written, find, load_found, prune_loaded

DENSE = "dense"
METHODS = ("magnitude", "wanda", "wanda+cg", "sparsegpt", "sparsegpt+cg", "auto+cg")
"""What is compared where nobody says."""

_NAMED = "name it with the methods, as in wanda+cg+block"
OF_ONE_METHOD = {
    "method": _NAMED,
    "refit": _NAMED,
    "reconstruct": _NAMED,
    "reconstruct_epochs": "give it in method_options, under block",
    "reconstruct_learning_rate": "give it in method_options, under block",
    "reconstruct_held_out": "give it in method_options, under block",
    "only_where_faster": "all contenders are pruned alike",
    "faster_at_batch": "all contenders are pruned alike",
    "keep_dense": "all contenders are pruned alike",
    "keep_dense_tokens": "all contenders are pruned alike",
    "work": "a comparison that was stopped is not continued",
    "stream": "the dense model is in memory, and a copy of it is pruned",
    "workers": "contenders are pruned by this process: prune with workers, then use halve report on several",
    "worker_threads": "contenders are pruned by this process",
}
"""Options of `halve.prune` that a comparison does not take, and what to do instead."""

CompareListener = Callable[[Contender | None, Progress], None]
"""Called with the contender that runs, None before the first, and its progress."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one contender achieved.

    Attributes:
        name: the contender, or ``dense``.
        perplexities: one for each evaluation text; empty if the contender failed.
        mean_relative_loss: mean over the matrices; None for the dense model, or if nothing was measured.
        seconds: of pruning, without copying the model, writing and evaluation.
        phases: by phase of the run (`halve.run.events.RunReport`), those of writing among them.
        fallbacks: number of matrices pruned by another method than asked.
        warnings: sentences the user should read.
        error: why the contender failed, empty if it did not.
    """

    name: str
    perplexities: tuple[Perplexity, ...] = ()
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
        calibration: tokens or pairs, the same for all.
        evaluation: texts to evaluate on.
        out: directory under which each pruned checkpoint is written, and ``comparison.html`` in the end; None to
            write none.
        listen: called at every step of pruning.

    Attributes:
        calibration: see above.
        evaluation: see above.
        rows: what is finished so far.

    Raises:
        InputError: there is nothing to compare or to evaluate on, tokens do not fit the model, or ``out`` cannot be
            written to (`check_destinations`).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        requests: Mapping[Contender, Request],
        calibration: TokenSet | PairSet,
        evaluation: Sequence[TokenSet],
        *,
        out: Path | None = None,
        listen: CompareListener | None = None,
    ) -> None:
        if not requests or not evaluation:
            raise InputError("there is nothing to compare: give at least one contender and one evaluation text")
        for texts in (*([] if isinstance(calibration, PairSet) else [calibration]), *evaluation):
            check_fits(texts, loaded.model)
        self.calibration = calibration
        self.evaluation = tuple(evaluation)
        self.rows: list[Row] = []
        self._loaded = loaded
        self._requests = requests
        self._any = next(iter(requests.values()))  # they differ in their settings alone
        self._out = out
        self._listen = listen
        self._complete: list[Path] = []
        self._dense: tuple[Perplexity, ...] = ()
        if out is not None:
            needed = write.output_bytes(loaded, self._any.loading.written_dtype)
            check_destinations(out, requests, loaded.source, needed)

    def __iter__(self) -> Iterator[Row]:
        """Measure the dense model, then prune and measure for one contender after the other; done once."""
        if self.rows:  # what is finished is not done again
            yield from self.rows
            return
        self._dense = self._measure(self._loaded.model)
        yield self._finished(Row(name=DENSE, perplexities=self._dense))
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
            "calibration": {
                "source": self.calibration.source,
                "samples": self.calibration.samples,
                "seq_len": self.calibration.seq_len,
                "bos": self.calibration.bos,
                "sha256": self.calibration.sha256,
                "seed": self._any.calibration.seed,
            },
            "environment": environment(),
            "contenders": {
                str(contender): settings_json(request.settings) for contender, request in self._requests.items()
            },
            "rows": [_row_json(row, self._dense) for row in self.rows],
        }

    def _finished(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def _measure(self, model: nn.Module) -> tuple[Perplexity, ...]:
        placement = self._any.placement
        return tuple(
            perplexity(model, text, device=placement.target, forward_dtype=placement.forward_dtype)
            for text in self.evaluation
        )

    def _compete(self, contender: Contender, request: Request) -> Row:
        gc.collect()  # the previous copy, should it sit in a reference cycle: at most two models at a time
        place = None if self._out is None else checkpoint_directory(self._out, contender)
        candidate = replace(self._loaded, model=copy.deepcopy(self._loaded.model))
        row = Row(name=str(contender))

        def tell(step: Progress) -> None:
            if self._listen is not None:
                self._listen(contender, step)

        try:
            with nullcontext() if place is None else open_run(place) as run:
                pruned = prune_loaded(candidate, self.calibration, request, run, listen=tell)
            report = pruned.report
            row = replace(
                row,
                mean_relative_loss=finite(report.mean_relative_loss),
                seconds=report.seconds_of_pruning,
                fallbacks=len(report.fallbacks),
                warnings=(*self._loaded.notes, *report.warnings),
                phases=report.seconds,
            )
            row = replace(row, perplexities=self._measure(as_written(candidate, pruned, request).model))
            if place is not None:
                row = replace(row, warnings=(*row.warnings, *self._put_on_record(place, row.perplexities)))
        except HalveError as error:
            row = replace(row, error=str(error))
        return row

    def _put_on_record(self, place: Path, after: tuple[Perplexity, ...]) -> tuple[str, ...]:
        """Write what was measured of a checkpoint; what stands in the way of that is no failure of the contender."""
        self._complete.append(place)
        try:
            add_perplexity(place, self._dense, after)
            _, notes = leave_beside(place, None)
            if len(self._complete) > 1 and self._out is not None:
                write_comparison(self._complete, self._out / COMPARISON)
        except HalveError as error:
            return (f"pruned and measured, but not put on record: {error}",)
        return tuple(notes)


def compare(
    model: nn.Module | str | Path,
    data: Sequence[str | Path],
    *,
    methods: Sequence[str | Contender] = METHODS,
    out: str | Path | None = None,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    listen: CompareListener | None = None,
    **options: Any,
) -> Comparison:
    """Prune a model with several methods, calibrated on the same tokens, and measure each on the same texts.

    Everything is checked, the model loaded and the texts tokenised at the call; the work is done as the rows of the
    result are asked for: ``for row in halve.compare(…)``.

    Args:
        model: a model in memory, which stays as it is, a local directory, a ``.gguf`` file, or a hub id.
        data: texts to measure perplexity on.
        methods: ``wanda`` is as published, ``wanda+cg`` adds a refit, ``+block`` tunes blocks.
        out: directory under which each pruned checkpoint is written, to ``out/METHOD``, and ``comparison.html``; new
            or empty. None writes nothing.
        method_options: options by name of a method, a refit (``{"cg": {"max_iterations": 200}}``) or ``block``.
        tokenizer: for a model in memory; otherwise the checkpoint's own.
        listen: called at every step.
        **options: those of `halve.prune` that do not belong to one method, such as ``samples`` and ``device``, and
            ``eval_seq_len`` and ``eval_max_windows`` for the windows of the texts.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        HalveError: as `halve.prune`.
    """
    contenders = [each if isinstance(each, Contender) else Contender.parse(each) for each in methods]
    if options.keys() & {"eval_data", "evaluation"}:
        raise InputError("texts to measure on are the argument data, their windows eval_seq_len and eval_max_windows")
    requests = make_requests(contenders, method_options or {}, eval_data=list(data), **options)
    asked = next(iter(requests.values()), None)
    if asked is None or asked.evaluation is None:
        raise InputError("there is nothing to compare: give at least one contender and one evaluation text")
    asked.check_texts()
    place = None if out is None else Path(out)
    source = find(model, asked, writes=place is not None)
    if place is not None and isinstance(source, Source):
        check_destinations(place, requests, source, source.size)
    loaded = load_found(source, tokenizer)
    texts = asked.evaluation.texts(loaded, asked.calibration.length)
    tell = None if listen is None else partial(listen, None)
    if asked.calibration.is_self_written:
        announce(tell, Phase.GENERATE)
    found = asked.calibration.data(loaded, writing_told_to(tell))
    if not isinstance(found, TokenSet | PairSet):
        raise InputError("calibration is a list of batches, and a comparison needs tokens: give text or token ids")
    return Comparison(loaded, requests, found, texts, out=place, listen=listen)


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


def make_requests(
    contenders: Sequence[Contender], method_options: Mapping[str, Mapping[str, Any]], **options: Any
) -> dict[Contender, Request]:
    """Check every contender's settings before any work.

    Args:
        contenders: what to compare.
        method_options: options by name of a method, a refit or ``block``; each contender gets those that concern it.
        **options: those of `halve.prune` that all have in common.

    Raises:
        InputError: a contender is named twice, an option belongs to none, or any setting is not usable.
    """
    if twice := next((contender for contender, count in Counter(contenders).items() if count > 1), None):
        raise InputError(f"{twice} is named twice among the methods to compare: name it once")
    known = {name for contender in contenders for name in (contender.method, contender.refit)} - {"none"}
    if any(contender.reconstruct for contender in contenders):
        known.add(BLOCK)
    if stray := sorted(set(method_options) - known):
        raise InputError(f"options for {stray[0]!r} belong to none of the compared: {', '.join(sorted(known))}")
    for name, instead in OF_ONE_METHOD.items():
        if options.get(name) is not None:
            raise InputError(f"{name} is no option of a comparison: {instead}")
    common = Request.of(options)
    for name in common.settings.options:
        raise InputError(f"{name} belongs to one method or refit: give it in method_options, by that one's name")
    found = {}
    for contender in contenders:
        of_refit = {f"refit_{name}": value for name, value in method_options.get(contender.refit, {}).items()}
        own = {**method_options.get(contender.method, {}), **of_refit}
        contender.check_option_names(own)
        tuning = parse_reconstruction(BLOCK, **method_options.get(BLOCK, {})) if contender.reconstruct else None
        settings = replace(
            common.settings, method=contender.method, refit=contender.refit, options=own, reconstruction=tuning
        )
        found[contender] = replace(common, settings=settings)
    return found


def _row_json(row: Row, dense: tuple[Perplexity, ...]) -> dict[str, Any]:
    of_dense = dense if row.name != DENSE else (None,) * len(dense)
    scores = [score.as_json(first) for score, first in zip(row.perplexities, of_dense, strict=False)]
    times = {
        "seconds": round(row.seconds, 2),
        "phases": {phase: round(seconds, 2) for phase, seconds in row.phases.items()},
    }
    return {**asdict(row), "perplexities": scores, **times, "warnings": list(row.warnings)}


def checkpoint_directory(parent: Path, contender: Contender) -> Path:
    """Return where ``compare --out`` writes a contender's checkpoint."""
    return parent / str(contender).replace("+", "-")
