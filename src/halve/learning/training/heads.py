"""The last layer of a language model, so that its logits need never stand whole.

In training, the head is where the loss is computed: while it is `receiving`, the model's forward returns the loss
instead of logits. So the head's weights are used where they belong, inside the forward, and whatever wraps
the model (DistributedDataParallel, FSDP2) has them there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from halve.device import evaluation_mode, model_device
from halve.errors import InputError
from halve.learning.training.losses import Scores
from halve.text.rows import IGNORED

Batch = dict[str, Tensor]
"""Ids, positions and labels, (rows, seq_len) each, by the names in `Speaker.say`."""
_PROBE = 8
"""Tokens of a made-up text."""
_SAME = 1e-3
"""Relative difference of logits up to which they are called the same."""
Receive = Callable[[Tensor, nn.Linear], Tensor]
"""What is done with hidden states (batch, tokens, width) and the head, instead of multiplying them."""


def plain_head(model: Any, probe: Tensor) -> nn.Linear | None:
    """Return the linear layer whose output is exactly the model's logits; None where the logits are made otherwise.

    Args:
        model: a causal language model.
        probe: (1, tokens) ids to run it on.

    Raises:
        InputError: the model predicts no tokens.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    seen: list[Tensor] = []
    hooks = []
    if type(head) is nn.Linear:
        hooks.append(head.register_forward_hook(lambda _module, _args, output: seen.append(output)))
    try:
        with torch.no_grad():
            output = model(input_ids=probe, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != probe.shape:
        raise InputError(
            f"{type(model).__name__} says nothing of every token of a text, so it cannot be trained on one: give a "
            "causal language model"
        )
    same = len(seen) == 1 and torch.equal(seen[0].to(logits.dtype), logits)
    return head if type(head) is nn.Linear and same else None


def check_causal(model: Any) -> None:
    """Refuse a model that does not say the next token from those before it alone.

    Args:
        model: in memory, on its device.

    Raises:
        InputError: it reads ahead, or reads one text and says another.
    """
    name, advice = type(model).__name__, "give a causal language model"
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder, and a training is on plain text: {advice}")
    ids = torch.arange(_PROBE, device=model_device(model))[None]
    other = ids.clone()
    other[0, -1] = 0
    with evaluation_mode(model):
        plain_head(model, ids)
        before, after = (model(input_ids=each, use_cache=False).logits[:, :-1].double() for each in (ids, other))
    if not bool((before - after).norm() <= _SAME * before.norm()):
        raise InputError(f"{name} reads a text in both directions, so it does not say what comes next: {advice}")


@contextmanager
def receiving(head: nn.Linear, receive: Receive) -> Iterator[None]:
    """Let something else be done with the hidden states than to multiply them by the head, for a while."""
    head.forward = lambda states: receive(states, head)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del head.forward


class Speaker:
    """A language model as what it says of the tokens of a batch, logits never standing whole where that can be.

    Args:
        model: in memory, on its device.
        apart: whether it is given no positions, since its rows hold one document each.
    """

    def __init__(self, model: nn.Module, probe: Tensor, *, apart: bool) -> None:
        self.model = model
        self._apart = apart
        self._head = plain_head(model, probe)

    @property
    def note(self) -> str:
        """A sentence where the logits of a whole batch stand in memory; empty where they do not."""
        if self._head is not None:
            return ""
        return f"{type(self.model).__name__} makes its logits otherwise than by a plain linear head: they stand whole"

    def say(self, called: nn.Module, batch: Batch, use: Callable[[Scores], Tensor]) -> Tensor:
        """Run the model, and return what ``use`` makes of what it says of the tokens that are to be learned.

        Args:
            called: the model, or what wraps it.
            batch: ``input_ids``, ``position_ids`` and ``labels``, (rows, seq_len) each.
            use: returns a scalar; it is called inside the forward pass where there is a plain head.
        """
        wanted = batch["labels"][:, 1:] != IGNORED
        fed = {"input_ids": batch["input_ids"]}
        if not self._apart:
            fed["position_ids"] = batch["position_ids"]
        head = self._head
        if head is None:
            logits = called(**fed, use_cache=False).logits
            return use(Scores(logits[:, :-1][wanted]))

        def receive(states: Tensor, here: nn.Linear) -> Tensor:
            return use(Scores(states[:, :-1][wanted], here.weight, here.bias)).reshape(1, 1, 1)

        with receiving(head, receive):
            return cast("Tensor", called(**fed, use_cache=False).logits).reshape(())

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """Return what the model says of the tokens that are to be learned, without a gradient."""
        found: list[Scores] = []

        def keep(scores: Scores) -> Tensor:
            found.append(scores)
            return torch.zeros((), device=scores.states.device)

        self.say(self.model, batch, keep)
        return found[0]
