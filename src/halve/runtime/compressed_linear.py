"""What linear layers with a compressed weight have in common: to whatever saves or loads them they are plain ones."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from halve.errors import InputError
from halve.model.layers import Layout, matrix_view, plain_layer

_noted: "set[nn.Module] | None" = None


@contextmanager
def noting_reads() -> Iterator["set[nn.Module]"]:
    """Yield a set that fills with the compressed layers whose ``weight`` is read."""
    global _noted  # noqa: PLW0603 - on the layers themselves, compiled code would depend on it
    before, _noted = _noted, set()
    try:
        yield _noted
    finally:
        _noted = before


class CompressedLinear(nn.Module):
    """A linear layer for inference that holds its weight in another form.

    Its ``state_dict`` is that of the plain layer, the weight expanded to the same bits: whatever saves a model that has
    such layers writes an ordinary checkpoint. Loading one compresses its weight, and refuses a weight that is denser.

    Args:
        shape: (d_out, d_in) of the weight.
        bias: (d_out,).
        layout: how the weight lies in the ``state_dict``, and in the plain layer: ``Conv1D`` has it transposed.
    """

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, layout: Layout) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.layout: Layout = layout

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the compressed weight."""

    @abstractmethod
    def _dense(self) -> Tensor:
        """Return the weight expanded anew, (d_out, d_in)."""

    @abstractmethod
    def _take(self, matrix: Tensor) -> None:
        """Compress another weight, (d_out, d_in) of any dtype and on any device, in place of this one.

        Raises:
            InputError: it is not in the pattern.
        """

    def plain(self) -> nn.Module:
        """Return the plain layer, with a weight of the same bits; the bias is shared."""
        return plain_layer(self._dense(), self.bias, self.layout)

    @property
    def weight(self) -> Tensor:
        """The plain layer's weight, expanded anew: for code that looks at it, not for products."""
        if _noted is not None:
            _noted.add(self)
        return matrix_view(self._dense(), None, self.layout).contiguous()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in state_dict:
            missing_keys.append(key)
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        weight, shape = matrix_view(state_dict[key], None, self.layout), (self.out_features, self.in_features)
        if weight.shape != shape:
            error_msgs.append(f"{key} is a matrix of shape {tuple(weight.shape)}, not {shape}")
            return
        try:
            self._take(weight)
        except InputError as error:
            error_msgs.append(f"{key} cannot be packed: {error}")
