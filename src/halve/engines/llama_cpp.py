"""How fast llama.cpp decodes a dense model, without the model: a GGUF file of its sizes, few blocks, random weights.

It is run through the package xllamacpp, in a process of its own. The head is the embedding there: its product takes as
long, and the file is smaller.
"""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from halve.checkpoint.room import check_space
from halve.engines.gguf_export import write_file
from halve.engines.gguf_families import FAMILIES, Shape
from halve.engines.gguf_tensors import Planned, placed
from halve.engines.gguf_tokenizer import Vocabulary
from halve.errors import HalveError, InputError, UnsupportedModelError
from halve.planner.dense_engine import NEW, PROMPT, ROUNDS

_SLAB = 64
"""Rows of random weights that a matrix repeats: what is multiplied does not change the time."""
_SECONDS = 600
"""After which a process is taken for stuck."""
_ANSWER = "answer "
_DECODE = f"""
import json, sys
import xllamacpp

path, threads, prompt, new, rounds = sys.argv[1], *map(int, sys.argv[2:])
asked = xllamacpp.CommonParams()
asked.model.path, asked.n_ctx, asked.n_parallel = path, 2 * (prompt + new), 1
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(asked)
given = dict(prompt=list(range(prompt)), max_tokens=new, temperature=0, ignore_eos=True, cache_prompt=False)
rates = [server.handle_completions(given)["timings"]["predicted_per_second"] for _ in range(1 + rounds)]
print("\\n{_ANSWER}" + json.dumps(rates), flush=True)
"""
"""What the process does: libraries may write to its output what they like, before the answer and after it."""


class LlamaCpp:
    """llama.cpp as a contender of ``halve plan``: dense weights in bfloat16, or 8 or 4 bits and a scale for 32.

    Of Q4_0, the head is held in 8 bits, as llama.cpp's own quantiser leaves it at more.
    """

    name = "llama.cpp"
    kinds: tuple[str, ...] = ("bf16", "Q8_0", "Q4_0")

    def check(self, model: str, skeleton: nn.Module) -> None:
        """Check that it is installed, and that models of this shape can be written for it.

        Args:
            model: its name, for messages.
            skeleton: the model, maybe without values.

        Raises:
            InputError: the package xllamacpp or gguf is not installed.
            UnsupportedModelError: the model is of no family that is written, or has what llama.cpp has not.
        """
        for package in ("xllamacpp", "gguf"):
            if find_spec(package) is None:
                raise InputError(
                    f"the package {package}, without which llama.cpp is not measured, is not installed: "
                    f"pip install {package}, or leave --against out"
                )
        kind = getattr(skeleton.config, "model_type", type(skeleton).__name__)
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"llama.cpp is measured with models of {', '.join(FAMILIES)}, and {model} is a {kind}: leave --against "
                "out"
            )
        _tensors(model, skeleton, 1, "bf16")

    def seconds(self, skeleton: nn.Module, kind: str, blocks: int, threads: int) -> float:
        """Return the seconds of a decoded token, a median.

        Args:
            skeleton: of the wanted shape; only its settings, and names and sizes of its parameters are used.
            kind: one of `kinds`.
            blocks: that the timed model has.
            threads: of the CPU.

        Raises:
            InputError: the volume of temporary files is too full.
            HalveError: llama.cpp could not load the file, or not decode with it; or the volume failed.
        """
        with TemporaryDirectory(prefix="halve-llama-cpp-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "model.gguf"
            write_random(path, skeleton, kind.lower(), blocks)
            return _decoded(path, threads)


def write_random(path: Path, skeleton: nn.Module, kind: str, blocks: int) -> None:
    """Write a GGUF file of random weights in a model's sizes, with fewer blocks and a vocabulary without words.

    Args:
        path: the file.
        skeleton: the model, maybe without values.
        kind: what matrices are stored as, one of `halve.engines.gguf_export.KINDS`.
        blocks: that are written.

    Raises:
        InputError: the volume has no room for it.
        UnsupportedModelError: as `LlamaCpp.check`.
        HalveError: the volume failed.
    """
    shape, tensors = _tensors(type(skeleton).__name__, skeleton, blocks, kind)
    check_space(path.parent, sum(each.nbytes for each in tensors) + (1 << 24), "weights to measure llama.cpp with")
    stored = (_random(each) for each in tensors)
    write_file(path, f"{blocks} random blocks", shape, _vocabulary(shape.vocabulary), tensors, stored, kind)


def _tensors(model: str, skeleton: nn.Module, blocks: int, kind: str) -> tuple[Shape, list[Planned]]:
    """Return the sizes of the small model and its tensors."""
    shape = replace(Shape.of(skeleton.config), blocks=blocks, tied=True)
    found = [(name, tensor) for name, tensor in skeleton.state_dict().items() if _block_of(name) < blocks]
    return shape, placed(model, found, shape, kind)


def _block_of(name: str) -> int:
    """Return the block that a parameter belongs to, -1 if it belongs to none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _random(each: Planned) -> Any:
    """Return numbers for one tensor as the file holds them, a NumPy array."""
    from gguf import GGMLQuantizationType, quantize

    if len(each.shape) < 2:
        return torch.ones(each.shape).numpy()
    rows, columns = each.shape
    slab = torch.randn(min(rows, _SLAB), columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    if each.stored == GGMLQuantizationType.BF16:
        numbers = slab.to(torch.bfloat16).view(torch.int16)
    elif each.stored == GGMLQuantizationType.F16:
        numbers = slab.to(torch.float16)
    else:
        numbers = torch.from_numpy(quantize(slab.numpy(), each.stored))
    return numbers.repeat(-(-rows // len(slab)), 1)[:rows].numpy()


def _vocabulary(size: int) -> Vocabulary:
    """Return bytes and one pair of them, which is what llama.cpp asks of a vocabulary, and names for the rest."""
    from gguf import TokenType
    from tokenizers import pre_tokenizers

    known = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"][:size]
    rest = size - len(known)
    return Vocabulary(
        splitting="gpt-2",
        tokens=(*known, *(f"[PAD{number}]" for number in range(rest))),
        types=(*[int(TokenType.NORMAL)] * len(known), *[int(TokenType.UNUSED)] * rest),
        merges=("a b",),
        special={"eos": 0},
        adds_bos=False,
        template=None,
    )


def _decoded(path: Path, threads: int) -> float:
    """Return the seconds of a token that llama.cpp decodes with a file, in a process of its own.

    Raises:
        HalveError: it failed.
    """
    numbers = [str(number) for number in (threads, PROMPT, NEW, ROUNDS)]
    command = [sys.executable, "-c", _DECODE, str(path), *numbers]
    try:
        done = subprocess.run(  # noqa: S603 - our own words
            command, check=False, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise HalveError(f"llama.cpp did not decode {NEW} tokens in {_SECONDS} seconds") from error
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason is given")
        raise HalveError(f"llama.cpp ended with {done.returncode} and no answer: {last[:200]}")
    rates = sorted(json.loads(answers[-1].removeprefix(_ANSWER))[1:])
    return 1.0 / float(rates[len(rates) // 2])
