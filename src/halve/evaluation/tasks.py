"""Accuracy on tasks: question sets and their metrics, as EleutherAI's lm-eval defines them (the extra ``tasks``)."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halve.checks import check_count
from halve.device import forward_precision, model_device, resolve_device
from halve.errors import HalveError, InputError, one_line
from halve.evaluation.harness import (
    SEED,
    Listener,
    adapt,
    require_harness,
    seeded,
    unreadable_definitions,
    without_noise,
)
from halve.evaluation.perplexity import ready

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: name of the task or group.
        metric: as lm-eval calls it, for example ``acc`` or ``acc_norm``.
        filter: what was done to the answers before they were judged; empty for nothing.
        value: the metric.
        stderr: its standard error; None where lm-eval has none.
        examples: how many examples it is over.
        num_fewshot: solved examples shown before each question; None for a group whose tasks differ.
        version: of the task's definition; empty if it has none.
        higher_is_better: None where the definition does not say.
        is_group: whether it is the aggregate of the tasks that follow it.
        sha256: hash of the questions, prompts and targets, as lm-eval computes it: scores compare where it is equal.
            Empty for a group.
        of_examples: the metric of every example, in order; empty where it is no mean over examples, and for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int
    num_fewshot: int | None
    version: str
    higher_is_better: bool | None
    is_group: bool
    sha256: str
    of_examples: tuple[float, ...] = field(default=(), repr=False)

    def minus(self, other: "TaskScore") -> tuple[float, float | None]:
        """Return the difference to the score of another model, and its standard error.

        Both models answered the same examples, so that the error is that of the mean of the differences. It is None
        where the examples are not the same, or the metric is no mean over them.
        """
        difference = self.value - other.value
        count = len(self.of_examples)
        if count < 2 or count != len(other.of_examples) or self.sha256 != other.sha256:
            return difference, None
        each = [mine - theirs for mine, theirs in zip(self.of_examples, other.of_examples, strict=True)]
        return difference, statistics.stdev(each) / math.sqrt(count)


@dataclass(frozen=True)
class TaskResults:
    """The scores of one model.

    Attributes:
        scores: a group before its tasks, tasks in the order they were asked for.
        dtype: what the matrices were multiplied in.
        limit: the most examples of a task; None for all.
        seconds: wall-clock time, loading apart.
        harness: version of lm-eval.
        notes: what lm-eval did otherwise than asked, for example shorten prompts that are too long for the model.
    """

    scores: tuple[TaskScore, ...]
    dtype: str
    limit: int | None
    seconds: float
    harness: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TaskSet:
    """Tasks whose definitions and examples are loaded and checked, for any number of models.

    Attributes:
        loaded: what lm-eval loaded for each name that was asked for.
        limit: the most examples of a task; None for all.
        notes: see `TaskResults`.
    """

    loaded: Mapping[str, Any]
    limit: int | None
    notes: tuple[str, ...]


def open_tasks(
    names: Sequence[str],
    *,
    tasks_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> TaskSet:
    """Load the definitions and examples of tasks; names on the Hugging Face hub are downloaded.

    Args:
        names: of tasks, groups or tags.
        tasks_path: a directory with definitions of your own in YAML; they win over lm-eval's. **A definition can run
            Python code** (``!function``), so take only ones you trust.
        limit: only the first examples of each task.
        num_fewshot: solved examples to show before each question; None is what each task defines. A task that defines
            0 keeps 0, and a note says so.

    Raises:
        InputError: lm-eval is missing, an argument is not usable, there is no task of a name, its definition or data
            cannot be loaded, or it runs code that a model wrote, which Halve never does.
    """
    require_harness()
    if isinstance(names, str) or not names or not all(names):
        raise InputError(f"tasks {names!r} are not usable: give a list of names, for example arc_easy, hellaswag")
    if twice := {name for name in names if list(names).count(name) > 1}:
        raise InputError(f"task {min(twice)!r} is asked for twice: ask once")
    if limit is not None:
        check_count("limit", limit)
    if num_fewshot is not None:
        check_count("num_fewshot", num_fewshot, least=0)
    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise InputError(f"tasks_path {tasks_path} is not a directory: give one that holds task definitions (.yaml)")
    with without_noise() as listener:
        manager = _manager_of(names, tasks_path)
        loaded = {name: _load(manager, name) for name in names}
        _check_tasks(loaded)
        for definition in _all_tasks(loaded):
            _set_fewshot(definition, num_fewshot, listener)
    return TaskSet(loaded, limit, listener.sentences())


def measure_tasks(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    tasks: TaskSet,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    forward_dtype: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> TaskResults:
    """Measure a causal language model of transformers on tasks. Softmax in float32, float64 for float64 logits.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: what to measure.
        batch_size: requests (a question with one of its answers) in one forward.
        device: where to run; the model is moved there meanwhile. None leaves it where it is.
        forward_dtype: ``"auto"``, ``"float32"`` or ``"bfloat16"``, see `halve.evaluation.perplexity.perplexity`.
        progress: called with the name asked for, its requests done, and its requests in all.

    Raises:
        InputError: an argument is not usable, or there is no tokenizer.
        HalveError: lm-eval failed on a task, or has no result for it; the message names it.
    """
    check_count("batch_size", batch_size)
    place = model_device(model) if device is None else resolve_device(device)
    forward_precision(forward_dtype, place)
    scores: list[TaskScore] = []
    started = time.perf_counter()
    with (
        without_noise() as listener,
        ready(model, place, forward_dtype) as used,
        adapt(model, tokenizer, used, batch_size) as lm,
    ):
        for name, loaded in tasks.loaded.items():
            results = _run(lm, name, loaded, tasks.limit, progress and listener.aloud(progress))
            scores += _scores(name, results)
    return TaskResults(
        scores=tuple(scores),
        dtype=str(used).removeprefix("torch."),
        limit=tasks.limit,
        seconds=time.perf_counter() - started,
        harness=require_harness(),
        notes=(*tasks.notes, *listener.sentences()),
    )


def evaluate_tasks(
    model: nn.Module | str | Path,
    tasks: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    tasks_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str | torch.device = "auto",
    forward_dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> TaskResults:
    """Measure a model on tasks, for example ``evaluate_tasks("pruned", ["arc_easy", "hellaswag"])``.

    Args:
        model: a model in memory, or a checkpoint as `halve.checkpoint.load.load_model` takes it.
        tasks: as `open_tasks` has them, and ``tasks_path``, ``limit`` and ``num_fewshot``.
        tokenizer: needed for a model in memory; None takes a checkpoint's own.
        batch_size: as `measure_tasks` has it, and ``forward_dtype`` and ``progress``.
        device: ``"auto"`` is where a model in memory lies, and the GPU if there is one for a checkpoint.
        trust_remote_code: whether to run Python code that comes with the checkpoint.

    Raises:
        InputError: see `open_tasks` and `measure_tasks`.
        HalveError: see `measure_tasks` and `halve.checkpoint.load.load_model`.
    """
    place = model_device(model) if isinstance(model, nn.Module) and device == "auto" else resolve_device(device)
    forward_precision(forward_dtype, place)
    check_count("batch_size", batch_size)
    opened = open_tasks(tasks, tasks_path=tasks_path, limit=limit, num_fewshot=num_fewshot)
    if isinstance(model, nn.Module):
        network: nn.Module = model
    else:
        from halve.checkpoint.load import load_model

        loaded = load_model(model, trust_remote_code=trust_remote_code)
        network, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    return measure_tasks(
        network, tokenizer, opened, batch_size=batch_size, device=place, forward_dtype=forward_dtype, progress=progress
    )


def _manager_of(names: Sequence[str], tasks_path: str | Path | None) -> Any:
    """Return an index of task definitions that has all of the names."""
    from lm_eval.tasks import TaskManager

    if tasks_path is not None:
        # lm-eval's own definitions are some ten thousand files: they are read only where they are needed.
        with unreadable_definitions() as unreadable:
            own = TaskManager(include_path=str(tasks_path), include_defaults=False)
        for path, reason in unreadable.items():
            raise InputError(f"task definition {path} cannot be read: {reason}; mend it, or take it out of there")
        if all(_is_complete(own.task_index, name) for name in names):
            return own
    manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    for name in names:
        if name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists them"
            where = "lm-eval" if tasks_path is None else f"lm-eval or {tasks_path}"
            raise InputError(f"there is no task {name!r} in {where}: {hint}")
    return manager


def _is_complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether an index has a task, or a group with everything in it."""
    if name not in index:
        return False
    config = index[name].cfg or {}
    members = config.get("task") if "group" in config else []
    names = [item if isinstance(item, str) else item.get("group", item.get("task")) for item in members or []]
    return all(_is_complete(index, str(member)) for member in names)


def _load(manager: Any, name: str) -> Any:
    try:
        with seeded():
            return manager.load([name])
    except Exception as error:  # a definition can provoke any error, and the hub's client has some twenty of its own
        raise InputError(
            f"task {name!r} could not be loaded: {one_line(error)}; check its definition, and the network if its data "
            "is on the hub"
        ) from error


def _all_tasks(loaded: Mapping[str, Any]) -> Iterator[Any]:
    for one in loaded.values():
        yield from one["tasks"].values()


def _check_tasks(loaded: Mapping[str, Any]) -> None:
    owner: dict[str, str] = {}
    for name, one in loaded.items():
        for task, definition in one["tasks"].items():
            if task in owner:
                raise InputError(f"task {task!r} is asked for twice, in {owner[task]!r} and in {name!r}: ask once")
            owner[task] = name
            if getattr(definition, "UNSAFE_CODE", False):
                raise InputError(f"task {task!r} runs code that the model wrote, and Halve does not: leave it out")
            if getattr(definition, "MULTIMODAL", False):
                raise InputError(f"task {task!r} needs images or sound, not text alone: leave it out")


def _set_fewshot(definition: Any, num_fewshot: int | None, listener: Listener) -> None:
    """Set the number and the choice of the solved examples, as lm-eval's ``simple_evaluate`` does."""
    defined = definition.get_config("num_fewshot")
    if definition.OUTPUT_TYPE == "loglikelihood_rolling":
        defined = 0  # there is no question that they could stand before
        definition.set_config(key="num_fewshot", value=0)
    if num_fewshot and defined == 0:
        listener.add(f"{definition.task_name} is defined without solved examples, so its num_fewshot is 0")
    elif num_fewshot is not None or defined is None:
        definition.set_config(key="num_fewshot", value=num_fewshot or 0)
    definition.set_fewshot_seed(seed=SEED)


def _run(
    lm: Any, name: str, loaded: Any, limit: int | None, progress: Callable[[str, int, int], None] | None
) -> Mapping[str, Any]:
    """Return lm-eval's results for one name that was asked for.

    `lm_eval.evaluate` and not ``simple_evaluate``, which besides asks the hub about the model, runs git, and seeds the
    caller's random generators.
    """
    from lm_eval import evaluate

    for definition in loaded["tasks"].values():  # or the next model would be shown other solved examples
        definition.set_fewshot_seed(seed=SEED)
    done, total = 0, 0

    def count(*_: Any) -> None:
        nonlocal done, total
        if progress is not None:
            done += 1
            total = total or sum(request.repeats for task in loaded["tasks"].values() for request in task.instances)
            progress(name, done, total)

    lm.cache_hook.add_partial = count  # lm-eval tells it every answer
    try:
        with seeded():
            results: Mapping[str, Any] = evaluate(lm, loaded, limit=limit, bootstrap_iters=1000)
    except Exception as error:  # a task, its data and its metrics can provoke any error
        raise HalveError(f"task {name!r} failed: {one_line(error)}") from error
    return results


def _scores(name: str, results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task in _groups_first(results):
        metrics = results["results"][task]
        is_group = task in results["group_subtasks"]
        names = [key for key in metrics if "," in key and not key.partition(",")[0].endswith("_stderr")]
        if not names and not is_group:
            raise HalveError(f"task {task!r}, asked for as {name!r}, gave no result: check its definition")
        version = results["versions"].get(task)
        for key in names:
            metric, _, used = key.partition(",")
            yield TaskScore(
                task=task,
                metric=metric,
                filter="" if used == "none" else used,
                value=_number(metrics[key], task, metric),
                stderr=_stderr(metrics.get(f"{metric}_stderr,{used}")),
                examples=metrics.get("sample_count", {}).get(key, metrics["sample_len"]),
                num_fewshot=results["n-shot"].get(task),
                version="" if version in {None, "N/A", "Yaml"} else str(version),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                is_group=is_group,
                sha256="" if is_group else _sha256(results["samples"][task]),
                of_examples=() if is_group else _of_examples(results["samples"][task], metric, used, metrics[key]),
            )


def _of_examples(samples: Sequence[Mapping[str, Any]], metric: str, used: str, value: Any) -> tuple[float, ...]:
    """Return a metric of every example, if the metric of the task is their mean."""
    found = [sample.get(metric) for sample in samples if sample.get("filter", used) == used]
    numbers = tuple(float(each) for each in found if isinstance(each, int | float))
    if not numbers or len(numbers) != len(found) or not math.isclose(math.fsum(numbers) / len(numbers), float(value)):
        return ()
    return numbers


def _groups_first(results: Mapping[str, Any]) -> Iterator[str]:
    """Return the names that have results, every group before its members."""
    children: Mapping[str, Sequence[str]] = results["group_subtasks"]
    members = {name for names in children.values() for name in names}

    def walk(name: str) -> Iterator[str]:
        yield name
        for child in children.get(name, ()):
            yield from walk(child)

    for name in results["results"]:
        if name not in members:
            yield from walk(name)


def _number(value: Any, task: str, metric: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise HalveError(f"{metric} of task {task!r} is no number, but {value!r}: check its definition") from error


def _stderr(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _sha256(samples: Sequence[Mapping[str, Any]]) -> str:
    from lm_eval.utils import hash_string

    hashes = [sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples]
    return str(hash_string("".join(hashes)))
