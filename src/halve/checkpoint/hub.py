"""Fetching models from the Hugging Face hub, and one sentence on why one could not be had."""

from difflib import get_close_matches
from http import HTTPStatus
from pathlib import Path

from halve.checkpoint.directory import (
    CARD,
    CODE,
    COMPANIONS,
    INDEX,
    TEMPLATES,
    check_config,
    contained,
)
from halve.checkpoint.weight_files import COPIES, weight_map_of
from halve.errors import InputError, one_line


def download(name: str, revision: str | None, *, code: bool, weights: bool) -> Path:
    """Fetch a model's settings, and its weights only once nothing in them is refused.

    All safetensors files are weights but those in folders, and Mistral's second copy.

    Args:
        name: of the model, such as ``org/model``.
        revision: a branch, tag or commit; None is the newest.
        code: whether Python code that comes with the model is accepted and fetched.
        weights: whether its weights are fetched.

    Returns:
        Path: the directory in the local cache, named by the commit.

    Raises:
        InputError: the hub does not give it, or the cache cannot take it; one sentence says why, and the error of the
            hub's client is its cause.
        UnsupportedModelError: its settings ask for what is not supported, such as code where it is not accepted.
    """
    from huggingface_hub import constants, snapshot_download

    def fetch(patterns: list[str], commit: str | None, but: list[str]) -> Path:
        offline = bool(constants.HF_HUB_OFFLINE)
        try:
            return Path(
                snapshot_download(
                    name, revision=commit, allow_patterns=patterns, ignore_patterns=but, local_files_only=offline
                )
            )
        except Exception as error:  # of the hub's client, of what carries its requests, or of the disk
            raise InputError(_why_not_downloaded(name, revision, error, offline=offline)) from error

    path = fetch([*COMPANIONS, CARD, f"{TEMPLATES}/*.jinja", *([CODE] if code else [])], revision, [])
    check_config(path, code=code)
    if not weights:
        return path
    if (path / INDEX).exists():
        weight_map_of(contained(path, path / INDEX))
    return fetch(["*.safetensors"], path.name, ["*/*", COPIES])  # an index need not name all that belong to it


def _why_not_downloaded(name: str, revision: str | None, error: Exception, *, offline: bool) -> str:
    """Return one sentence on why the hub did not give a model; the error itself is for those who ask for details."""
    from huggingface_hub import errors

    near = similar(Path(name))
    nothing_here = f"{name} is no file or directory here{f' (did you mean {near}?)' if near else ''}, and"
    response = getattr(error if isinstance(error, errors.HfHubHTTPError) else error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated on the hub and needs a login: accept its terms there, then `hf auth login`"
        case errors.RepositoryNotFoundError():
            return (
                f"{nothing_here} the hub does not know it, or only to those logged in: check the spelling, or log in "
                "with `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return f"the hub has {name}, but no revision {revision!r} of it: give one of its branches, tags or commits"
        case errors.HFValidationError():
            return f"{nothing_here} the hub has no names like that: give a directory, a .gguf file, or org/model"
        case errors.HfHubHTTPError() if status == HTTPStatus.UNAUTHORIZED:
            return f"{nothing_here} the hub refuses the login it was given: log in anew with `hf auth login`"
        case errors.LocalEntryNotFoundError() if offline:
            return (
                f"{nothing_here} its files are not all in the local cache: the hub is not asked while HF_HUB_OFFLINE "
                "is set"
            )
    if status is not None:
        return f"{nothing_here} the hub answers with an error ({status}): try again later"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be stored in the local cache: {one_line(error)}"
    return f"{nothing_here} the hub cannot be reached: check the name, and the network"


def similar(path: Path) -> Path | None:
    """Return the neighbour that is called nearly as a path that does not exist, if there is one."""
    folder = path.parent
    try:
        neighbours = {entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".gguf"}
    except OSError:  # the folder is not there, or not for us to read
        return None
    close = get_close_matches(path.name, neighbours, n=1)
    return folder / close[0] if close else None
