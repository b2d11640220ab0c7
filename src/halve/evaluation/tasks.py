"""Accuracy on tasks: question sets and their metrics, as EleutherAI's lm-eval defines them (the extra ``tasks``)."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    versions,
    without_noise,
)
from halve.evaluation.in_step import ready
from halve.evaluation.scores import TaskScore, read_scores
from halve.evaluation.task_groups import TASK_GROUPS, Member, TaskGroup, check_member, mean_score, member_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHERE_LISTED = f"`lm-eval ls tasks` lists them, and the groups of Halve are {', '.join(TASK_GROUPS)}"


@dataclass(frozen=True)
class TaskResults:
    """The scores of one model.

    Attributes:
        scores: a group before its tasks, tasks in the order they were asked for.
        groups: what the groups of `TASK_GROUPS` that were asked for fix, by name.
        dtype: what the matrices were multiplied in.
        max_length: the most tokens of a prompt with its answer; longer ones are cut from the left, and a note says so.
        bos: what the tokenizer puts before every text, and so before every prompt; empty for nothing.
        limit: the most examples of a task; None for all.
        seconds: wall-clock time, loading apart.
        versions: of lm-eval, transformers, torch and Halve.
        notes: what lm-eval did otherwise than asked, for example shorten prompts that are too long for the model.
    """

    scores: tuple[TaskScore, ...]
    groups: Mapping[str, TaskGroup]
    dtype: str
    max_length: int
    bos: str
    limit: int | None
    seconds: float
    versions: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TaskSet:
    """Tasks whose definitions and examples are loaded and checked, for any number of models.

    Attributes:
        names: what was asked for.
        loaded: what lm-eval loaded for each of them; for a group of `TASK_GROUPS`, for each of its members.
        limit: the most examples of a task; None for all.
        notes: see `TaskResults`.
    """

    names: tuple[str, ...]
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
        names: groups of `halve.evaluation.task_groups.TASK_GROUPS`, or tasks, groups or tags of lm-eval.
        tasks_path: a directory with definitions of your own in YAML; they win over lm-eval's. **A definition can run
            Python code** (``!function``), so take only ones you trust.
        limit: only the first examples of each task.
        num_fewshot: solved examples to show before each question; None is what each task defines. A task that defines
            0 keeps 0, and a note says so. Groups of `TASK_GROUPS` fix it.

    Raises:
        InputError: lm-eval is missing, an argument is not usable, there is no task of a name, its definition or data
            cannot be loaded, it is not what a group fixes, or it runs code that a model wrote, which Halve never does.
    """
    require_harness()
    _check_asked(names, tasks_path, limit, num_fewshot)
    owners = _owners(names)
    with without_noise() as listener:
        manager = _manager_of(list(owners), tasks_path)
        if taken := [name for name in names if name in TASK_GROUPS and name in manager.task_index]:
            raise InputError(f"there is a task {taken[0]!r}, and a group of Halve of that name: rename the task")
        loaded = {name: _load(manager, name) for name in owners}
        _check_tasks(loaded, {name: group for name, (group, _) in owners.items()})
        for name, (group, member) in owners.items():
            for definition in loaded[name]["tasks"].values():
                _set_fewshot(definition, member.num_fewshot if member else num_fewshot, listener)
                if member is not None:
                    check_member(group, member, definition)
    return TaskSet(tuple(names), loaded, limit, listener.sentences())


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
        progress: called with the name asked for (of a group of `TASK_GROUPS`, that of its member), its requests done,
            and its requests in all.

    Raises:
        InputError: an argument is not usable, or there is no tokenizer, or one that ends every text with a token.
        HalveError: lm-eval failed on a task, or has no result for it; the message names it.
    """
    check_count("batch_size", batch_size)
    place = model_device(model) if device is None else resolve_device(device)
    forward_precision(forward_dtype, place)
    found: dict[str, list[TaskScore]] = {}
    started = time.perf_counter()
    with (
        without_noise() as listener,
        ready(model, place, forward_dtype) as passes,
        adapt(model, tokenizer, passes.dtype, batch_size) as lm,
    ):
        for name, loaded in tasks.loaded.items():
            results = _run(lm, name, loaded, tasks.limit, progress and listener.aloud(progress))
            found[name] = list(read_scores(name, loaded, results))
        max_length, bos = int(lm.max_length), str(lm.opening)
    return TaskResults(
        scores=tuple(score for name in tasks.names for score in _scores(name, found)),
        groups={name: TASK_GROUPS[name] for name in tasks.names if name in TASK_GROUPS},
        dtype=str(passes.dtype).removeprefix("torch."),
        max_length=max_length,
        bos=bos,
        limit=tasks.limit,
        seconds=time.perf_counter() - started,
        versions=versions(),
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


def _check_asked(
    names: Sequence[str], tasks_path: str | Path | None, limit: int | None, num_fewshot: int | None
) -> None:
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
    groups = [name for name in names if name in TASK_GROUPS]
    if groups and num_fewshot is not None:
        raise InputError(f"num_fewshot = {num_fewshot} does not go with {groups[0]!r}, which fixes it: leave it out")


def _owners(names: Sequence[str]) -> dict[str, tuple[str, Member | None]]:
    """Return every name that lm-eval is to load, with the name asked for and, for a group of ours, what it fixes."""
    owners: dict[str, tuple[str, Member | None]] = {}
    for name in names:
        members: Sequence[Member | None] = TASK_GROUPS[name].members if name in TASK_GROUPS else (None,)
        for member in members:
            task = name if member is None else member.task
            if task in owners:
                raise InputError(f"task {task!r} is asked for twice, in {owners[task][0]!r} and in {name!r}: ask once")
            owners[task] = name, member
    return owners


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
            close = get_close_matches(name, [*TASK_GROUPS, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else _WHERE_LISTED
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


def _check_tasks(loaded: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    """Refuse tasks that cannot be run or are there twice; ``asked`` has the names they were asked for by."""
    owner: dict[str, str] = {}
    for name, one in loaded.items():
        for task, definition in one["tasks"].items():
            if task in owner:
                both = f"in {owner[task]!r} and in {asked[name]!r}"
                raise InputError(f"task {task!r} is asked for twice, {both}: ask once")
            owner[task] = asked[name]
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


def _scores(name: str, found: Mapping[str, list[TaskScore]]) -> Iterator[TaskScore]:
    """Yield the scores of one name that was asked for: of a group of ours, its mean and what it fixes alone."""
    if name not in TASK_GROUPS:
        yield from found[name]
        return
    members = [member_scores(name, member, found[member.task]) for member in TASK_GROUPS[name].members]
    yield mean_score(name, [scores[0] for scores in members])
    for scores in members:
        yield from scores
