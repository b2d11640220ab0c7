"""Sets of pictures with classes that the ``datasets`` package opens: on disk, in Parquet files, or on the hub."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halve.errors import InputError, first_few, one_line
from halve.images.pictures import Picture, is_picture_folder

_SPLITS = ("validation", "valid", "val", "dev", "test")
"""Of which the first that is there is taken, where nobody names one."""
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}.*")
_KEYWORD = re.compile(
    r"(?:^|[-._ \d])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?=[-._ \d]|$)", re.IGNORECASE
)
"""What says in the name of a Parquet file or of its folder which split it is of, as for ``datasets`` itself."""


def is_image_set(source: str | Path) -> bool:
    """Whether a source is for ``datasets``, and no folder of pictures."""
    name, path = str(source), Path(source).expanduser()
    if path.is_dir():
        return not is_picture_folder(path) and (_is_saved(path) or any(path.rglob("*.parquet")))
    if path.is_file():
        return path.suffix == ".parquet"
    place = Path(name.rpartition(":")[0] or name).expanduser()
    return (place.exists() and is_image_set(place)) or not (path.is_absolute() or name.startswith((".", "~")))


def set_pictures(source: str | Path) -> tuple[list[Picture], Sequence[str]]:
    """List the pictures of a set, and its classes in their order, where it has one.

    Args:
        source: a directory that ``save_to_disk`` has written; a ``.parquet`` file, or a directory of them, whose names
            or folders say their splits where there are several; or a name on the hub; each with ``:SPLIT`` at its end,
            or without: then the validation split, or else the test split, is taken where there are several.

    Raises:
        InputError: ``datasets`` is missing, there is no such set or split, or it has no pictures or no classes.
    """
    if find_spec("datasets") is None:
        raise InputError(f"{source} is for the datasets package, which is not installed: pip install 'halve[data]'")
    import datasets

    name, split = _parted(str(source))
    try:
        with _quiet(datasets):
            rows = _opened(datasets, name, split)
    except InputError:
        raise
    except Exception as error:  # reading strangers' files, or asking the hub, can provoke anything
        raise InputError(
            f"set of pictures {str(source)!r} cannot be opened: {one_line(error)}; give a folder with a folder for "
            "each class, a set that datasets has saved, .parquet files, or a name on the hub"
        ) from error
    pictures, classes = _columns(datasets, rows, source)
    rows = rows.cast_column(pictures, datasets.Image(decode=False))
    names = getattr(rows.features[classes], "names", None) or ()
    found = [
        Picture(f"picture {number} of {source}", partial(_content, rows, number, pictures), _name(label, names, source))
        for number, label in enumerate(rows[classes])
    ]
    if not found:
        raise InputError(f"{source} holds no pictures: give another set")
    return found, tuple(names)


def _parted(name: str) -> tuple[str, str]:
    """Return what names a set, and its split, empty where none is named."""
    place, _, split = name.rpartition(":")
    return (place, split) if place and not Path(name).expanduser().exists() else (name, "")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _opened(datasets: Any, name: str, split: str) -> Any:
    path = Path(name).expanduser()
    if path.is_dir() and _is_saved(path):
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, datasets.DatasetDict):
            _refuse_split(split, name)
            return found
        return found[_split(list(found), split, name)]
    if path.exists():
        splits = _file_splits(path)
        if list(splits) == [""]:
            _refuse_split(split, name)
        files = splits[""] if "" in splits else splits[_split(list(splits), split, name)]
        return datasets.Dataset.from_parquet([str(file) for file in files])
    return datasets.load_dataset(name, split=_split(datasets.get_dataset_split_names(name), split, name))


def _file_splits(path: Path) -> dict[str, list[Path]]:
    """Return the Parquet files of each split; all under the empty name where nothing says one.

    Files that say none beside some that do are each a split that is called like the file.
    """
    if path.is_file():
        return {"": [path]}
    files = sorted(path.rglob("*.parquet"))
    said = [_said_split(file.relative_to(path)) for file in files]
    if not any(said):
        return {"": files}
    found: dict[str, list[Path]] = {}
    for file, split in zip(files, said, strict=True):
        found.setdefault(split or file.stem, []).append(file)
    return found


def _said_split(path: Path) -> str:
    if shard := _SHARD.fullmatch(path.stem):
        return shard[1]
    names = (path.stem, *reversed(path.parts[:-1]))
    return next((found[1].lower() for name in names if (found := _KEYWORD.search(name))), "")


def _refuse_split(asked: str, name: str) -> None:
    if asked:
        raise InputError(f"{name} has no splits, and {asked} is asked for: leave :{asked} out")


def _split(splits: Sequence[str], asked: str, name: str) -> str:
    wanted = [asked] if asked else [*_SPLITS, *(splits if len(splits) == 1 else ())]
    found = next((each for each in wanted if each in splits), None)
    if found is None:
        raise InputError(
            f"{name} has the splits {', '.join(splits)}{f', and none called {asked}' if asked else ''}: give one of "
            f"them, {name}:{splits[-1]}"
        )
    return found


def _columns(datasets: Any, rows: Any, source: str | Path) -> tuple[str, str]:
    """Return the names of the columns of pictures and of classes."""
    features = rows.features
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    pictures = pictures or [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in ("label", "labels") if name in features]
    classes = classes if len(classes) == 1 else [name for name in named if name in classes or not classes]
    if len(pictures) != 1 or len(classes) != 1:
        raise InputError(
            f"{source} has the columns {first_few(list(features))}, and needs one of pictures and one of classes: give "
            "a set with the columns image and label"
        )
    return pictures[0], classes[0]


def _name(label: Any, names: Sequence[str], source: str | Path) -> str:
    if isinstance(label, int) and names:
        if not 0 <= label < len(names):
            raise InputError(f"{source} has a picture of class {label}, without a name: leave out what has no class")
        return names[label]
    return "" if label is None else str(label)


def _content(rows: Any, number: int, column: str) -> bytes:
    entry = rows[number][column] or {}
    if entry.get("bytes"):
        return bytes(entry["bytes"])
    if entry.get("path"):
        return Path(entry["path"]).read_bytes()
    raise InputError(f"picture {number} is empty: leave it out of the set")


def _quiet(datasets: Any) -> Any:
    """Show no bars meanwhile."""
    from contextlib import ExitStack

    stack = ExitStack()
    progress: Callable[[], bool] = datasets.are_progress_bars_disabled
    if not progress():
        datasets.disable_progress_bars()
        stack.callback(datasets.enable_progress_bars)
    return stack
