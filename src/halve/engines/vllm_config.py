"""What vLLM is told by ``--quantization halve``: which layers Halve takes, and how their weights are held."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from halve.checkpoint.directory import is_packed
from halve.engines.layer_tally import LayerTally, multiplied_by
from halve.engines.layer_weight import PATTERN
from halve.engines.vllm_linear import HalveLinearMethod
from halve.errors import InputError
from halve.runtime.packed_matrix import DTYPES
from halve.runtime.quantised_matrix import bits_of

NAME = "halve"
"""Of the quantisation, and of the load format."""
_KEYS = {"quant_method", "values"}
logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own


class HalveConfig(QuantizationConfig):  # type: ignore[misc] # vLLM need not be installed
    """How a 2:4 model is held in memory.

    Args:
        values: what plain weights are packed as: ``own`` or ``bf16`` as they are, ``int8`` or ``int4`` rounded.

    Raises:
        InputError: there are no such values.
    """

    def __init__(self, values: str = "own") -> None:
        super().__init__()
        self.values, self.bits = values, bits_of(values, PATTERN)
        head = multiplied_by(current_platform.device_type, self.bits)
        self.tally = LayerTally(lambda line: logger.info("halve (%s): %s", head, line))
        self.gains: dict[tuple[torch.Size, torch.dtype], float] = {}
        self._checked = False

    def get_name(self) -> str:
        """Return what ``--quantization`` is given."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes a model may compute in."""
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU, as vLLM writes it: elsewhere than on one nothing is asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: a checkpoint at 2:4 is an ordinary one."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HalveConfig":
        """Read ``--hf-overrides '{"quantization_config": {"quant_method": "halve", "values": "int8"}}'``.

        Raises:
            InputError: it has another key, or a value that there is not.
        """
        if unknown := sorted(config.keys() - _KEYS):
            raise InputError(f"quantization_config has {unknown[0]!r}, which Halve does not know: give values alone")
        return cls(config.get("values", "own"))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what a linear layer does; None, which is vLLM's own way, for all others.

        Raises:
            InputError: what is served and what is asked for do not go together.
        """
        self._check_once()
        if isinstance(layer, LinearBase):
            return HalveLinearMethod(prefix, self.bits, self.tally, self.gains)
        if isinstance(layer, VocabParallelEmbedding):
            self.tally.leave(prefix or type(layer).__name__, "embeddings and heads are not packed")
        elif "Experts" in type(layer).__name__ or "MoE" in type(layer).__name__:
            self.tally.leave(prefix, "vLLM multiplies experts in kernels of its own")
        return None

    def _check_once(self) -> None:
        if self._checked:
            return
        asked = get_current_vllm_config()
        directory, by_us = asked.model_config.model, asked.load_config.load_format == NAME
        if is_packed(Path(directory)) and not by_us:
            raise InputError(f"{directory} is packed: add --load-format {NAME}")
        if by_us and self.bits is not None:
            raise InputError(
                f"{directory} is packed, and its values stay what they are: leave values={self.values} out"
            )
        self._checked = True
