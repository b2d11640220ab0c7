"""Sparsity patterns: the one place that knows what N and M mean.

``N:M`` always means *keep at most N of every M consecutive weights* along the input dimension, which is the
last one of every tensor here. ``S%`` is unstructured sparsity: S percent of each row are zeros.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halve.errors import PatternError

MAX_GROUP = 32
_N_OF_M = re.compile(r"(\d{1,3}):(\d{1,3})")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%")


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern, parsed once: ``Pattern("2:4")``, ``Pattern("50%")``.

    Raises:
        PatternError: the text is neither ``N:M`` with 1 <= N < M <= 32 nor a percentage strictly between 0 and 100.
    """

    text: str
    keep: int | None = field(init=False, compare=False)
    """N of ``N:M``; None when unstructured."""
    group: int | None = field(init=False, compare=False)
    """M of ``N:M``; None when unstructured."""
    sparsity: float = field(init=False, compare=False)
    """Share of zeros, 0 < sparsity < 1."""

    def __post_init__(self) -> None:
        text = self.text.strip() if isinstance(self.text, str) else ""
        if found := _N_OF_M.fullmatch(text):
            keep, group = int(found[1]), int(found[2])
            if 1 <= keep < group <= MAX_GROUP:
                self._set(f"{keep}:{group}", keep, group, 1.0 - keep / group)
                return
        elif found := _PERCENT.fullmatch(text):
            percent = float(found[1])
            if 0.0 < percent < 100.0:
                self._set(f"{percent:g}%", None, None, percent / 100.0)
                return
        raise PatternError(
            f"pattern {self.text!r} is not understood: write N:M (keep N of every M, 1 <= N < M <= {MAX_GROUP}, "
            "for example 2:4) or a percentage of zeros between 0 and 100 (for example 50%)"
        )

    def _set(self, text: str, keep: int | None, group: int | None, sparsity: float) -> None:
        for name, value in (("text", text), ("keep", keep), ("group", group), ("sparsity", sparsity)):
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, pattern: "str | Pattern") -> "Pattern":
        """Return ``pattern`` itself if it is one already, else parse the text."""
        return pattern if isinstance(pattern, Pattern) else cls(pattern)

    def __str__(self) -> str:
        return self.text

    @property
    def structured(self) -> bool:
        """Whether this is an ``N:M`` pattern."""
        return self.group is not None

    def budget(self, d_in: int) -> tuple[int, int]:
        """Return ``(keep, group)`` for rows of ``d_in`` weights; an unstructured pattern's group is the whole row.

        Raises:
            PatternError: ``d_in`` is not a positive multiple of M.
        """
        if self.keep is None or self.group is None:
            if d_in < 1:
                raise PatternError(f"pattern {self} needs rows of at least one weight, got d_in = {d_in}")
            return d_in - int(d_in * self.sparsity), d_in
        if d_in < 1 or d_in % self.group:
            raise PatternError(f"pattern {self} needs d_in divisible by {self.group}, got d_in = {d_in}")
        return self.keep, self.group

    def fits(self, d_in: int) -> bool:
        """Whether rows of ``d_in`` weights can take this pattern."""
        return d_in >= 1 and (self.group is None or d_in % self.group == 0)

    def groups(self, weight: Tensor) -> Tensor:
        """View ``weight`` of shape (..., d_in) as (..., d_in / group, group).

        Raises:
            PatternError: the last dimension does not fit.
        """
        d_in = weight.shape[-1]
        _, group = self.budget(d_in)
        return weight.reshape(*weight.shape[:-1], d_in // group, group)

    def keep_mask(self, scores: Tensor) -> Tensor:
        """Mark the entries to keep: the largest scores of each group, ties to the lowest index.

        Args:
            scores: (..., d_in), any real dtype, no NaN.

        Returns:
            Tensor: bool, the shape of ``scores``, exactly N true entries a group.

        Raises:
            PatternError: the last dimension does not fit.
        """
        keep, _ = self.budget(scores.shape[-1])
        groups = self.groups(scores)
        if self.structured:
            return (_ranks(groups) < keep).reshape(scores.shape)
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(-1, order[..., :keep], value=True)
        return mask.reshape(scores.shape)

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest tensor that has this pattern: the largest magnitudes of each group, the rest +0.0."""
        return apply_mask(weight, self.keep_mask(weight.abs()))

    def violating_groups(self, weight: Tensor) -> Tensor:
        """Mark the groups with more non-zeros than allowed; a group with fewer is fine.

        Args:
            weight: (..., d_in).

        Returns:
            Tensor: bool, (..., d_in / group).

        Raises:
            PatternError: the last dimension does not fit.
        """
        keep, _ = self.budget(weight.shape[-1])
        counts = torch.uint8 if self.structured else torch.int64  # a group of N:M has 32 weights at most
        return self.groups(weight != 0).view(torch.uint8).sum(-1, dtype=counts) > keep

    def kept_per_group(self, weight: Tensor) -> Tensor | None:
        """Count the groups of ``weight`` (..., d_in) that have 0, 1, … M non-zeros.

        Returns:
            Tensor: int64, (M + 1,), on the device of ``weight``; None for an unstructured pattern.

        Raises:
            PatternError: the last dimension does not fit.
        """
        if self.group is None:
            return None
        return torch.bincount(self.groups(weight != 0).sum(-1).flatten(), minlength=self.group + 1)

    def satisfied_by(self, weight: Tensor) -> bool:
        """Whether no group of ``weight`` (..., d_in) has more non-zeros than allowed."""
        return not bool(self.violating_groups(weight).any())


class Tournament:
    """``keep_mask`` for one group of many rows at a time, in five operations whatever M: for calling often.

    Every pair of a group is compared once; a linear map of the outcomes counts the entries that beat each.

    Args:
        keep: N.
        group: M.
        device: of the scores.
    """

    def __init__(self, keep: int, group: int, device: torch.device) -> None:
        first, second = torch.triu_indices(group, group, 1, device=device)
        pairs = torch.arange(len(first), device=device)
        self._keep = keep
        self._entries = torch.cat((first, second))
        self._counts = torch.zeros(group, len(first), device=device)
        self._counts[second, pairs] = 1.0
        self._counts[first, pairs] = -1.0
        self._base = torch.arange(group - 1, -1, -1.0, device=device).unsqueeze(-1)

    def losers(self, scores: Tensor) -> Tensor:
        """Return 1.0 for the entries to prune and 0.0 for the N largest of each column, ties to the lowest index.

        Args:
            scores: (M, rows) float32, no NaN.
        """
        first, second = scores.index_select(0, self._entries).chunk(2)
        ranks = torch.addmm(self._base, self._counts, torch.ge(first, second, out=torch.empty_like(first)))
        return torch.ge(ranks, self._keep, out=ranks)


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``weight`` with +0.0 wherever ``mask`` is false, and no -0.0 anywhere."""
    return torch.where(mask, weight, 0.0).add_(0.0)


def _ranks(groups: Tensor) -> Tensor:
    """Rank of every entry in its group (last dimension), 0 for the largest, ties to the lowest index.

    Pairwise comparisons instead of a sort: the result is the same on every device, which ``topk`` does not promise.
    """
    columns = [column.contiguous() for column in groups.unbind(-1)]
    ranks = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            first_wins = columns[i] >= columns[j]
            ranks[j] += first_wins
            ranks[i] += ~first_wins
    return torch.stack(ranks, dim=-1)
