"""Second moments of the inputs of the targets, the diagonal of their Gram matrices: what Wanda's metric needs."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from halve.device import evaluation_mode, model_device
from halve.errors import CalibrationError, InputError
from halve.model.layers import EXPERTS_IN_ONE, is_linear
from halve.model.masked import PrunedParameter

NO_INPUT = "no token of the batches reached it"
NOT_LINEAR = "it is not the weight of a linear layer, so its inputs are not seen"


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What was collected.

    Attributes:
        diagonals: mean of x² over tokens, (d_in,) float32 on the CPU, by the name of the target.
        without: targets that have none, whose metric is therefore ``|w|``, and why.
        tokens: how many each diagonal is the mean over, by the name of the target.
    """

    diagonals: Mapping[str, Tensor]
    without: Mapping[str, str]
    tokens: Mapping[str, int]


def input_moments(
    model: nn.Module, targets: Iterable[PrunedParameter], batches: Iterable[Mapping[str, Tensor]]
) -> Moments:
    """Run a model on a few batches and average the squares of what enters its linear layers.

    Args:
        model: in any mode; it runs without dropout, and nothing about it is changed.
        targets: whose inputs are wanted.
        batches: each is given to the model as keywords. Positions where an ``attention_mask`` (samples, positions) is 0
            do not count in layers whose inputs have those dimensions, flattened or not.

    Raises:
        InputError: there is no batch.
        CalibrationError: an input is not finite.
    """
    device = model_device(model)
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    without: dict[str, str] = {}
    counts: Tensor | None = None  # of the batch that is running: which positions do

    def watch(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = x.detach().reshape(-1, x.shape[-1])
        if counts is not None and (x.shape[:-1] == counts.shape or x.shape[:-1] == (counts.numel(),)):
            rows = rows[counts.flatten().to(rows.device)]
        squares = rows.double().square().sum(0)
        sums[name] = squares + sums[name] if name in sums else squares
        tokens[name] = tokens.get(name, 0) + len(rows)

    with ExitStack() as stack:
        for target in targets:
            if not (is_linear(target.owner) and target.leaf == "weight"):
                without[target.name] = EXPERTS_IN_ONE if target.tensor.ndim == 3 else NOT_LINEAR
                continue
            without[target.name] = NO_INPUT
            stack.enter_context(
                target.owner.register_forward_pre_hook(
                    lambda _module, args, kwargs, name=target.name: watch(name, args, kwargs), with_kwargs=True
                )
            )
        stack.enter_context(evaluation_mode(model))
        batch = None
        for batch in batches:
            mask = batch.get("attention_mask")
            counts = None if mask is None or mask.ndim != 2 else mask.bool()
            model(**{key: value.to(device) for key, value in batch.items()})
        if batch is None:
            raise InputError("second moments of inputs were asked for without any text: give at least one batch")
    diagonals = {}
    for name, count in tokens.items():
        if not bool(sums[name].isfinite().all()):
            raise CalibrationError(f"the inputs of {name} are not finite on the given text: train from another model")
        if count and bool(sums[name].any()):
            diagonals[name] = (sums[name] / count).float().cpu()
            del without[name]
    return Moments(diagonals=diagonals, without=without, tokens={name: tokens[name] for name in diagonals})
