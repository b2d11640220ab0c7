"""What of a model could run sparse, before anything of it is loaded: kinds of matrices, and what stays dense."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.checkpoint import load
from halve.device import weight_dtype
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.model.layers import CONVOLUTION
from halve.model.plan import Matrix, place_of
from halve.runtime import speed

LLAMA: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Llama 3's shapes, by the name of the preset."""
_LLAMA_COMMON: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
PAPER = "paper"
"""The preset of both models' shapes, at the batches of the paper's table."""
PAPER_BATCHES = (1, 16, 32, 8192, 16384, 32768)
PRESETS = (*LLAMA, PAPER)
ROUTED = "an expert: how many rows its product has depends on the router"


@dataclass(frozen=True)
class Kind:
    """Matrices of one place in the blocks, and of one shape.

    Attributes:
        name: within the block, such as ``self_attn.q_proj``.
        count: in the whole model.
        d_out: rows.
        d_in: columns.
    """

    name: str
    count: int
    d_out: int
    d_in: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.d_out, self.d_in


@dataclass(frozen=True)
class LeftDense:
    """Parameters that cannot run sparse.

    Attributes:
        name: within the block, or in the model if they lie outside of the blocks.
        count: in the whole model.
        shape: of each.
        reason: why, as half a sentence.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Outline:
    """A model as the planner sees it.

    Attributes:
        name: what the user wrote, or the class of a model in memory.
        skeletons: the model, maybe without values; two of them for `PAPER`.
        dtype: of its weights: what ``halve prune`` would write.
    """

    name: str
    skeletons: tuple[nn.Module, ...]
    dtype: torch.dtype

    def kinds(
        self, pattern: Pattern, dtype: torch.dtype, device: torch.device
    ) -> tuple[tuple[Kind, ...], tuple[LeftDense, ...]]:
        """Return what could run sparse at a pattern, in a dtype on a device, and what could not.

        Raises:
            InputError: nothing could.
            UnsupportedModelError: there is no stack of blocks, or weights are not floating point.
        """
        kinds: Counter[tuple[str, int, int]] = Counter()
        dense: Counter[tuple[str, tuple[int, ...], str]] = Counter()
        for skeleton in self.skeletons:
            prefix = "" if len(self.skeletons) == 1 else f"{_preset_of(skeleton)} "
            plan = make_plan(skeleton, pattern)
            for matrix in plan.matrices:
                name = prefix + _kind(matrix.name, plan.blocks)
                if reason := why_dense(matrix, dtype, device):
                    dense[name, (matrix.d_out, matrix.d_in), reason] += 1
                else:
                    kinds[name, matrix.d_out, matrix.d_in] += 1
            for entry in plan.excluded:
                dense[prefix + _kind(entry.name, plan.blocks), entry.shape, entry.reason] += 1
        if not kinds:
            reasons = ", ".join(sorted({reason for _, _, reason in dense}))
            raise InputError(f"nothing of {self.name} could run sparse on {device}: {reasons}")
        return (
            tuple(Kind(name, count, d_out, d_in) for (name, d_out, d_in), count in kinds.items()),
            tuple(LeftDense(name, count, shape, reason) for (name, shape, reason), count in dense.items()),
        )


def why_dense(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> str:
    """Return why a prunable matrix could not run sparse, as half a sentence; empty if it could."""
    if matrix.layout == "conv":
        return CONVOLUTION
    return ROUTED if matrix.routed else speed.unfit(matrix.d_out, matrix.d_in, dtype, device)


def outline(model: nn.Module | str | Path, *, trust_remote_code: bool = False) -> Outline:
    """Look at a model's structure; of one on disk or on the hub, only its settings are read.

    Args:
        model: in memory, a directory, a ``.gguf`` file, a hub id, or one of `PRESETS`.
        trust_remote_code: whether to run Python code that comes with the model.

    Raises:
        InputError: there is nothing of that name.
        UnsupportedModelError, CorruptFileError: as `halve.checkpoint.load.resolve`.
    """
    if isinstance(model, nn.Module):
        return Outline(type(model).__name__, (model,), weight_dtype(model))
    name = str(model)
    if name in PRESETS and not Path(name).exists():
        names = list(LLAMA) if name == PAPER else [name]
        return Outline(name, tuple(_llama(LLAMA[each]) for each in names), torch.bfloat16)
    try:
        source = load.resolve(model, trust_remote_code=trust_remote_code, weights=False)
    except InputError as error:
        if Path(name).exists() or "/" in name:
            raise
        raise InputError(f"{error}; presets are {', '.join(PRESETS)}") from error
    skeleton = load.skeleton(source)
    return Outline(name, (skeleton,), weight_dtype(skeleton))


def _llama(shape: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, **_LLAMA_COMMON, dtype="bfloat16")
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]


def _preset_of(skeleton: Any) -> str:
    return next(name for name, shape in LLAMA.items() if shape["hidden_size"] == skeleton.config.hidden_size)


def _kind(name: str, blocks: Iterable[str]) -> str:
    """Return a parameter's name within its block, experts without their numbers; outside of the blocks its own."""
    block = next((block for block in blocks if name.startswith(f"{block}.")), None)
    return name if block is None else place_of(f"0.{name.removeprefix(block + '.')}")[1]
