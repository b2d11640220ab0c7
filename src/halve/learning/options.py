"""What a training is asked for: on which text, against which teacher, how long, and what is trained."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from halve.checkpoint.attention import check_attention
from halve.checkpoint.directory import is_training
from halve.checks import check_count, check_not_negative, check_positive, is_number
from halve.device import forward_precision, resolve_device
from halve.errors import InputError
from halve.evaluation.request import Evaluation
from halve.learning.training.losses import Target
from halve.lookup import find_row
from halve.option_groups import OptionError, group, option
from halve.text.documents import is_on_hub, open_corpus
from halve.text.special_tokens import check_bos
from halve.text.tokens import SELF
from halve.transformers_internals import trackers

AUTO = "auto"
NONE = "none"
TRAINED: Mapping[str, str] = {
    "all": "kept weights, norms, biases, and everything else but embeddings and the head",
    "everything": "all of that, and embeddings and the head, which are not pruned",
    "norms": "norms and biases alone",
    "lora": "low-rank adapters that keep the mask, merged at the end",
    "hira": "low-rank adapters that multiply the weights, merged at the end",
}
"""What of a pruned model can be trained, by the word that asks for it."""
ADAPTERS = ("lora", "hira")
"""Those of them that train adapters, for which peft is needed."""
LOSS_ON = ("assistant", "all")
_STEPS, _LARGEST_STEP = 400, 16_384
"""Steps of a training, and tokens of one, where nobody says: steps of a power of two of sequences."""
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmgb]?)", re.ASCII)


def parse_count(name: str, value: int | str) -> int:
    """Return a number of tokens: a whole number, or text such as ``300k`` or ``2M``.

    Raises:
        InputError: it is none, or below 1.
    """
    found = _COUNT.fullmatch(value.strip().lower().replace("_", "")) if isinstance(value, str) else None
    number = round(float(found[1]) * _SUFFIXES[found[2]]) if found else value
    if isinstance(number, str):
        raise InputError(f"{name} = {value!r} is no number of tokens: write 200000, 200k or 2M")
    check_count(name, number)
    return number


@dataclass(frozen=True)
class WeightedText:
    """A source of training text.

    Attributes:
        source: as `halve.text.documents.open_corpus` takes it, or ``self``.
        weight: of its tokens, relative to other sources'.
    """

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> "WeightedText":
        """Return what ``PATH`` or ``PATH=WEIGHT`` names.

        Raises:
            InputError: the weight is no positive number.
        """
        name, equals, weight = str(text).rpartition("=")
        if not equals or Path(text).exists():
            return cls(str(text))
        try:
            number = float(weight)
        except ValueError:
            return cls(str(text))
        check_positive(f"the weight of the training text {name}", number)
        return cls(name, number)


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """What a model is trained on.

    Attributes:
        data: training text: ``.txt``, ``.jsonl`` or ``.parquet`` files or directories of them, ``c4``, ``wikitext2``,
            or ``self``: the teacher's own. Several share the tokens alike, or as ``FILE=WEIGHT`` says.
        tokens: of training in all, such as ``300k`` or ``2M``; a text with fewer is read several times.
        seq_len: tokens in a sequence. Documents are packed into it and never attend to each other.
        held_out: tokens of the text that are not trained on but decide about the learning rate and which weights stay.
        seed: of the choice among documents.
        text_field: name of the text in ``.jsonl`` and ``.parquet`` files.
        bos: whether every document begins with BOS: ``auto``, where the tokenizer itself puts it before text,
            ``always`` or ``never``.
        loss_on: of chats (``messages``, or ``prompt`` and ``completion``), train on what the ``assistant`` says, or
            on ``all``.
    """

    data: Sequence[str | Path] = ()
    tokens: int | str = "2M"
    seq_len: int = 512
    held_out: int | str = "16k"
    seed: int = 0
    text_field: str = option("text", shared=True)
    bos: str = option("auto", shared=True)
    loss_on: str = "assistant"

    def __post_init__(self) -> None:
        given = (self.data,) if isinstance(self.data, str | Path) else tuple(self.data)
        object.__setattr__(self, "data", tuple(str(each) for each in given))
        object.__setattr__(self, "tokens", parse_count("tokens", self.tokens))
        object.__setattr__(self, "held_out", parse_count("held_out", self.held_out))
        check_count("seq_len", self.seq_len, least=2)
        check_bos(self.bos)
        if self.loss_on not in LOSS_ON:
            raise InputError(f"loss_on = {self.loss_on!r} is not known: choose one of {', '.join(LOSS_ON)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be a whole number, got {self.seed!r}")

    @property
    def wanted(self) -> int:
        """Tokens to train on, as a number."""
        return parse_count("tokens", self.tokens)

    @property
    def spared(self) -> int:
        """Tokens held out, as a number."""
        return parse_count("held_out", self.held_out)

    @property
    def texts(self) -> tuple[WeightedText, ...]:
        """The sources, each with its weight."""
        return tuple(WeightedText.parse(each) for each in self.data)

    @property
    def is_self_written(self) -> bool:
        """Whether the teacher writes some of the text."""
        return any(text.source == SELF for text in self.texts)

    @property
    def is_far(self) -> bool:
        """Whether it costs much to get the text again: the teacher writes it, or the hub is asked."""
        return any(text.source == SELF or is_on_hub(text.source) for text in self.texts)

    def check(self) -> None:
        """Look for the texts, before anything is loaded.

        Raises:
            InputError: there is none, or one is not there.
        """
        if not self.data:
            raise InputError("no training text was named: give data, a file, c4, or self for the teacher's own")
        for text in self.texts:
            if text.source != SELF and not is_on_hub(text.source):
                open_corpus(text.source, use="calibration", text_field=self.text_field)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a model is trained.

    Attributes:
        batch_tokens: tokens of an optimiser step, over all processes; ``auto`` makes 400 steps of the training or a few
            more, of 16 384 tokens at most: short trainings gain more by the number of their steps than by their size.
        forward_tokens: tokens of one forward pass in one process; fewer need less memory.
        learning_rate: at the peak; ``auto`` tries several on a short part and takes the one that the held-out text
            likes best.
        last_rate: share of the peak that a cosine ends at.
        warmup: share of the steps in which the learning rate rises to its peak.
        weight_decay: of matrices; where nobody says, none, or what a learning method was published with.
        clip: largest norm of the gradient; 0 does not clip.
        evaluations: how often the held-out text is looked at, over the whole training.
        patience: end when so many looks at the held-out text in a row brought nothing better.
        save_every: steps between two states that a stopped training can go on from; as often as evaluations if not
            given.
        gradient_checkpointing: compute activations twice rather than keep them, which needs less memory.
        log_to: trackers that transformers knows, such as ``tensorboard`` or ``trackio``.
    """

    batch_tokens: int | str = AUTO
    forward_tokens: int | str = "4k"
    learning_rate: float | str = AUTO
    last_rate: float = 0.02
    warmup: float = 0.05
    weight_decay: float | None = None
    clip: float = 1.0
    evaluations: int = 10
    patience: int | None = None
    save_every: int | None = None
    gradient_checkpointing: bool = False
    log_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "forward_tokens"):
            if getattr(self, name) != AUTO or name != "batch_tokens":
                object.__setattr__(self, name, parse_count(name, getattr(self, name)))
        if isinstance(self.learning_rate, str):
            if self.learning_rate != AUTO:
                raise InputError(f"learning_rate = {self.learning_rate!r} is no number: give one above 0, or {AUTO}")
        else:
            check_positive("learning_rate", self.learning_rate)
        for name in ("last_rate", "warmup"):
            share = getattr(self, name)
            if not is_number(share) or not 0.0 <= share <= 1.0:
                raise InputError(f"{name} must be a share between 0 and 1, got {share!r}")
        if self.weight_decay is not None:
            check_not_negative("weight_decay", self.weight_decay)
        check_not_negative("clip", self.clip)
        check_count("evaluations", self.evaluations)
        for name in ("patience", "save_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        trackers = (self.log_to,) if isinstance(self.log_to, str) else tuple(self.log_to)
        object.__setattr__(self, "log_to", trackers)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a model is trained, and how it is loaded.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, …
        forward_dtype: products of forward and backward passes: ``auto``, ``float32`` or ``bfloat16``. Weights that are
            trained, their moments and sums are float32.
        attention: implementation of attention that the models run with: ``eager`` or ``sdpa``; the config's own where
            nobody says.
        trust_remote_code: run Python code that comes with the models. Read it first.
    """

    device: str | torch.device = AUTO
    forward_dtype: str = option(AUTO, shared=True)
    attention: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_attention(self.attention)
        forward_precision(self.forward_dtype, self.target)

    @cached_property
    def target(self) -> torch.device:
        """The device itself."""
        return resolve_device(self.device)

    @property
    def precision(self) -> torch.dtype:
        """What float32 matrices are multiplied in."""
        return forward_precision(self.forward_dtype, self.target)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is common to all trainings.

    Attributes:
        teacher: the dense model to learn from: a directory, a file or a name on the hub; ``none`` learns from the text
            alone. The model that was pruned, as its record names it, where nobody says.
        ce_share: share of the text's own cross-entropy in the loss, 0 to 1; the rest is the KL to the teacher.
        temperature: of the softmaxes in the KL.
        text: on what.
        schedule: how long, and how fast.
        machine: where.
        evaluation: what to measure before and after; it decides nothing.
    """

    teacher: str | None = None
    ce_share: float = 0.0
    temperature: float = 1.0
    text: TrainingText = group(factory=TrainingText)
    schedule: Schedule = group(factory=Schedule)
    machine: Machine = group(factory=Machine)
    evaluation: Evaluation | None = group(None, prefix="eval_")

    def __post_init__(self) -> None:
        if isinstance(self.teacher, Path):
            object.__setattr__(self, "teacher", str(self.teacher))
        _ = self.target
        if self.teacher == NONE and self.text.is_self_written:
            raise InputError("data = 'self' is the teacher's own text, and teacher is none: give another text")

    @property
    def target(self) -> Target:
        """What the loss asks for.

        Raises:
            InputError: a value is out of range.
        """
        return Target(1.0 if self.teacher == NONE else self.ce_share, self.temperature)

    def step_tokens(self, processes: int = 1) -> int:
        """Return the tokens of an optimiser step, over so many processes."""
        asked = self.schedule.batch_tokens
        if asked != AUTO:
            return parse_count("batch_tokens", asked)
        least = self.text.seq_len * processes
        wanted = min(self.text.wanted // _STEPS, _LARGEST_STEP)
        return least << max(0, (wanted // least).bit_length() - 1)

    def check(self) -> None:
        """Refuse what can be known to be unusable before anything is loaded.

        Raises:
            InputError: a text is not there, or lengths do not fit each other.
        """
        self.text.check()
        if self.evaluation is not None:
            self.evaluation.check(self.machine.target)
        if self.schedule.log_to:
            check_trackers(self.schedule.log_to)
        step = self.step_tokens()
        if step < self.text.seq_len:
            raise InputError(
                f"batch_tokens = {step} is less than one sequence of seq_len = {self.text.seq_len}: give more, or "
                "shorter sequences"
            )
        if self.text.wanted < step:
            raise InputError(f"tokens = {self.text.wanted} is less than one step of batch_tokens = {step}: give more")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, or that transformers does not know.

    Raises:
        InputError: the sentence names it, and those that are there.
    """
    known = trackers()
    for name in names:
        if name not in known:
            raise InputError(
                f"log_to = {name!r} is no tracker that is installed here: install it, or choose of "
                f"{', '.join(known) or 'none, since none is'}"
            )


@dataclass(frozen=True, kw_only=True)
class Finetuning(Training):
    """What `halve.finetune` is asked for.

    Attributes:
        train: what is trained: ``all`` (all but embeddings and the head), ``everything`` (those too), ``norms`` (norms
            and biases), ``lora`` or ``hira`` (adapters that keep the mask, merged at the end).
        rank: of the adapters, with ``lora`` and ``hira``.
        alpha: updates of ``lora`` are multiplied by alpha / rank; that is 1 where nobody says.
        save_adapter: a new directory for the adapter itself, beside the merged checkpoint; stock peft, which has no
            mask, loads it as another function, and its card says so.
    """

    train: str = "all"
    rank: int = 16
    alpha: float | None = None
    save_adapter: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        find_row(TRAINED, self.train, "way to train")
        check_count("rank", self.rank)
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
            if self.train != "lora":
                raise OptionError("{} goes with {} lora: leave it out", "alpha", "train")
        if self.save_adapter is not None and self.train not in ADAPTERS:
            raise OptionError("{} goes with {} lora or hira: leave it out", "save_adapter", "train")
        if self.save_adapter is not None:
            object.__setattr__(self, "save_adapter", Path(self.save_adapter))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How sequences are shared out over steps, forward passes and processes.

    Attributes:
        steps: of the optimiser.
        rows: sequences of a forward pass in one process.
        passes: forward passes of a step in one process.
        processes: that train together.
    """

    steps: int
    rows: int
    passes: int
    processes: int

    @property
    def sequences(self) -> int:
        """Sequences of the whole training."""
        return self.steps * self.rows * self.passes * self.processes

    @classmethod
    def of(cls, training: Training, processes: int = 1) -> "Shape":
        """Return what the options come to.

        Raises:
            InputError: a step has fewer sequences than there are processes.
        """
        length = training.text.seq_len
        step = training.step_tokens(processes) // length
        if step < processes or step % processes:
            raise InputError(
                f"a step of {step} sequences cannot be shared out over {processes} processes: give batch_tokens = "
                f"{max(1, step // processes) * processes * length}"
            )
        most = max(1, parse_count("forward_tokens", training.schedule.forward_tokens) // length)
        each = step // processes
        rows = max(size for size in range(1, min(most, each) + 1) if each % size == 0)
        return cls(steps=training.text.wanted // (step * length), rows=rows, passes=each // rows, processes=processes)


def refuse_present(option: str, place: Path | None, out: Path) -> None:
    """Refuse to write beside a checkpoint where something is, unless an unfinished training may have written it.

    Raises:
        InputError: something is there.
    """
    if place is not None and place.exists() and not is_training(out):
        raise InputError(f"{place} is there already: give {option} a new name")
