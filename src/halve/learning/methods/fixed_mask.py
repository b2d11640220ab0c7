"""Training with the mask as it is: the kept weights and norms, or norms and biases alone (Zimmer et al. 2023, PERP)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from halve.errors import InputError
from halve.learning.learner import Learner, Step
from halve.model.masked import FixedMasks

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class FixedMaskLearner(Learner):
    """Trains what a pruned model has kept; every pruned zero stays +0.0.

    Args:
        masks: of the pruned parameters.
        train: ``all``, ``everything`` for embeddings and the head besides, or ``norms`` for vectors alone.
    """

    def __init__(self, masks: FixedMasks, train: str = "all") -> None:
        self._masks = masks
        self._train = train
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Return every parameter, all but embeddings and the head, or the vectors among those.

        Raises:
            InputError: there is nothing to train.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        if self._train == "everything":
            head, tables = None, []
        spared = {id(each) for module in (*tables, head) if module is not None for each in module.parameters()}
        found = []
        for parameter in model.parameters():
            wanted = parameter.is_floating_point() and id(parameter) not in spared
            wanted = wanted and (self._train != "norms" or parameter.ndim <= 1)
            parameter.requires_grad_(wanted)
            if wanted:
                found.append(parameter)
        trained = {id(each) for each in found}
        for each in self._masks.parameters:
            held = each.tensor
            if id(held) in trained:
                mask = partial(self._masks.mask_gradient, each.name)  # at once, so that clipping sees what is used
                self._hooks.append(held.register_post_accumulate_grad_hook(mask))  # type: ignore[no-untyped-call]
        if not found:
            raise InputError("the model has no norms and no biases to train: give train = 'all'")
        return found

    def after_update(self, step: Step, optimiser: Optimizer) -> None:
        """Mask the weights: an optimiser that mixes entries moves zeros too."""
        self._masks.hold()

    def state(self) -> Mapping[str, Tensor]:
        """Return the masks: a kept weight that passes through zero is kept on."""
        return self._masks.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks that a training began with."""
        self._masks.load_state_dict(state)

    def finish(self) -> None:
        """Leave the weights as they are: they have the mask."""
        self._masks.hold()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
