"""What vLLM loads by ``--load-format halve``: a packed checkpoint, whose packed matrices stay packed."""

from pathlib import Path
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from halve.checkpoint.directory import is_packed
from halve.engines.packed_tensor import tensors
from halve.errors import CorruptFileError, InputError, first_few
from halve.packed.read import open_packed


class HalveModelLoader(BaseModelLoader):  # type: ignore[misc] # vLLM need not be installed
    """Gives a model's own loading code the tensors of a packed checkpoint, under the names of the plain one."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Load a model, once it is known that it will be served packed.

        Raises:
            InputError: as `download_model`.
        """
        self.download_model(model_config)
        loaded: nn.Module = super().load_model(vllm_config, model_config, prefix)
        return loaded

    def download_model(self, model_config: Any) -> None:
        """Check that the checkpoint is there, since it is never downloaded, and that its layers will take it packed.

        Raises:
            InputError: it is no packed checkpoint on this machine, or is to be served without Halve's layers.
        """
        if model_config.quantization != "halve":
            raise InputError(
                "--load-format halve alone would unpack every matrix and serve the model dense: add --quantization "
                "halve"
            )
        if not is_packed(Path(model_config.model)):
            raise InputError(
                f"--load-format halve serves packed checkpoints on this machine, and {model_config.model} is none: "
                "`halve pack` writes one, a plain checkpoint is served without it"
            )

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load a checkpoint into a model.

        Raises:
            InputError: as `download_model`.
            CorruptFileError: it is damaged, or a parameter of the model has no tensor in it.
        """
        self.download_model(model_config)
        checkpoint = open_packed(model_config.model, trust_remote_code=model_config.trust_remote_code)
        wanted = {name for name, _ in model.named_parameters()}
        loaded = model.load_weights(tensors(checkpoint))  # type: ignore[operator]
        if loaded is not None and (missing := sorted(wanted - loaded)):
            raise CorruptFileError(f"{model_config.model} has no tensor for {first_few(missing)}: pack it again")
