"""Versions and facts of the machine that can change a result."""

import os
import platform
from typing import Any

import torch

from halve.maths import kernels
from halve.versions import package_version, versions


def environment() -> dict[str, Any]:
    """Return versions and machine facts that can change the result."""
    return {
        **versions(),
        "safetensors": package_version("safetensors"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "prox_kernel": kernels.describe(),
        **({"prox_kernel_cuda": kernels.describe("cuda")} if torch.cuda.is_available() else {}),
    }
