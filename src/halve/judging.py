"""A run that judges itself: perplexity and top-1 accuracy of the dense model and of the pruned one, put on record."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from halve.checkpoint.load import LoadedModel
from halve.errors import HalveError
from halve.evaluation.figure import Perplexity
from halve.evaluation.request import overlap
from halve.evaluation.top_one import TopOne
from halve.report.card import leave_beside
from halve.report.measured import add_perplexity, add_top_one
from halve.run.directory import RunDirectory
from halve.run.events import Listener, announce
from halve.run.phases import Phase, Phases
from halve.run.request import Request
from halve.whole_model import Pruned, as_written

_RIGHT = "right"


def judge_of(
    loaded: LoadedModel, request: Request, run: RunDirectory | None, phases: Phases, listen: Listener | None
) -> "Judge | None":
    """Return what measures as a request says; None where it asks for nothing.

    Raises:
        InputError: a text or a picture's class does not fit the model, or it has no tokenizer or image processor.
    """
    if request.evaluation is None and request.image_evaluation is None:
        return None
    return Judge(loaded, request, run, phases, listen)


class Judge:
    """Measures before and after: the dense model once, however often the run is stopped.

    Args:
        loaded: the model, dense as yet.
        request: what is asked for.
        run: what keeps the dense model's figures; None keeps none.
        phases: what the time counts towards.
        listen: told what is about to be done.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        request: Request,
        run: RunDirectory | None,
        phases: Phases,
        listen: Listener | None,
    ) -> None:
        self._loaded = loaded
        self._request = request
        self._run = run
        self._phases = phases
        self._listen = listen
        evaluation, images = request.evaluation, request.image_evaluation
        self._texts = [] if evaluation is None else evaluation.texts(loaded, request.calibration.length)
        self._pictures = None if images is None else images.ready(loaded)
        self._before: tuple[tuple[Perplexity, ...], TopOne | None] = ((), None)

    def measure_dense(self) -> None:
        """Measure the dense model, or take what was measured before the run was stopped."""
        asked = self._asked()
        kept = None if self._run is None else self._run.measured(asked)
        if kept is not None:
            perplexities = tuple(
                Perplexity(**entry | {"window_nll": tuple(entry["window_nll"])})
                for entry in kept
                if _RIGHT not in entry
            )
            accuracies = [TopOne(**entry | {_RIGHT: tuple(entry[_RIGHT])}) for entry in kept if _RIGHT in entry]
            self._before = perplexities, next(iter(accuracies), None)
            return
        announce(self._listen, Phase.EVALUATE)
        with self._phases.timing(Phase.EVALUATE):
            self._before = self._measure(self._loaded)
        if self._run is not None:
            perplexities, accuracy = self._before
            kept = [asdict(each) for each in perplexities]
            self._run.keep_measured(asked, kept if accuracy is None else [*kept, asdict(accuracy)])

    def measure_pruned(self, pruned: Pruned) -> Pruned:
        """Measure the pruned model, and put both on record; what fails is a note beside the complete checkpoint."""
        announce(self._listen, Phase.EVALUATE)
        notes = [*pruned.notes, *self._cautions(pruned.record["calibration"]["source"])]
        before, dense = self._before
        pruned = replace(pruned, before=before, top_one_before=dense)
        try:
            after, accuracy = self._measure(as_written(self._loaded, pruned, self._request))
        except (HalveError, RuntimeError, MemoryError) as error:
            wanted = {"perplexity": bool(self._texts), "top-1 accuracy": self._pictures is not None}
            what = " and ".join(figure for figure, asked in wanted.items() if asked)
            notes.append(f"the model is pruned, but its {what} was not measured: {error}")
            return replace(pruned, notes=tuple(notes))
        if pruned.out is not None:
            try:
                if after:
                    add_perplexity(pruned.out, before, after)
                if accuracy is not None:
                    add_top_one(pruned.out, dense, accuracy)
            except HalveError as error:
                what = "perplexity" if accuracy is None else "accuracy"
                notes.append(f"{what} was measured, but not put on record: {error}")
            else:
                notes += leave_beside(pruned.out, None)[1]
        return replace(pruned, after=after, top_one_after=accuracy, notes=tuple(notes))

    def _cautions(self, calibrated_on: str | None) -> list[str]:
        cautions = [overlap(calibrated_on, [text.source for text in self._texts])]
        if self._pictures is not None:
            cautions.append(overlap(calibrated_on, [self._pictures.source], figures="accuracies"))
        return [caution for caution in cautions if caution]

    def _asked(self) -> Mapping[str, Any]:
        """Return how the dense model is measured, as plain JSON values: the same words mean the same figures."""
        target = self._request.placement.target
        asked: dict[str, Any] = {}
        if self._request.evaluation is not None:
            asked["texts"] = [[text.source, text.sha256, text.bos] for text in self._texts]
            asked["forward_dtype"] = str(self._request.evaluation.precision(target))
        if self._request.image_evaluation is not None and self._pictures is not None:
            asked["images"] = [self._pictures.source, self._pictures.listing]
            asked["forward_dtype"] = str(self._request.image_evaluation.precision(target))
        return asked

    def _measure(self, loaded: LoadedModel) -> tuple[tuple[Perplexity, ...], TopOne | None]:
        target, accuracy = self._request.placement.target, None
        perplexities: tuple[Perplexity, ...] = ()
        if self._request.evaluation is not None:
            perplexities = self._request.evaluation.measure(loaded.model, self._texts, target, loaded.weights)
        if self._request.image_evaluation is not None and self._pictures is not None:
            accuracy = self._request.image_evaluation.measure(loaded, self._pictures, target)
        return perplexities, accuracy
