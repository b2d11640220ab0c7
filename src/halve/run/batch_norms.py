"""Batch norms of a pruned block: their running means and variances, estimated anew on the calibration data.

A checkpoint has those of the dense model's activations. Pruning moves the means and lowers the variances, so that what
a norm gives is no longer normalised, and the deviations of one layer are carried into the next. New statistics win much
of that back; Frantar and Alistarh did so to networks pruned layer by layer ("Optimal Brain Compression", NeurIPS 2022).
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

ESTIMATE, KEEP = "estimate", "keep"
"""What may become of the statistics."""
STATISTICS = ("running_mean", "running_var")
LEAST = 128
"""A norm that sees fewer values a channel keeps its statistics: those of so few are worse than the dense model's."""
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Reached(Exception):  # noqa: N818 - it ends a pass that has seen enough, and is no error
    """A pass has come to the norm that it was for."""


class _Inputs:
    """Sums up a norm's inputs by channel, in float64, and ends each pass when it has seen all of them.

    Args:
        calls: of the norm in one pass.
    """

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self._left = 0
        self._count = 0
        self._total: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def begin(self) -> None:
        """Begin a pass."""
        self._left = self._calls

    def __call__(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Take what the norm is given: (batch, channels, …)."""
        channels = args[0].detach().double().movedim(1, 0).flatten(1)
        self._total = self._total + channels.sum(1)
        self._squares = self._squares + channels.square().sum(1)
        self._count += channels.shape[1]
        self._left -= 1
        if not self._left:
            raise _Reached

    @property
    def count(self) -> int:
        """Number of values of each channel."""
        return self._count

    def put(self, norm: nn.Module) -> None:
        """Give a norm the mean and the unbiased variance, as training does."""
        mean = torch.as_tensor(self._total / self._count)
        variance = (torch.as_tensor(self._squares / self._count) - mean.square()).clamp_min(0.0)
        variance *= self._count / max(1, self._count - 1)
        for name, found in zip(STATISTICS, (mean, variance), strict=True):
            norm.get_buffer(name).copy_(found)


def batch_norms(block: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norms of a block that normalise by running statistics in evaluation, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, _KINDS) and module.running_mean is not None and module.running_var is not None
    }


def estimate(block: nn.Module, run: Callable[[int], object], count: int) -> dict[str, Tensor]:
    """Give the batch norms of a block the mean and variance of their inputs, one after the other as they run.

    The inputs of each are those behind all earlier ones with their new statistics, so that in the end all statistics
    are those of the pruned block itself, however the data is cut into batches. Each norm takes a pass up to it.

    Args:
        block: pruned, in evaluation mode; its norms are changed in place.
        run: runs the block on a batch of the calibration set.
        count: number of batches.

    Returns:
        dict[str, Tensor]: the new statistics by name within the block, float32 as they are used; none of a norm that
        did not run, or saw fewer than `LEAST` values a channel.
    """
    norms = batch_norms(block)
    order: list[str] = []
    with ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(lambda *_, name=name: order.append(name)))
        run(0)
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(order):
        norm, inputs = norms[name], _Inputs(order.count(name))
        with norm.register_forward_pre_hook(inputs):
            for batch in range(count):
                inputs.begin()
                with suppress(_Reached):
                    run(batch)
        if inputs.count < LEAST:
            continue
        inputs.put(norm)
        found |= {f"{name}.{each}": norm.get_buffer(each) for each in STATISTICS}
    return found
