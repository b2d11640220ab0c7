"""Pictures on disk: which files of a folder are pictures, and what one of them shows."""

import io
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from halve.errors import InputError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

_NUMBER = re.compile(r"\d+")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """One picture, not yet read.

    Attributes:
        where: it is named, for messages.
        content: returns the bytes of its file.
        name: of its class; empty where none is known.
    """

    where: str
    content: Callable[[], bytes]
    name: str = ""


def is_picture_folder(source: object) -> bool:
    """Whether a source names a folder with a picture in it, or in a folder below."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source).expanduser()
    return path.is_dir() and next(_files(path), None) is not None


def folder_pictures(folder: str | Path) -> list[Picture]:
    """List the pictures of a folder and of those below, in the order of their paths.

    The class of a picture is the name of the first folder below, empty for one that lies in ``folder`` itself.

    Raises:
        InputError: there is no such folder, or no picture in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"folder of pictures {str(folder)!r} does not exist: give one")
    found = sorted(_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not found:
        raise InputError(f"folder {folder} holds no pictures: expected {', '.join(SUFFIXES)} files in it")
    return [Picture(str(path), partial(_content, path), _class(path.relative_to(root))) for path in found]


def chosen(pictures: Sequence[Picture], samples: int, seed: int, source: str | Path) -> list[Picture]:
    """Choose pictures at random, none twice.

    Raises:
        InputError: there are fewer than ``samples``.
    """
    if len(pictures) < samples:
        raise InputError(
            f"{source} has {len(pictures)} pictures, but samples = {samples}: give more pictures, or fewer samples"
        )
    return random.Random(seed).sample(pictures, samples)  # noqa: S311 - a choice that can be repeated


def check_pillow() -> None:
    """Refuse to go on where nothing can read pictures.

    Raises:
        InputError: Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise InputError("pictures need the Pillow package, which is not installed: pip install 'halve[images]'")


def opened(picture: Picture, channels: int = 3) -> "Image":
    """Read a picture, turned as its camera was held.

    Args:
        picture: which.
        channels: 3 for RGB, 1 for shades of grey.

    Returns:
        Image: 8 bits a channel; without transparency, and of an animation the first frame.

    Raises:
        InputError: it cannot be read, has more pixels than Pillow allows, or numbers that are no shades.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(picture.content())) as image:
                _check_shades(image, picture.where)
                return _of_8_bits(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        pixels = _NUMBER.search(str(error))
        raise InputError(
            f"{picture.where} is too large ({pixels[0] if pixels else 'too many'} pixels, limit "
            f"{Image.MAX_IMAGE_PIXELS}): scale it down"
        ) from error
    except Exception as error:  # Pillow's readers raise anything over broken files
        said = "" if isinstance(error, UnidentifiedImageError) else f" ({one_line(error)})"
        raise InputError(f"{picture.where} is not a readable picture{said}: remove it, or mend it") from error


def _check_shades(image: "Image", where: str) -> None:
    """Refuse numbers of 32 bits, of which nobody knows which is white; a netpbm file's are of 16 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise InputError(f"{where} holds {kind}, and not shades of 8 or 16 bits: convert it")


def _of_8_bits(image: "Image") -> "Image":
    """Scale shades of 16 bits, which Pillow would cut off at 255."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda shade: shade * (1 / 257) + 0.5).convert("L")
    return image


def _files(root: Path) -> Iterator[Path]:
    """Yield the pictures below a folder, in no order; what is hidden is none."""
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _class(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): remove it, or mend it") from error
