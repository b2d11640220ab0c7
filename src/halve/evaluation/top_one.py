"""Top-1 accuracy of a model that classifies pictures: its first guess against the class that each of them shows."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.load import LoadedModel, resolve
from halve.checkpoint.mapped import Weights
from halve.checkpoint.streamed import AUTO, check_stream, loaded_to_measure
from halve.checks import check_count
from halve.device import model_device, resolve_device, weight_dtype
from halve.errors import HalveError, InputError, first_few, one_line
from halve.evaluation.in_step import Measuring, ready
from halve.evaluation.paired import mcnemar
from halve.images.image_sets import is_image_set
from halve.images.labelled import LabelledPictures, labelled_pictures
from halve.images.pictures import Picture, check_pillow, is_picture_folder
from halve.images.positions import positions
from halve.images.processor import check_sees, input_name, prepared, processor_of, stacked
from halve.model.blocks import caution_of_sizes
from halve.option_groups import option
from halve.versions import versions

_POSITIONS = 8192
"""Of a batch, at most."""
_NORMAL = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class ImageEvaluation(Measuring):
    """On what the top-1 accuracy of a model that classifies pictures is measured, before and after.

    Attributes:
        images: pictures with their classes: a folder with a folder for each class, called as the model's config calls
            it or by its number; or what ``datasets`` opens, on disk or on the hub.
        max_images: only so many, chosen at random, always the same ones.
        forward_dtype: products of forward passes: ``auto``, ``float32`` or ``bfloat16``.
    """

    images: str | Path
    max_images: int | None = None
    forward_dtype: str = option("auto", shared=True)

    def check(self, device: torch.device) -> None:
        """Look for the pictures, before anything is loaded.

        Raises:
            InputError: they are not there, or a setting is not usable.
        """
        self.precision(device)
        check_pillow()
        if self.max_images is not None:
            check_count("max_images", self.max_images)
        if not is_picture_folder(self.images) and not is_image_set(self.images):
            raise InputError(
                f"{self.images} holds no pictures: give a folder with a folder of pictures for each class, or a set "
                "that datasets opens"
            )

    def ready(self, loaded: LoadedModel) -> LabelledPictures:
        """Find the pictures and the numbers that a model has for their classes, and see to it that it can see them.

        Raises:
            InputError: as `halve.images.labelled.labelled_pictures`; or there is no image processor.
        """
        check_sees(loaded.model, f"{self.images} holds pictures")
        processor_of(loaded)
        return labelled_pictures(self.images, loaded.model, self.max_images)

    def measure(self, loaded: LoadedModel, pictures: LabelledPictures, device: torch.device) -> "TopOne":
        """Return the accuracy of a model.

        Raises:
            InputError: as `accuracy`; or there is no image processor.
        """
        processor = processor_of(loaded)
        return accuracy(
            loaded.model, pictures, processor, device, forward_dtype=self.forward_dtype, weights=loaded.weights
        )


@dataclass(frozen=True)
class TopOne:
    """How many pictures a model puts into the right class at its first guess.

    Attributes:
        source: of the pictures.
        right: of each picture, whether it did.
        sha256: hexadecimal hash of the pictures' pixels and of their classes' numbers, in their order.
        dtype: what the matrices were multiplied in.
        processor: class of the image processor.
        seconds: wall-clock time of the measurement, reading the pictures included.
        versions: of the packages that measured.
    """

    source: str
    right: tuple[bool, ...] = field(repr=False)
    sha256: str
    dtype: str
    processor: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        return len(self.right)

    @property
    def value(self) -> float:
        """Share of the pictures that are right."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy, of the pictures being drawn anew (Wilson's)."""
        return wilson(sum(self.right), len(self.right))

    def minus(self, first: "TopOne") -> "Change | None":
        """Return how this differs from another model's on the same pictures; None where those are others."""
        if self.sha256 != first.sha256 or len(self.right) != len(first.right):
            return None
        both = list(zip(first.right, self.right, strict=True))
        return Change(both.count((True, False)), both.count((False, True)), len(both))

    def as_json(self, first: "TopOne | None" = None) -> dict[str, Any]:
        """Return this as plain JSON values, with what it differs by from the first model's, if there is one."""
        content = {name: value for name, value in asdict(self).items() if name != "right"}
        content |= {"top_one": self.value, "interval": list(self.interval), "pictures": self.pictures}
        change = None if first is None else self.minus(first)
        return content if change is None else content | change.as_json()


@dataclass(frozen=True)
class Change:
    """Two models on the same pictures.

    Attributes:
        lost: pictures that only the first model has right.
        gained: pictures that only the second model has right.
        pictures: all of them.
    """

    lost: int
    gained: int
    pictures: int

    @property
    def value(self) -> float:
        """Accuracy of the second model minus that of the first."""
        return (self.gained - self.lost) / self.pictures

    @property
    def stderr(self) -> float | None:
        """Standard error of that, of the mean of differences picture by picture; None for a single picture."""
        if self.pictures < 2:
            return None
        spread = (self.lost + self.gained) / self.pictures - self.value**2
        return math.sqrt(max(0.0, spread) / (self.pictures - 1))

    @property
    def p_value(self) -> float:
        """Exact McNemar test, two-sided, of ``lost`` and ``gained`` being equally likely."""
        return mcnemar(self.lost, self.gained)

    def as_json(self) -> dict[str, Any]:
        """Return this as plain JSON values."""
        return {
            "difference": self.value,
            "difference_stderr": self.stderr,
            "lost": self.lost,
            "gained": self.gained,
            "p_value": self.p_value,
        }

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" ± {100 * self.stderr:.2f}"
        return f"{100 * self.value:+.2f}{spread} points"


def wilson(right: int, pictures: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share.

    Args:
        right: how many are.
        pictures: of how many, at least 1.
    """
    share, square = right / pictures, _NORMAL**2
    middle = share + square / (2 * pictures)
    half = _NORMAL * math.sqrt(share * (1 - share) / pictures + square / (4 * pictures**2))
    return max(0.0, (middle - half) / (1 + square / pictures)), min(1.0, (middle + half) / (1 + square / pictures))


def accuracy(
    model: nn.Module,
    pictures: LabelledPictures,
    processor: Any,
    device: torch.device | None = None,
    *,
    forward_dtype: str = "auto",
    weights: Weights | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TopOne:
    """Measure the top-1 accuracy of a model on pictures with classes.

    Args:
        model: called with what the processor makes of pictures, it returns logits (pictures, classes), or an object
            that has them as ``logits``.
        pictures: with the numbers of their classes.
        processor: the model's image processor.
        device: where to run; the model is moved there meanwhile. None leaves it where it is.
        forward_dtype: as `halve.evaluation.perplexity.perplexity` has it.
        weights: where the model's weights lie; None is memory.
        progress: called with the pictures done and the pictures in all, after each batch.

    Raises:
        InputError: a picture is not readable, the model gives no logits for it or logits that are not finite, or has
            fewer classes.
    """
    place = model_device(model) if device is None else device
    started = time.perf_counter()
    shown = prepared(pictures.pictures[0], processor, model)[0][input_name(model)]
    most = max(1, _POSITIONS // positions(model, *shown.shape[-2:]))
    starts = range(0, len(pictures.pictures), most)
    with ready(model, place, forward_dtype, weights) as passes:

        def judged(start: int) -> list[tuple[bool, bytes]]:
            labels = pictures.labels[start : start + most]
            found = _judged(model, pictures.pictures[start : start + most], labels, processor, place)
            if progress is not None:
                progress(min(start + most, len(pictures.pictures)), len(pictures.pictures))
            return found

        parts = passes.run([partial(judged, start) for start in starts])
    found = [each for part in parts for each in part]
    return TopOne(
        source=pictures.source,
        right=tuple(right for right, _ in found),
        sha256=hashlib.sha256(b"".join(digest for _, digest in found)).hexdigest(),
        dtype=str(passes.dtype).removeprefix("torch."),
        processor=type(processor).__name__,
        seconds=time.perf_counter() - started,
        versions=versions(),
    )


def top_one(
    model: nn.Module | str | Path,
    images: str | Path,
    *,
    max_images: int | None = None,
    image_processor: Any = None,
    device: str | torch.device = "auto",
    forward_dtype: str = "auto",
    trust_remote_code: bool = False,
    stream: str = AUTO,
    progress: Callable[[int, int], None] | None = None,
) -> TopOne:
    """Measure the top-1 accuracy of a model that classifies pictures.

    Args:
        model: a model in memory, or a checkpoint as `halve.checkpoint.load.load_model` takes it.
        images: pictures with their classes, see `ImageEvaluation`.
        max_images: only so many, chosen at random, always the same ones.
        image_processor: of a model in memory; None takes the checkpoint's own.
        device: ``"auto"`` is where a model in memory lies, and the GPU if there is one for a checkpoint.
        forward_dtype: as `halve.evaluation.perplexity.perplexity` has it.
        trust_remote_code: whether to run Python code that comes with the checkpoint.
        stream: whether the weights of a checkpoint stay on disk: ``always``, ``never``, or ``auto``.
        progress: as for `accuracy`.

    Raises:
        InputError: the pictures, their classes or an argument are not usable, or there is no image processor.
        HalveError: the checkpoint cannot be loaded, see `halve.checkpoint.load.load_model`.
    """
    place = model_device(model) if isinstance(model, nn.Module) and device == "auto" else resolve_device(device)
    asked = ImageEvaluation(images, max_images, forward_dtype)
    asked.check(place)
    check_stream(stream)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            loaded = LoadedModel(model, None, None)  # type: ignore[arg-type]
        else:
            source = resolve(model, trust_remote_code=trust_remote_code)
            loaded = stack.enter_context(loaded_to_measure(source, stream))
        if image_processor is not None:
            loaded = replace(loaded, tokenizer=image_processor)
        pictures = asked.ready(loaded)
        how: dict[str, Any] = {"forward_dtype": forward_dtype, "weights": loaded.weights, "progress": progress}
        return accuracy(loaded.model, pictures, processor_of(loaded), place, **how)


def _judged(
    model: nn.Module, pictures: Sequence[Picture], labels: Sequence[int], processor: Any, device: torch.device
) -> list[tuple[bool, bytes]]:
    """Return of each picture whether the model's first guess is right, and the hash of its pixels and its class."""
    rows, digests = [], []
    dtype = weight_dtype(model)
    for picture, label in zip(pictures, labels, strict=True):
        row, pixels = prepared(picture, processor, model)
        digests.append(hashlib.sha256(f"{label}\n".encode() + pixels).digest())
        rows.append({name: each.to(device, dtype if each.is_floating_point() else None) for name, each in row.items()})
    try:
        logits = torch.cat([_logits(model, batch) for batch in stacked(rows, len(rows))])
    except (ValueError, RuntimeError, AssertionError) as error:  # as models refuse pictures of another size
        caution = caution_of_sizes(rows)
        if isinstance(error, HalveError | torch.OutOfMemoryError) or not caution:
            raise
        raise InputError(f"{type(model).__name__} cannot be run on the pictures: {caution}") from error
    if max(labels) >= logits.shape[1]:
        raise InputError(
            f"{type(model).__name__} knows {logits.shape[1]} classes, and the pictures have one with the number "
            f"{max(labels)}: give pictures of its classes"
        )
    if not bool(logits.isfinite().all()):
        good = logits.isfinite().all(dim=1).tolist()
        strange = [each.where for each, finite in zip(pictures, good, strict=True) if not finite]
        raise InputError(f"{type(model).__name__} gives logits that are not finite for {first_few(strange)}")
    guesses = logits.argmax(dim=1).tolist()
    right = (guess == label for guess, label in zip(guesses, labels, strict=True))
    return list(zip(right, digests, strict=True))


def _logits(model: nn.Module, batch: Any) -> Tensor:
    """Return the logits (pictures, classes) of a batch, float32 on the CPU."""
    name = type(model).__name__
    try:
        output = model(**batch)
        found = output if isinstance(output, Tensor) else output.logits
    except AttributeError as error:
        raise InputError(f"{name} classifies no pictures ({one_line(error)}): give an image classifier") from error
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = tuple(getattr(found, "shape", ()))
        raise InputError(f"{name} classifies no pictures, its logits have shape {shape}: give an image classifier")
    return found.float().cpu()
