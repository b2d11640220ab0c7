"""A parameter with a fixed mask: which entries may differ from zero, and how training is kept from the others."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from halve.model.layers import Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class PrunedParameter:
    """A parameter of a model whose groups are pruned, or are to be.

    Attributes:
        name: its full name in the model.
        owner: the module that holds it.
        leaf: its name there.
        layout: how its matrices lie in it; a parameter of three dimensions holds several, one for each expert.
    """

    name: str
    owner: nn.Module
    leaf: str
    layout: Layout = "out_in"

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now; while it is parametrised, what the model multiplies with."""
        found = getattr(self.owner, self.leaf)
        assert isinstance(found, Tensor)  # noqa: S101 - a parameter always is
        return found

    def inputs_last(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor of the parameter's shape, (…, d_out, d_in), groups along its last dimension.

        It is its own inverse: of a tensor (…, d_out, d_in) it returns one that lies as the parameter does.
        """
        return tensor if self.layout == "out_in" else tensor.mT


def pruned_parameters(model: nn.Module, layouts: dict[str, Layout]) -> Iterator[PrunedParameter]:
    """Find parameters by name.

    Args:
        model: that has them.
        layouts: full name of each, and how its matrices lie in it.
    """
    for name, layout in layouts.items():
        path, _, leaf = name.rpartition(".")
        yield PrunedParameter(name=name, owner=model.get_submodule(path), leaf=leaf, layout=layout)
