"""Fetching from the hub: what is asked of it, what comes of it, and why it gave nothing."""

import shutil
from importlib import import_module

import huggingface_hub
import huggingface_hub.errors as hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

import halve
import models
from halve.checkpoint.load import load_model, resolve, skeleton
from halve.errors import CorruptFileError, InputError, UnsupportedModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(root, directory, monkeypatch):
    """Lay ``directory`` out as the hub's cache does, and forbid the network."""
    repository = root / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in directory.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_revision_is_for_the_hub(llama):
    with pytest.raises(InputError, match="leave the revision out"):
        resolve(llama, revision="main")


def test_a_hub_model_comes_from_the_cache(tmp_path, sharded, monkeypatch):
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    snapshot = cache(tmp_path / "cache", sharded, monkeypatch)
    source = resolve("org/tiny")
    assert (source.kind, source.path, source.name, source.revision) == ("hub", snapshot, "org/tiny", COMMIT)
    loaded = load_model(source)
    assert torch.equal(loaded.model.lm_head.weight, models.decoder("llama").lm_head.weight)
    assert loaded.model.config._name_or_path == "org/tiny"
    (snapshot / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(CorruptFileError, match="leaves"):
        resolve("org/tiny")


def test_only_safetensors_and_settings_are_asked_of_the_hub(tmp_path, sharded, monkeypatch):
    snapshot = cache(tmp_path / "cache", sharded, monkeypatch)
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns, local_files_only):
        files = [
            "a.safetensors",
            "b.safetensors",
            "consolidated.safetensors",
            "original/a.safetensors",
            "a.bin",
            "a.py",
        ]
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.append((name, revision, [*allow_patterns], [*wanted], local_files_only))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("org/tiny", revision="v1")
    (_, first, settings, none, offline), (_, second, _, weights, _) = asked
    assert (first, second, offline) == ("v1", COMMIT, True)
    assert (none, weights) == ([], ["a.safetensors", "b.safetensors"])
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) and "." in pattern for pattern in settings)
    asked.clear()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        resolve("org/tiny")
    assert len(asked) == 1  # refused before the weights were fetched


def test_a_hub_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="org/absent is no file or directory here, and its files are not all in the"):
        resolve("org/absent")


def answer(kind, status, code=""):
    """Return an error as the hub's client makes it of an answer."""
    headers = {"X-Error-Code": code} if code else {}
    module = import_module(next(base for base in kind.__mro__ if base.__name__ == "HTTPError").__module__.split(".")[0])
    request = module.Request("GET", "https://huggingface.co/api/models/org/tiny")
    return kind(f"{status} of the hub", response=module.Response(status, headers=headers, request=request))


def no_network():
    """Return what the hub's client raises where names cannot be resolved."""
    error = hub.LocalEntryNotFoundError("Got: ConnectError: a long explanation " + "x" * 300)
    error.__cause__ = ConnectionError("Name or service not known")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (no_network(), "org/tiny is no file or directory here, and the hub cannot be reached: check"),
        (answer(hub.GatedRepoError, 403), "org/tiny is gated on the hub and needs a login: accept its terms there"),
        (answer(hub.RepositoryNotFoundError, 404), "here, and the hub does not know it, or only to those logged in"),
        (answer(hub.RevisionNotFoundError, 404), "the hub has org/tiny, but no revision 'v9' of it: give one of"),
        (answer(hub.HfHubHTTPError, 401), "here, and the hub refuses the login it was given: log in anew"),
        (answer(hub.HfHubHTTPError, 503), r"here, and the hub answers with an error \(503\): try again later"),
        (hub.HFValidationError("Repo id must use"), "here, and the hub has no names like that: give a directory"),
        (OSError(28, "No space left on device"), "org/tiny cannot be stored in the local cache: OSError: .*No space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_why_the_hub_gave_nothing_is_one_short_sentence(monkeypatch, error, said):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=said) as caught:
        resolve("org/tiny", revision="v9")
    assert len(str(caught.value)) < 160
    assert caught.value.__cause__ is error
    assert caught.value.details.startswith(type(error).__name__)


def test_a_name_that_nobody_has_is_compared_with_what_is_here(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise no_network()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(InputError, match=r"^tinyy is no file or directory here \(did you mean tiny\?\), and the hub"):
        resolve("tinyy")


def test_the_details_of_no_network_are_the_whole_chain(monkeypatch):
    def fail(*_args, **_options):
        raise no_network()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        resolve("missing-name")
    first, second = caught.value.details.splitlines()
    assert first.startswith("LocalEntryNotFoundError: Got: ConnectError")
    assert second == "ConnectionError: Name or service not known"


@pytest.mark.parametrize("name", ["./modle", "models/modle", "models/modle.gguf"])
def test_a_path_with_a_slip_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "models" / "model").mkdir(parents=True)
    (tmp_path / "models" / "model.gguf").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: pytest.fail("asked the hub"))
    meant = name.replace("modle", "model").removeprefix("./")
    with pytest.raises(InputError, match=f"^{name} does not exist: did you mean {meant}\\? give a directory"):
        resolve(name)


def test_of_the_hub_a_skeleton_asks_for_settings_alone(tmp_path, llama, monkeypatch):
    (llama / "model.safetensors").unlink()
    cache(tmp_path / "cache", llama, monkeypatch)
    asked, download = [], huggingface_hub.snapshot_download

    def spy(name, *, allow_patterns, **keywords):
        asked.extend(allow_patterns)
        return download(name, allow_patterns=allow_patterns, **keywords)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    source = resolve("org/tiny", weights=False)
    assert (source.kind, source.revision, source.shards) == ("hub", COMMIT, ())
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)
    assert len(list(skeleton(source).parameters())) == len(list(models.decoder("llama").parameters()))


def test_a_second_copy_in_the_cache_is_left_there_and_that_is_said(tmp_path, sharded, monkeypatch):
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, sharded / "consolidated.safetensors")
    save_file({"mtp.norm.weight": torch.ones(4)}, sharded / "mtp.safetensors")
    cache(tmp_path / "cache", sharded, monkeypatch)
    pruned = halve.prune("org/tiny", tmp_path / "out", method="magnitude", refit="none")
    assert pruned.record["warnings"][:1] == list(pruned.notes)
    assert "consolidated.safetensors of the cache is a second copy of the weights, and is not written" in pruned.notes
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    assert (tmp_path / "out" / "mtp.safetensors").read_bytes() == (sharded / "mtp.safetensors").read_bytes()
