"""The entry point by which vLLM finds Halve: it makes ``--quantization halve`` and ``--load-format halve`` known.

Registering is passive: a model that is served without them is served as without Halve, also where Halve does not work.
"""

import logging

from halve.errors import one_line

_logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows the loggers below its own


def register() -> None:
    """Make the quantisation and the load format known to vLLM; calling it again changes nothing.

    Where that fails, as with a version of vLLM that has its parts elsewhere, a line in the log says so: vLLM calls this
    whatever it serves, and what it raised would keep it from starting.
    """
    try:
        _register()
    except Exception as error:  # noqa: BLE001 - vLLM starts every plugin, and guards against none
        _logger.error("halve: --quantization halve is not available (%s)", one_line(error))  # noqa: TRY400 - one line


def _register() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "halve" in QUANTIZATION_METHODS:
        return
    from vllm.model_executor.model_loader import register_model_loader

    from halve.engines.vllm_config import NAME, HalveConfig
    from halve.engines.vllm_loader import HalveModelLoader

    register_model_loader(NAME)(HalveModelLoader)
    register_quantization_config(NAME)(HalveConfig)  # last: it tells that both are known
