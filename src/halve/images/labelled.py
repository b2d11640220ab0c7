"""Pictures with the class that each of them shows, by the numbers that a model has for its classes."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from halve.errors import InputError, first_few
from halve.images.image_sets import is_image_set, set_pictures
from halve.images.pictures import Picture, chosen, folder_pictures

_WORDNET = re.compile(r"n\d{8}")
"""How the folders of ImageNet are called."""
_IMAGENET = 1000
"""Of which there are so many."""


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures, and the class of each.

    Attributes:
        pictures: in the order in which they are looked at.
        labels: number of the class of each, as the model has it.
        source: what the user named.
    """

    pictures: tuple[Picture, ...]
    labels: tuple[int, ...]
    source: str

    @property
    def listing(self) -> str:
        """Hexadecimal hash of what the pictures are called, and of their classes: it tells lists apart, not pixels."""
        lines = (f"{picture.where} {label}\n" for picture, label in zip(self.pictures, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def labelled_pictures(source: str | Path, model: nn.Module, max_images: int | None = None) -> LabelledPictures:
    """Find pictures and their classes: in a folder with a folder for each class, or in a set of ``datasets``.

    Args:
        source: the folder; or a directory, a ``.parquet`` file or a name on the hub that ``datasets`` opens
            (`halve.images.image_sets.set_pictures`).
        model: whose config names its classes (``id2label``).
        max_images: only so many, chosen at random, always the same ones; None takes all.

    Raises:
        InputError: there are no pictures or no classes, or a class is not one of the model's.
    """
    if is_image_set(source):
        pictures, ordered = set_pictures(source)
    else:
        pictures, ordered = folder_pictures(source), ()
    bare = next((picture.where for picture in pictures if not picture.name), None)
    if bare is not None:
        raise InputError(
            f"{bare} has no class: put the pictures of each class into a folder of {source} that is called like it"
        )
    numbers = match_classes([picture.name for picture in pictures], model, ordered, source)
    if max_images is not None and max_images < len(pictures):
        pictures = chosen(pictures, max_images, 0, source)
    return LabelledPictures(tuple(pictures), tuple(numbers[each.name] for each in pictures), str(source))


def match_classes(
    names: Sequence[str], model: nn.Module, ordered: Sequence[str], source: str | Path
) -> Mapping[str, int]:
    """Return the number that a model has for each class of a set.

    Classes are the model's by their names (upper and lower case, underscores and spaces alike; of a label such as
    ``tench, Tinca tinca`` each name that no other label has). Only where the model knows none of the set's names are
    they its by their numbers, or else by their order: where the set orders as many classes as the model has, or where
    all 1000 folders of ImageNet (``n01440764``, …) are there for a model of 1000 classes. Their order is believed of a
    model that has names of its own too: whether both mean the same classes is the user's to know.

    Args:
        names: of the classes, in any order and number.
        model: the model.
        ordered: all classes of the set in its own order; empty where it has none.
        source: of the pictures, for messages.

    Raises:
        InputError: a class is not known, or several of the model's are called like it.
    """
    classes, labels = sorted(set(names)), _labels(model)
    known, several = _known(labels)
    if all(_plain(name) in known for name in classes):
        return {name: known[_plain(name)] for name in classes}
    twice = next((name for name in classes if _plain(name) in several), None)
    if twice is not None:
        numbers = first_few([str(number) for number in several[_plain(twice)]])
        raise InputError(
            f"{source} has a class {twice!r}, and several of the model's classes are called so ({numbers}): call the "
            "classes by their numbers"
        )
    if not any(_plain(name) in known for name in (*classes, *ordered)):
        if all(name.isdecimal() and (not labels or int(name) in labels) for name in classes):
            return {name: int(name) for name in classes}
        count = len(labels) or getattr(model, "num_classes", None)
        if len(classes) == count == _IMAGENET and all(_WORDNET.fullmatch(name) for name in classes):
            ordered = classes
        if ordered and len(ordered) == (count or len(ordered)):
            return {name: number for number, name in enumerate(ordered)}
    strange = next(name for name in classes if _plain(name) not in known)
    raise InputError(
        f"{source} has a class {strange!r}, and the model knows no such one{_contradiction(known, ordered)}: call the "
        f"classes as its config does ({first_few(list(labels.values()))}), or all by their numbers"
    )


def _known(labels: Mapping[int, str]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Return the number of each name that one class alone has, and the numbers of each that several have.

    A whole label goes before a name that is only a part of others.
    """
    whole, parts = defaultdict(list), defaultdict(list)
    for number, label in labels.items():
        whole[_plain(label)].append(number)
        for part in {_plain(each) for each in label.split(",")}:
            parts[part].append(number)
    found = {**parts, **whole}
    known = {name: numbers[0] for name, numbers in found.items() if len(numbers) == 1}
    return known, {name: numbers for name, numbers in found.items() if len(numbers) > 1}


def _contradiction(known: Mapping[str, int], ordered: Sequence[str]) -> str:
    """Say which class a set has at another place than the model does; empty where there is none."""
    for number, name in enumerate(ordered):
        if known.get(_plain(name), number) != number:
            return f", nor does its order tell: {name!r} is number {number} of the set and {known[_plain(name)]} of it"
    return ""


def _labels(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's classes by their numbers; empty where it has no config."""
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    return {int(number): str(label) for number, label in named.items()}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
