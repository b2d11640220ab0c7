"""``model-index``: what was measured of a checkpoint, as the hub shows it beside a model."""

import math
from collections.abc import Callable
from typing import Any

from halve.report.facts import PerplexityFacts, RunFacts
from halve.report.top_one_facts import TopOneFacts
from halve.report.training_facts import TrainedScore


def eval_results(run: RunFacts, local: Callable[[str], str]) -> list[Any]:
    """Return what was measured of a checkpoint as it is: perplexities and top-1 accuracies, of the pruned model alone.

    What a training came to is of the checkpoint only where nothing has changed its weights since; an infinite
    perplexity is no value that a page of the hub could show.

    Args:
        run: what is on record.
        local: gives a source without the directories of the machine that it was on.

    Returns:
        list[Any]: `huggingface_hub.EvalResult`, one a text or a set of pictures; each value as it was measured.
    """
    scores: list[PerplexityFacts | TrainedScore] = [*run.perplexity]
    if run.trainings and not run.merged and not run.rounded:
        known = {(score.sha256, score.measured_as) for score in scores}
        scores += [score for score in run.trainings[-1].scores if (score.sha256, score.measured_as) not in known]
    found = [_of_text(score, local(score.source)) for score in scores if _is_value(score.after)]
    return found + [_of_pictures(score, local(score.source)) for score in run.top_one]


def _is_value(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _of_text(score: PerplexityFacts | TrainedScore, name: str) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=name,
        dataset_name=name,
        dataset_args={"seq_len": score.seq_len, "windows": score.windows, "tokens_sha256": score.sha256},
        metric_type="perplexity",
        metric_name=f"Perplexity, {score.measured_as}",
        metric_value=score.after,
    )


def _of_pictures(score: TopOneFacts, name: str) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="image-classification",
        task_name="Image classification",
        dataset_type=name,
        dataset_name=name,
        dataset_args={"sha256": score.sha256},
        metric_type="accuracy",
        metric_name=f"Top-1 accuracy, {score.measured_as}",
        metric_value=score.after,
    )
