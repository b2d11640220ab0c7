"""What the methods that choose masks while they train have in common: their targets, and how a training ends N:M."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from halve.errors import InputError, PatternError, UnsupportedModelError, first_few
from halve.learning.learner import Learner
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import diagonal_scales
from halve.model.masked import PrunedParameter


class Parametrisation(nn.Module):
    """What a model multiplies with instead of a target's weights, while a learner is attached.

    Attributes:
        bypassed: whether the model multiplies with the stored weights themselves.
    """

    bypassed = False

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the model multiplies with, of the shape of ``weight``."""
        return weight if self.bypassed else self.effective(weight)

    def effective(self, weight: Tensor) -> Tensor:
        """Do what `forward` promises, where it is not bypassed."""
        raise NotImplementedError


class MaskLearner(Learner):
    """A learner whose result is a mask for each target, and weights on it.

    Args:
        targets: the parameters to prune, at least one.
        pattern: N:M.

    Raises:
        InputError: there is no target, or two are one parameter.
        PatternError: the pattern is unstructured, or does not fit a target.
    """

    def __init__(self, targets: Iterable[PrunedParameter], pattern: Pattern) -> None:
        given = list(targets)
        self.targets = {target.name: target for target in given}
        self.pattern = pattern
        self._ended_with: dict[str, Tensor] = {}
        if not self.targets:
            raise InputError("there is no matrix whose mask could be learned: give at least one target")
        if not pattern.structured:
            raise PatternError(f"masks are learned for N:M patterns, not for {pattern}: choose 2:4, for example")
        parameters: dict[int, str] = {}
        for target in given:
            other = parameters.setdefault(id(stored(target)), target.name)
            if target is not self.targets[target.name] or other != target.name:
                raise InputError(f"targets {other} and {target.name} are one parameter: give it once")
        for name, target in self.targets.items():
            if not pattern.fits(target.inputs_last(stored(target)).shape[-1]):
                raise PatternError(
                    f"pattern {pattern} does not fit {name} of shape {tuple(stored(target).shape)}: "
                    "leave it out, or choose another pattern"
                )

    def masks(self) -> Mapping[str, Tensor]:
        """Return the masks that `finish` leaves, by target: bool, laid out as the parameter, N true a group."""
        return self._ended_with or self.choose()

    def choose(self) -> dict[str, Tensor]:
        """Return the masks as they would be if the training ended now."""
        raise NotImplementedError

    def facts(self) -> Mapping[str, float]:
        """Return what is worth a line in a log: the method's own strengths and shares, by name."""
        return {}

    def outcome(self, target: PrunedParameter, weight: Tensor) -> Tensor:
        """Return what `finish` puts through the mask, given the stored weights."""
        return weight

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Swap the outcomes of all targets in and out again; this takes their memory a second time."""
        trained = {name: stored(target).data for name, target in self.targets.items()}
        masks = self.choose()
        try:
            for name, target in self.targets.items():
                stored(target).data = self._result(target, masks[name])
                _bypass(target, on=True)
            yield
        finally:
            for name, target in self.targets.items():
                stored(target).data = trained[name]
                _bypass(target, on=False)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the outcomes in the model's own parameters, +0.0 outside the masks, and nothing attached."""
        masks = self.choose()
        for name, target in self.targets.items():
            stored(target).copy_(self._result(target, masks[name]))
            if parametrize.is_parametrized(target.owner, target.leaf):
                parametrize.remove_parametrizations(target.owner, target.leaf, leave_parametrized=False)
        self._ended_with = masks

    @torch.no_grad()
    def _result(self, target: PrunedParameter, mask: Tensor) -> Tensor:
        return apply_mask(self.outcome(target, stored(target)), mask)


def stored(target: PrunedParameter) -> nn.Parameter:
    """Return the parameter that an optimiser would see, whether or not the model multiplies with something else."""
    found = getattr(target.owner, target.leaf)
    if parametrize.is_parametrized(target.owner, target.leaf):
        found = target.owner.parametrizations[target.leaf].original  # type: ignore[union-attr, index]
    assert isinstance(found, nn.Parameter)  # noqa: S101 - it always is
    return found


def parametrise(model: nn.Module, target: PrunedParameter, parametrisation: Parametrisation) -> None:
    """Let the model multiply with what ``parametrisation`` makes of the target's weights.

    Raises:
        UnsupportedModelError: another module holds the same parameter, and would go on multiplying with it as it is.
    """
    places = [
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter is stored(target)
    ]
    if len(places) > 1:
        raise UnsupportedModelError(
            f"{first_few(places)} are one parameter, so a mask would be learned for one of its uses only: leave it out"
        )
    parametrize.register_parametrization(target.owner, target.leaf, parametrisation, unsafe=True)


def train_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
    """Switch gradients on for these parameters and off for all others; return them."""
    model.requires_grad_(requires_grad=False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def weights_and_vectors(model: nn.Module, targets: Iterable[PrunedParameter]) -> list[nn.Parameter]:
    """Return the targets' parameters and the model's norms and biases; embeddings and all other matrices stay."""
    return [*(stored(target) for target in targets), *(each for each in model.parameters() if each.ndim <= 1)]


def mask_of(target: PrunedParameter, scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of the largest scores, both laid out as the parameter."""
    return target.as_stored(pattern.keep_mask(target.inputs_last(scores)))


class InputScales:
    """The root mean square of every target's input features: Wanda's metric is ``|w|`` times it.

    Args:
        targets: by name.
        diagonals: second moments of their inputs, (d_in,) each (`halve.learning.moments`); None is the metric ``|w|``.

    Attributes:
        by_magnitude: names of the targets that no second moments are given for: their metric is ``|w|``.

    Raises:
        InputError: a diagonal has another length than its target's rows, or is not finite and at least 0.
        CalibrationError: a diagonal is zero.
    """

    def __init__(self, targets: Mapping[str, PrunedParameter], diagonals: Mapping[str, Tensor] | None) -> None:
        self._scales: dict[str, Tensor] = {}
        for name, target in targets.items():
            if diagonals is None or name not in diagonals:
                continue
            diagonal, weight = diagonals[name], stored(target)
            d_in = target.inputs_last(weight).shape[-1]
            if diagonal.shape != (d_in,):
                raise InputError(f"the second moments of {name} have shape {tuple(diagonal.shape)}, not ({d_in},)")
            if not bool((diagonal.isfinite() & (diagonal >= 0)).all()):
                raise InputError(f"the second moments of {name} are not all finite and at least 0: collect them again")
            self._scales[name] = diagonal_scales(diagonal).to(weight.device, weight.dtype)
        self.by_magnitude = tuple(name for name in targets if name not in self._scales)

    def of(self, target: PrunedParameter) -> Tensor:
        """Return (d_in,) with groups last as `PrunedParameter.inputs_last` has them, in the dtype of the weights."""
        weight = stored(target)
        found = self._scales.get(target.name)
        found = weight.new_ones(target.inputs_last(weight).shape[-1]) if found is None else found
        return found.to(weight.device)

    def scores(self, target: PrunedParameter, weight: Tensor) -> Tensor:
        """Return ``|w|`` times the scales, laid out as the parameter."""
        return target.as_stored(target.inputs_last(weight.abs()) * self.of(target))


def checked_prior(
    prior: Mapping[str, Tensor], targets: Mapping[str, PrunedParameter], pattern: Pattern
) -> dict[str, Tensor]:
    """Return the weights that a pruned checkpoint has of the targets.

    Args:
        prior: its parameters by name.
        targets: by name.
        pattern: that they must have.

    Raises:
        InputError: it lacks a target, has another shape, or is not of the pattern.
    """
    found = {}
    for name, target in targets.items():
        given, wanted = prior.get(name), stored(target).shape
        if given is None or given.shape != wanted:
            has = "does not have it" if given is None else f"has it with shape {tuple(given.shape)}"
            raise InputError(
                f"the prior is not of this model: {name} has shape {tuple(wanted)}, and the prior {has}: "
                "give a checkpoint that was pruned from it"
            )
        if not pattern.satisfied_by(target.inputs_last(given)):
            raise InputError(f"the prior is not {pattern} in {name}: give a checkpoint that was pruned to {pattern}")
        found[name] = given.detach()
    return found


@torch.no_grad()
def hold(weight: nn.Parameter, mask: Tensor, optimiser: Optimizer) -> None:
    """Zero what is pruned, in a weight and in all that the optimiser remembers of it: moments would move it on.

    Args:
        weight: the parameter that the optimiser steps.
        mask: bool, of its shape.
        optimiser: any that keeps tensors of the weight's shape in its state.
    """
    weight.copy_(apply_mask(weight, mask))
    for moment in optimiser.state.get(weight, {}).values():
        if isinstance(moment, Tensor) and moment.shape == weight.shape and moment.is_floating_point():
            moment.mul_(mask)


def load_masks(saved: Mapping[str, Tensor], targets: Mapping[str, PrunedParameter]) -> dict[str, Tensor]:
    """Return the masks that ``mask.NAME`` has of the targets, on their devices."""
    return {
        name: saved[f"mask.{name}"].to(stored(target).device)
        for name, target in targets.items()
        if f"mask.{name}" in saved
    }


def save_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks as `load_masks` reads them."""
    return {f"mask.{name}": mask.contiguous() for name, mask in masks.items()}


def _bypass(target: PrunedParameter, *, on: bool) -> None:
    if parametrize.is_parametrized(target.owner, target.leaf):
        for each in target.owner.parametrizations[target.leaf]:  # type: ignore[index]
            each.bypassed = on
