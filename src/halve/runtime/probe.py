"""A model's output on a few tokens: to be compared before and after its layers are swapped."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.device import evaluation_mode, model_device
from halve.errors import HalveError, InputError
from halve.text.generation import text_config

_TOKENS = 16
_FOREIGN = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)
"""What a model's own code raises."""


@dataclass(frozen=True)
class Probe:
    """What a model is called with.

    Attributes:
        model: in memory.
        given: keyword arguments of its call, or its first argument.
    """

    model: nn.Module
    given: Tensor | Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, given: Tensor | Mapping[str, Any] | None) -> "Probe":
        """Return the probe that is given, 16 tokens for None.

        Raises:
            InputError: the model has no vocabulary to take tokens from.
        """
        if given is not None:
            return cls(model, given)
        vocabulary = getattr(text_config(model), "vocab_size", None)
        if vocabulary is None:
            raise InputError(f"{type(model).__name__} says of no vocabulary: give a probe, the arguments of its call")
        # From all over the vocabulary: the first ones are often special tokens, of which a model makes little.
        spread = torch.arange(_TOKENS, device=model_device(model)) * vocabulary // _TOKENS
        return cls(model, spread.unsqueeze(0))

    def dense_output(self) -> Tensor:
        """Return the model's logits, or whatever tensor of numbers it returns first.

        Raises:
            InputError: the model cannot be called with the probe, or returns no finite numbers.
        """
        name = type(self.model).__name__
        try:
            output = self._call()
        except _FOREIGN as error:
            raise InputError(f"{name} cannot be called with the probe ({error}): give another") from error
        found = _first_tensor(output)
        if found is None:
            raise InputError(f"{name} returns no tensor of numbers on the probe: give another")
        if not _usable(found).any():
            raise InputError(f"{name} returns no finite numbers on the probe: give another, or mend the model")
        return found

    def sparse_output(self) -> Tensor:
        """Return the same of the model with swapped layers.

        Raises:
            HalveError: they fail where the dense ones did not.
        """
        try:
            found = _first_tensor(self._call())
        except _FOREIGN as error:
            raise HalveError(
                f"{type(self.model).__name__} fails with sparse layers where it ran with dense ones: {error}"
            ) from error
        if found is None:
            raise HalveError(f"{type(self.model).__name__} returns no tensor of numbers with sparse layers")
        return found

    def _call(self) -> Any:
        # A caller's autocast would lower the dense products, not the sparse ones.
        with evaluation_mode(self.model), torch.autocast(model_device(self.model).type, enabled=False):
            return self.model(**self.given) if isinstance(self.given, Mapping) else self.model(self.given)


@contextmanager
def noting_calls(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Yield a set that fills with the names of the layers that are called."""
    called: set[str] = set()
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _layer, _given, name=name: called.add(name))
            stack.callback(hook.remove)
        yield called


def difference(expected: Tensor, got: Tensor) -> float:
    """Return ``|got - expected| / |expected|`` over the finite numbers; infinity if others are finite.

    Numbers of a dtype's largest magnitude count as infinite: masks have them, and would hide everything else.
    """
    if expected.shape != got.shape or not torch.equal(usable := _usable(expected), _usable(got)):
        return float("inf")
    before, after = expected[usable].double(), got[usable].double()
    return float((after - before).norm() / before.norm().clamp_min(1e-30))


def _usable(output: Tensor) -> Tensor:
    return output.abs() < torch.finfo(output.dtype).max / 4


def _first_tensor(output: Any) -> Tensor | None:
    found = getattr(output, "logits", None)
    if found is None:
        parts = output.values() if isinstance(output, Mapping) else output
        parts = parts if isinstance(parts, Iterable) and not isinstance(output, Tensor) else [output]
        found = next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None
