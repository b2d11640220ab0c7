"""What a student is trained for: to say what its teacher says, and what the text says, over the whole vocabulary.

``L = (1 - s) * T² * KL(teacher || student) + s * CE`` for every counted token, softmaxes at temperature T in the KL
and at 1 in the cross-entropy (Hinton et al. 2015, arXiv 1503.02531). Logits exist for a chunk of positions at a time,
the student's gradient is formed in the same pass, and sums are float32: two (tokens, vocabulary) tensors never stand
whole.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from halve.checks import check_positive, is_number
from halve.errors import InputError
from halve.evaluation.losses import LOGITS_AT_ONCE

AT_ONCE_ON_GPU = 2**27
"""Elements of the logits of a chunk on a GPU, where many small products would leave it idle: 512 MiB in float32."""


@dataclass(frozen=True)
class Target:
    """What of both is wanted.

    Attributes:
        ce_share: share of the cross-entropy in the loss, 0 to 1; the rest is the KL.
        temperature: of the KL's softmaxes, > 0.

    Raises:
        InputError: a value is out of range.
    """

    ce_share: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.ce_share) or not 0.0 <= self.ce_share <= 1.0:
            raise InputError(f"ce_share must be a share between 0 and 1, got {self.ce_share!r}")
        check_positive("temperature", self.temperature)


@dataclass(frozen=True)
class Scores:
    """Hidden states and the head that makes logits of them, or logits themselves.

    Attributes:
        states: (tokens, width) hidden states, or (tokens, vocabulary) logits where there is no head.
        weight: (vocabulary, width) of the head; None where ``states`` are logits.
        bias: (vocabulary,) of the head.
    """

    states: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits a token."""
        return (self.states if self.weight is None else self.weight).shape[-1 if self.weight is None else 0]

    def logits(self, start: int, stop: int) -> Tensor:
        """Return the logits of some tokens, (stop - start, vocabulary) float32."""
        states = self.states[start:stop]
        if self.weight is None:
            return states.float()
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias).float()


def loss_sums(
    student: Scores, teacher: Scores | None, labels: Tensor, target: Target, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the loss over tokens.

    Args:
        student: what it says of each token; gradients flow into its states, its head's weight and bias.
        teacher: what the teacher says of the same tokens; None leaves the cross-entropy alone, whatever ``target`` is.
        labels: (tokens,) int64, what the text says.
        target: what of both is wanted.
        dtype: that both heads are multiplied in; sums, softmaxes and the head's gradient are float32.

    Returns:
        tuple[Tensor, Tensor]: the loss, a float32 scalar with a gradient; and (2,) float32 sums of the KL at
        temperature 1 and of the cross-entropy, without one. Without a teacher the KL is 0.

    Raises:
        InputError: teacher and student have vocabularies of different sizes.
    """
    if teacher is not None and teacher.vocabulary != student.vocabulary:
        raise InputError(
            f"the teacher has {teacher.vocabulary} logits a token and the student {student.vocabulary}: give a teacher "
            "with the same vocabulary"
        )
    loss, sums = _Loss.apply(  # type: ignore[no-untyped-call]
        student.states,
        student.weight,
        student.bias,
        None if teacher is None else _lowered(teacher, dtype),
        labels,
        target,
        dtype,
    )
    return loss, sums


def _lowered(scores: Scores, dtype: torch.dtype) -> Scores:
    weight = None if scores.weight is None else scores.weight.detach().to(dtype)
    return Scores(scores.states.detach(), weight, None if scores.bias is None else scores.bias.detach().to(dtype))


class _Loss(torch.autograd.Function):
    """The loss, with its gradient formed in the forward pass while the logits of a chunk are there."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: Scores | None,
        labels: Tensor,
        target: Target,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        student = _lowered(Scores(states, weight, bias), dtype)
        wanted = ctx.needs_input_grad
        of_states = torch.empty_like(states) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if weight is not None and wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        sums = torch.zeros(2, dtype=torch.float32, device=states.device)
        most = AT_ONCE_ON_GPU if states.device.type == "cuda" else LOGITS_AT_ONCE
        step = max(1, most // student.vocabulary)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), step):
                stop = min(start + step, len(states))
                judge = None if teacher is None else teacher.logits(start, stop)
                loss, found, slope = _chunk(student.logits(start, stop), judge, labels[start:stop], target)
                total += loss
                sums += found
                if of_weight is not None:
                    of_weight += (slope.to(dtype).T @ states[start:stop].to(dtype)).float()
                if of_bias is not None:
                    of_bias += slope.sum(0)
                if of_states is not None:
                    known = slope if student.weight is None else slope.to(dtype) @ student.weight
                    of_states[start:stop] = known
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if each is None else each * slopes[0].to(each.dtype) for each in ctx.saved_tensors]
        return *found, None, None, None, None


def _chunk(logits: Tensor, judge: Tensor | None, labels: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a chunk, the sums of KL and cross-entropy, and the slope of the loss in its logits.

    Args:
        logits: (tokens, vocabulary) float32, of the student.
        judge: the teacher's.
        labels: (tokens,).
        target: what is wanted.
    """
    rows = torch.arange(len(labels), device=labels.device)
    said = logits.log_softmax(-1)
    ce = -said[rows, labels].sum()
    share = 1.0 if judge is None else target.ce_share
    slope = torch.zeros_like(said)
    loss = share * ce
    if share:
        slope += share * said.exp()
        slope[rows, labels] -= share
    if judge is None:
        return loss, torch.stack((torch.zeros_like(ce), ce)), slope
    heat = target.temperature
    wanted = judge.log_softmax(-1)
    kl = (wanted.exp() * (wanted - said)).sum()
    if heat == 1.0:
        warm, told, asked = kl, said, wanted
    else:
        told, asked = (logits / heat).log_softmax(-1), (judge / heat).log_softmax(-1)
        warm = (asked.exp() * (asked - told)).sum()
    loss = loss + (1.0 - share) * heat**2 * warm
    slope += (1.0 - share) * heat * (told.exp() - asked.exp())
    return loss, torch.stack((kl, ce)), slope
