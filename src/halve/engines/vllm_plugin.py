"""The entry point by which vLLM finds Halve: it makes ``--quantization halve`` and ``--load-format halve`` known.

Registering is passive: a model that is served without them is served as without Halve.
"""


def register() -> None:
    """Make the quantisation and the load format known to vLLM; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "halve" in QUANTIZATION_METHODS:
        return
    from vllm.model_executor.model_loader import register_model_loader

    from halve.engines.vllm_config import NAME, HalveConfig
    from halve.engines.vllm_loader import HalveModelLoader

    register_quantization_config(NAME)(HalveConfig)
    register_model_loader(NAME)(HalveModelLoader)
