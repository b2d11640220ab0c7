"""Streaming statistics of a layer's inputs: the Gram matrix, scaled by the number of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import CalibrationError, InputError
from halve.linalg import full_precision

_ROWS_AT_ONCE = 8192
"""Tokens upcast in one go: bounds the float32 copy of a batch."""


@dataclass(frozen=True)
class Statistics:
    """What calibration tells a method about a layer.

    Attributes:
        gram: (d_in, d_in) float32, H = XᵀX / tokens (no factor 2), symmetric.
        tokens: number of input vectors behind it.
    """

    gram: Tensor
    tokens: int


class GramAccumulator:
    """Sums XᵀX over batches of inputs, in float32 whatever the inputs' dtype, autocast or TF32 setting."""

    def __init__(self, d_in: int, *, device: torch.device | str = "cpu", name: str = "layer") -> None:
        """Start from nothing seen.

        Args:
            d_in: number of input features.
            device: where the (d_in, d_in) float32 sum lives; inputs are moved there.
            name: the layer's name, for error messages.
        """
        if d_in < 1:
            raise InputError(f"d_in of {name} must be at least 1, got {d_in}")
        self.d_in = d_in
        self.name = name
        self.tokens = 0
        # An ordinary tensor even when created under inference mode, so that it can be updated outside of it.
        with torch.inference_mode(mode=False):
            self._sum = torch.zeros(d_in, d_in, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add a batch of inputs.

        Args:
            x: (..., d_in), any float dtype; every leading position is one token.

        Raises:
            InputError: the last dimension is not ``d_in``, or ``x`` is not floating point.
            CalibrationError: ``x`` has NaN or infinity; nothing of the offending slice is added.
        """
        if x.ndim < 1 or x.shape[-1] != self.d_in or not x.is_floating_point():
            raise InputError(
                f"inputs of {self.name} must be floating point with last dimension {self.d_in}, "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        with full_precision():
            for rows in torch.split(x.reshape(-1, self.d_in), _ROWS_AT_ONCE):
                rows32 = rows.to(self._sum.device, torch.float32)
                self._check_finite(rows32)
                self._sum.addmm_(rows32.mT, rows32)
                self.tokens += rows32.shape[0]

    def merge(self, other: "GramAccumulator") -> None:
        """Add what another accumulator of the same layer has seen.

        Raises:
            InputError: the two have different ``d_in``.
        """
        if other.d_in != self.d_in:
            raise InputError(
                f"cannot merge statistics of {other.name} (d_in {other.d_in}) into {self.name} ({self.d_in})"
            )
        self._sum.add_(other._sum.to(self._sum.device))  # noqa: SLF001 - another instance of this class
        self.tokens += other.tokens

    def finish(self) -> Statistics:
        """Return the statistics so far; more may be added afterwards.

        Raises:
            CalibrationError: no token was seen, or the squares of the inputs overflowed float32.
        """
        if self.tokens == 0:
            raise CalibrationError(
                f"{self.name} saw no calibration token: its inputs never reached the hook, or no token was routed to it"
            )
        with torch.inference_mode(mode=False):
            # A matrix product is symmetric only up to rounding.
            gram = (self._sum + self._sum.mT).mul_(0.5 / self.tokens)
        if not bool(torch.isfinite(gram).all()):
            raise CalibrationError(
                f"the Gram matrix of {self.name} overflowed float32: its inputs are too large "
                f"(largest finite mean square {_largest_finite(gram.diagonal()):.3g})"
            )
        return Statistics(gram, self.tokens)

    def _check_finite(self, rows: Tensor) -> None:
        # One cheap reduction decides almost always; finite inputs whose sum overflows take the second look.
        if bool(torch.isfinite(rows.sum())):
            return
        bad = ~torch.isfinite(rows).all(-1)
        if bool(bad.any()):
            token = self.tokens + int(bad.to(torch.uint8).argmax())
            raise CalibrationError(
                f"inputs of {self.name} have NaN or infinity, first at calibration token {token}: "
                "check the model in this dtype, or use other text"
            )


def _largest_finite(values: Tensor) -> float:
    """Return the largest finite entry, 0.0 if there is none."""
    return float(torch.where(torch.isfinite(values), values, 0.0).amax())
