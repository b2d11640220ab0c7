"""The plugin's own code, with a stand-in for vLLM: what it does with the real one is in `test_vllm_serving`."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from halve.engines import vllm_plugin
from halve.errors import InputError
from packed_models import packed

LAYERS, LOADERS = "vllm.model_executor.layers.quantization", "vllm.model_executor.model_loader"


class BaseModelLoader:
    def load_model(self, vllm_config, model_config, prefix=""):
        return vllm_config, prefix


@pytest.fixture
def engine(monkeypatch):
    """The parts of vLLM that are registered with, and what they were given."""
    given = {}
    layers, loaders, base = ModuleType(LAYERS), ModuleType(LOADERS), ModuleType(f"{LOADERS}.base_loader")
    layers.QUANTIZATION_METHODS = ["fp8"]

    def quantisation(name):
        layers.QUANTIZATION_METHODS.append(name)
        return lambda kind: given.setdefault("quantisation", []).append((name, kind))

    layers.register_quantization_config = quantisation
    loaders.register_model_loader = lambda name: lambda kind: given.setdefault("loader", []).append((name, kind))
    base.BaseModelLoader = BaseModelLoader
    config = ModuleType("halve.engines.vllm_config")
    config.NAME, config.HalveConfig = "halve", object
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (layers, loaders, base, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "halve.engines.vllm_loader", ModuleType(""))  # to be put back, if there was one
    del sys.modules["halve.engines.vllm_loader"]
    return given


@pytest.fixture
def loader(engine):
    return importlib.import_module("halve.engines.vllm_loader").HalveModelLoader()


def test_both_are_registered_once(engine, loader):
    vllm_plugin.register()
    vllm_plugin.register()
    assert engine == {"loader": [("halve", type(loader))], "quantisation": [("halve", object)]}


@pytest.mark.parametrize("broken", ["halve.engines.vllm_config", "halve.engines.vllm_loader", LAYERS, LOADERS])
def test_what_cannot_be_imported_is_a_line_in_the_log(engine, monkeypatch, caplog, broken):
    monkeypatch.setitem(sys.modules, broken, None)
    vllm_plugin.register()
    assert engine == {}
    (line,) = caplog.records
    assert line.name == "vllm.halve.engines.vllm_plugin"
    assert "--quantization halve is not available (ModuleNotFoundError: " in line.getMessage()
    assert line.exc_info is None


def test_a_packed_checkpoint_is_not_loaded_into_dense_layers(loader, tmp_path):
    model = SimpleNamespace(model=str(packed(tmp_path, "llama")), quantization="halve")
    assert loader.load_model("config", model, prefix="p") == ("config", "p")
    model.quantization = None
    for load in (lambda: loader.load_model("config", model), lambda: loader.load_weights(None, model)):
        with pytest.raises(InputError, match="add --quantization halve"):
            load()


def test_another_checkpoint_is_not_loaded(loader, tmp_path):
    with pytest.raises(InputError, match="serves packed checkpoints on this machine"):
        loader.load_model("config", SimpleNamespace(model=str(tmp_path), quantization="halve"))
