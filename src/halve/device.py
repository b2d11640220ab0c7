"""Where a model runs, in which precision, and the mode for running one without training it."""

import platform
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.errors import InputError
from halve.torch_internals import processor_has

_WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on.

    Args:
        device: ``"auto"`` is the first CUDA GPU if there is one, else the CPU; otherwise ``"cpu"``, ``"cuda"`` or
            ``"cuda:N"``.

    Raises:
        InputError: the name is not one of these, or the device is not present.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device), re.ASCII):
        raise InputError(f"device {str(device)!r} is not understood: write auto, cpu, cuda or cuda:0")
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {str(device)!r} is not present: torch sees {torch.cuda.device_count()} CUDA GPUs; "
            "choose another, or auto"
        )
    return resolved


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of weights that a name stands for.

    Raises:
        InputError: no checkpoint is written in a dtype of that name.
    """
    if name not in _WEIGHT_DTYPES:
        raise InputError(f"dtype {name!r} is not known: choose one of {', '.join(_WEIGHT_DTYPES)}")
    return _WEIGHT_DTYPES[name]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one for a while: events, synchronisation and some kernels go by that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest dtype for matrix products that keeps float32's exponent range on ``device``.

    bfloat16 where the hardware multiplies it natively and faster (CUDA from Ampere on, x86 with AMX, AMD's with
    AVX512-BF16), else float32. Intel's processors have AVX512-BF16 as well, but half as many units for it as for
    float32: without AMX, which virtual machines often hide, its products take twice the time of float32's (measured in
    ``docs/LOG.md``). The choice goes by what the processor is, not by a measurement, so that a run that goes on
    computes as it began. float16 is never chosen: its range overflows in the residual streams of trained language
    models.
    """
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        faster = processor_has("amx_bf16") or (processor_has("avx512_bf16") and processor_maker() == "AuthenticAMD")
    else:
        faster = False
    return torch.bfloat16 if faster else torch.float32


@cache
def processor_maker() -> str:
    """Return the maker of this x86 processor as it calls itself, such as GenuineIntel; empty where it is not told."""
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()  # Windows: "… GenuineIntel"
    found = re.search(r"\b(GenuineIntel|AuthenticAMD)\b", told)
    return found[0] if found else ""


def forward_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that float32 matrices are multiplied in: ``auto`` (see `compute_dtype`), float32 or bfloat16.

    Raises:
        InputError: another name.
    """
    if name not in _PRECISIONS:
        raise InputError(f"forward dtype {name!r} is not understood: choose {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name] or compute_dtype(device)


@contextmanager
def autocast(model: nn.Module, dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Multiply a model's float32 matrices in ``dtype``, and yield the dtype its matrices are multiplied in.

    Weights of another dtype are used as they are. Each lowered matrix is converted once and kept until the end, half
    the memory of the weights again.
    """
    own = weight_dtype(model)
    if own != torch.float32 or dtype == torch.float32:
        yield own
        return
    # Autocast keeps its copy only of parameters that require gradients, and converts others anew at every use.
    frozen = [parameter for parameter in model.parameters() if parameter.is_leaf and not parameter.requires_grad]
    changed = [parameter.requires_grad_() for parameter in frozen if parameter.is_floating_point()]
    try:
        with torch.autocast(model_device(model).type, dtype):
            yield dtype
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


def model_device(model: nn.Module) -> torch.device:
    """Return where a model's first parameter lies, the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating dtype that most of a model's parameters have; float32 if it has none."""
    counts = Counter[torch.dtype]()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


_OWN_SETTINGS = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}


@contextmanager
def own_settings(model: nn.Module) -> Iterator[None]:
    """Let a model's forward return what Halve reads, whatever its configs ask for; they are restored afterwards.

    No cache of keys and values is kept, no attention weights and no hidden states are collected, and the output has
    names.
    """
    configs = {id(found): found for module in model.modules() if (found := getattr(module, "config", None)) is not None}
    before: list[tuple[Any, str, Any]] = []
    for config in configs.values():
        for name, wanted in _OWN_SETTINGS.items():
            if getattr(config, name, wanted) != wanted:
                fields = dict(vars(config))
                setattr(config, name, wanted)
                before += [(config, key, value) for key, value in fields.items() if vars(config).get(key) is not value]
    try:
        yield
    finally:
        for config, key, value in before:
            vars(config)[key] = value  # not by its setter, which may refuse what the config was read with


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and without gradients, and with `own_settings`; all is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), own_settings(model):
            yield
    finally:
        for module in training:
            module.training = True
