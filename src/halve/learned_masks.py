"""Masks that are learned end to end, with a prior that a local method makes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halve.checkpoint.directory import CONFIG
from halve.learning.lesson import Taught, check_directory
from halve.learning.mask_learning import Learning, learn_as
from halve.learning.training.watching import Watch
from halve.option_groups import fill, known_names
from halve.pruning import prune
from halve.serial import from_plain
from halve.solve import methods
from halve.text.tokens import SELF

_SAMPLES = 64
"""Calibration sequences of a prior."""


def learn(model: str | Path, out: str | Path, *, watch: Watch | None = None, **options: Any) -> Taught:
    """Learn N:M masks, with the weights or without, so that the pruned model says what the dense model says.

    A training that was stopped is continued by the same call. Everything else is an option, a keyword by its flat name:
    ``method="maskllm"``, ``data=["text.jsonl"]``, ``tokens="2M"``, … (docs/options.md). What is an option of the method
    (docs/learned-masks.md) is one too.

    Args:
        model: the dense model, or a pruned checkpoint whose weights the training begins with: a directory, a ``.gguf``
            file, or a hub id.
        out: directory for the pruned checkpoint; it must not exist yet, be empty, or hold the same training,
            unfinished. A prior that a local method makes is kept beside it, in a directory of the same name and
            ``-prior``.
        watch: told what happens.
        **options: fields of `halve.learning.mask_learning.Learning` and its groups, and of the method's options.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        UnsupportedModelError: the model cannot be pruned, or not trained on text.
        ResumeMismatchError: ``out`` holds an unfinished training that began otherwise.
        CorruptFileError: a file of a model, or of the unfinished training, was damaged.
        HalveError: the loss is not finite, or the volume failed.
    """
    known = known_names(Learning)
    own = {name: options.pop(name) for name in list(options) if name not in known}
    request = replace(fill(Learning, options), options=own)
    return _learn(model, Path(out), request, watch)


def resume_learning(call: Mapping[str, Any], out: Path, watch: Watch | None = None) -> Taught:
    """Go on with a training as it was called (`halve.learning.training.state.recorded_training`).

    Raises:
        InputError: it began in another directory, with relative paths; else as `learn`.
    """
    check_directory(call)
    return _learn(call["model"], out, from_plain(Learning, call["request"]), watch)


def _learn(model: str | Path, out: Path, request: Learning, watch: Watch | None) -> Taught:
    if request.prior in methods.METHODS:
        request = replace(request, prior=str(_made_prior(model, out, request)))
    return learn_as(model, out, request, watch)


def _made_prior(model: str | Path, out: Path, request: Learning) -> Path:
    """Return a checkpoint that a local method has pruned, made now or before."""
    place = out.with_name(f"{out.name}-prior")
    if (place / CONFIG).exists():
        return place
    text = next((each.source for each in request.text.texts), SELF)
    length = request.text.seq_len
    prune(
        model,
        place,
        pattern=request.pattern,
        method=request.prior,
        refit="none",
        calibration=text,
        samples=max(1, min(_SAMPLES, request.text.wanted // length)),
        seq_len=length,
        skip=request.skip,
        text_field=request.text.text_field,
        bos=request.text.bos,
        device=request.machine.device,
        forward_dtype=request.machine.forward_dtype,
        attention=request.machine.attention,
        trust_remote_code=request.machine.trust_remote_code,
    )
    return place
