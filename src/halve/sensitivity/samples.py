"""What damage is measured on: a few short sequences of the calibration set; and a model in float32 to measure with."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import InputError
from halve.memory import check_memory
from halve.model.blocks import Batch
from halve.text.calibration import CalibrationData, calibration_batches
from halve.text.tokens import TokenSet

_LENGTH = 128
"""Tokens of a sequence that is cut for this: more sequences say more than longer ones."""


@dataclass(frozen=True)
class Samples:
    """Parts of a calibration set.

    Attributes:
        judging: batches that damage is measured on.
        held_out: as many others; none but of plain text.
    """

    judging: Sequence[Batch]
    held_out: Sequence[Batch] = ()

    @classmethod
    def of(cls, data: CalibrationData, model: nn.Module, tokens: int, most: int) -> "Samples":
        """Take what is needed.

        Of plain text, rows at even distances are cut to 128 tokens, or as many more as they must have; of pairs and
        ready batches the first rows are taken, as they are.

        Args:
            data: the calibration set, not empty.
            model: that it is for.
            tokens: to measure on, about.
            most: tokens that a batch holds at most.
        """
        if isinstance(data, TokenSet) and data.cut is None:
            rows = max(1, min(data.samples // 2, -(-tokens // _LENGTH)))
            length = min(data.seq_len, max(-(-tokens // rows), data.lead + 2))
            step = max(1, data.samples // (2 * rows))
            ids = data.ids[::step, :length]
            return cls(_batches(ids[0::2][:rows], most), _batches(ids[1::2][:rows], most))
        taken, count = [], 0
        for batch in calibration_batches(data, model, most):
            if count < tokens:
                taken.append(_first_rows(batch, tokens - count))
                count += positions_of(taken[-1])
        return cls(taken)

    def check_held_out(self, model: nn.Module) -> None:
        """Refuse to measure perplexity where there is nothing to measure it on.

        Raises:
            InputError: the calibration set is no text of two sequences or more, or the model is no causal one.
        """
        generates: Any = getattr(model, "can_generate", None)
        causal = generates is not None and generates()
        if not self.held_out or not causal or self.held_out[0]["input_ids"].shape[1] < 2:
            raise InputError(
                "keep_dense by perplexity needs a causal language model and two sequences of calibration text or more, "
                f"and there are none for this {type(model).__name__}: give a share, such as 10%"
            )


def positions_of(batch: Batch) -> int:
    """Return how many positions a batch has: tokens where it has some, else rows."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    return len(next(iter(batch.values()))) if ids is None else ids.numel()


def _first_rows(batch: Batch, positions: int) -> Batch:
    """Return as many rows of a batch as have so many positions, one at least; all where its tensors have others."""
    lengths = {len(value) if value.ndim else 0 for value in batch.values()}
    if len(lengths) > 1 or positions_of(batch) <= positions:
        return batch
    rows = -(-positions * lengths.pop() // positions_of(batch))
    return {key: value[:rows] for key, value in batch.items()}


def _batches(ids: Tensor, most: int) -> list[Mapping[str, Tensor]]:
    return [{"input_ids": rows} for rows in torch.split(ids, max(1, most // ids.shape[1]))] if len(ids) else []


@contextmanager
def working(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Yield a model in float32 on a device: itself if it is that already, else a copy.

    Raises:
        InputError: there is no room for the copy.
    """
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if device.type == "cpu" and all(parameter.dtype == torch.float32 for parameter in floats):
        yield model
        return
    remedy = "name what is to stay dense with skip instead of keep_dense"
    check_memory("the weights of a float32 copy", 4 * sum(each.numel() for each in floats), remedy, device)
    yield copy.deepcopy(model).to(device=device, dtype=torch.float32)
