"""Settings and fixtures for all tests."""

import os

import pytest
from hypothesis import settings

from models import decoder, save
from tiny_tokenizers import SENTENCES, byte_bpe

# A busy machine must not turn a slow example into a failure.
settings.register_profile("halve", deadline=None)
settings.load_profile("halve")
# Ray keeps the mode of its first cluster in a process, and the clusters that tests start by hand have no token.
os.environ["RAY_AUTH_MODE"] = "disabled"


def pytest_collection_modifyitems(items):
    """Let tests that start Ray come last: its threads would not survive in the forks of others."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture(autouse=True)
def ray_only_where_it_is_marked(request, monkeypatch):
    """Let no test start Ray, or reach it, before those that are sorted to the end."""
    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setattr("halve.workers.cluster._connect", None)


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Llama on disk, with a tokenizer."""
    directory = tmp_path / "dense"
    decoder("llama", vocab_size=320).save_pretrained(directory)
    byte_bpe().save_pretrained(directory)
    return directory


@pytest.fixture
def model(checkpoint):
    """The same, as it is written on a command line."""
    return str(checkpoint)


@pytest.fixture
def text(tmp_path):
    """A file of calibration text, as it is written on a command line."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    return str(path)


@pytest.fixture
def llama(tmp_path):
    """A tiny Llama on disk, without a tokenizer."""
    return save(decoder("llama"), tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path):
    """The same in several shards."""
    return save(decoder("llama"), tmp_path / "sharded", max_shard_size="40KB")


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """Where transformers copies code that is trusted: one place for all, as a process imports that package once."""
    return str(tmp_path_factory.mktemp("modules"))
