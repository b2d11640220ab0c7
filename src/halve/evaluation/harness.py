"""What lm-eval needs to measure a model in memory, and what it must not do meanwhile."""

import io
import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from halve.device import weight_dtype
from halve.errors import InputError
from halve.text.special_tokens import put_around_text
from halve.versions import versions as package_versions

SEED = 1234
"""lm-eval's own default: the same solved examples are shown as by its command line."""

_LOGGERS = ("lm_eval", "transformers", "datasets", "huggingface_hub")
_EXPECTED = (  # what lm-eval warns of in every run here, and what is so on purpose
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
)


class Listener(logging.Handler):
    """Collects warnings, one of those that differ in numbers only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: dict[str, tuple[str, int]] = {}
        self._streams = sys.stdout, sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, unless it is expected."""
        self.add(record.getMessage())

    def add(self, message: str) -> None:
        """Keep a message, unless it is expected."""
        sentence = " ".join(message.split())
        if not sentence.startswith(_EXPECTED):
            kind = re.sub(r"\d+", "#", sentence)
            first, count = self._seen.get(kind, (sentence, 0))
            self._seen[kind] = first, count + 1

    def aloud(self, function: Callable[..., None]) -> Callable[..., None]:
        """Return a function that may print, even where lm-eval may not."""

        def call(*args: Any) -> None:
            with redirect_stdout(self._streams[0]), redirect_stderr(self._streams[1]):
                function(*args)

        return call

    def sentences(self) -> tuple[str, ...]:
        """Return what was heard."""
        return tuple(first if count == 1 else f"{first} ({count} times alike)" for first, count in self._seen.values())


def require_harness() -> str:
    """Return the version of lm-eval.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError("tasks need lm-eval: pip install 'halve[tasks]'") from error
    return str(lm_eval.__version__)


def versions() -> dict[str, str]:
    """Return the versions that scores depend on, by package."""
    installed = package_versions()
    return {"lm-eval": require_harness(), **{name: installed[name] for name in ("transformers", "torch", "halve")}}


@contextmanager
def without_noise() -> Iterator[Listener]:
    """Keep lm-eval from printing; yield what hears its warnings.

    Its bars, its plain prints and those of datasets go nowhere. Log records of warnings are collected, others dropped.
    """
    listener = Listener()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    single = os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.handlers, logger.propagate = [listener], False
    os.environ["DISABLE_MULTIPROC"] = "1"  # else lm-eval forks a process a core, with the model in it, to resample
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_more: listener.add(str(message))
            yield listener
    finally:
        if single is None:
            del os.environ["DISABLE_MULTIPROC"]
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextmanager
def unreadable_definitions() -> Iterator[dict[str, str]]:
    """Yield the definitions that lm-eval leaves out of an index, with its reasons: it tells of them in debug logs only.

    Files that define no task by themselves, as those that others include, are not among them.
    """
    found: dict[str, str] = {}

    class Hear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = " ".join(record.getMessage().split())
            if message.startswith("Skip ") and "Unknown config shape" not in message and isinstance(record.args, tuple):
                found[str(record.args[0])] = " ".join(str(record.args[1]).split())

    logger, handler = logging.getLogger("lm_eval.tasks"), Hear(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed every random generator that a task may use, with lm-eval's seeds; the caller's states come back."""
    import numpy as np

    state, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - tasks use the global generator
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(SEED)  # noqa: NPY002
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numbers)  # noqa: NPY002


@contextmanager
def adapt(model: nn.Module, tokenizer: Any, dtype: torch.dtype, batch_size: int) -> Iterator[Any]:
    """Wrap a causal language model as lm-eval wants it; model and tokenizer stay as they are.

    Args:
        model: as `transformers` makes it, where it is to run.
        tokenizer: its tokenizer.
        dtype: what its matrices are to be multiplied in.
        batch_size: requests in one forward.

    Raises:
        InputError: there is no tokenizer, it ends every text with a token of its own, or the model does not write text
            from left to right.
    """
    check_model(model, tokenizer)
    opening = text_opening(tokenizer)
    from halve.evaluation.causal import Causal

    own = weight_dtype(model)
    # lm-eval ties the output head to the embedding where the configuration says so, even if the checkpoint has both:
    # the model would no longer be the one that was loaded.
    model.tie_weights = lambda *_args, **_more: None  # type: ignore[assignment]
    try:
        yield Causal(
            opening=opening,
            pretrained=model,
            tokenizer=deepcopy(tokenizer),  # it gets a padding token
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.promote_types(own, torch.float32),
            # lm-eval switches autocast off unless it is asked for here.
            mixed_precision_dtype=dtype if dtype != own else None,
        )
    finally:
        del model.tie_weights


def text_opening(tokenizer: Any) -> list[int]:
    """Return the ids of what a tokenizer puts before every text, such as its BOS; empty if it puts nothing there.

    Raises:
        InputError: it puts something after every text too, which would stand between a question and its answer.
    """
    opening, closing = put_around_text(tokenizer)
    if closing:
        names = " ".join(tokenizer.convert_ids_to_tokens(list(closing)))
        raise InputError(
            f"the tokenizer ends every text with {names}, which would "
            "stand between a question and its answer: set add_eos_token to false in its tokenizer_config.json, or take "
            "the post-processor that adds it out of its tokenizer.json"
        )
    return list(opening)


def check_model(model: Any, tokenizer: Any) -> None:
    """Look whether lm-eval can ask a model, before anything is measured.

    Raises:
        InputError: see `adapt`.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerFast

    if tokenizer is None:
        raise InputError("tasks need a tokenizer, and the model has none: give one, or a checkpoint that has it")
    if not isinstance(tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast):
        raise InputError(f"lm-eval takes tokenizers of transformers, not a {type(tokenizer).__name__}: convert it")
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(
            f"tasks are for causal language models of transformers, and {type(model).__name__} is none: "
            "give a model that writes text from left to right"
        )
    text_opening(tokenizer)
