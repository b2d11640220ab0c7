"""What a training will take of memory and disk, told before it starts and refused where it cannot fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halve.checkpoint.load import Source, skeleton
from halve.checkpoint.quantised import is_plain
from halve.checkpoint.room import check_space
from halve.checkpoint.shards import read_shard
from halve.errors import InputError
from halve.evaluation.losses import LOGITS_AT_ONCE
from halve.learning.options import Shape
from halve.learning.training.losses import AT_ONCE_ON_GPU
from halve.learning.training.state import TrainingFiles
from halve.memory import free_memory
from halve.model.stacks import find_stacks

_COPIES = 4
"""Tensors of a chunk's logits that stand at once: the student's, the teacher's, their softmaxes and the gradient."""
_MOMENTS = 2
"""Of Adam, for each trained weight."""
_BEST = 3
"""Copies of the best weights: of the newest state, of the best look since, and the one that replaces it."""
_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Needs:
    """Bytes by what they are for.

    Attributes:
        memory: on the device of the training.
        disk: in the output directory, at most at one time.
        held: of the memory, what is taken already.
        device: of the training.
    """

    memory: dict[str, int]
    disk: dict[str, int]
    held: int
    device: torch.device

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return sum(self.memory.values()) <= free_memory(self.device) + self.held

    def check(self, files: TrainingFiles) -> None:
        """Refuse a training that cannot fit.

        Args:
            files: of the training; what a stopped one holds already is not needed again.

        Raises:
            InputError: memory or disk are too small; the sentence says what would help.
        """
        if not self.fits:
            needed, free = sum(self.memory.values()), free_memory(self.device) + self.held
            parts = ", ".join(f"{what} {in_bytes(size)}" for what, size in self.memory.items() if size)
            raise InputError(
                f"the training needs {in_bytes(needed)} of memory on {self.device} ({parts}) and {in_bytes(free)} "
                "are available: give a smaller forward_tokens, gradient_checkpointing, train = 'norms', or "
                "teacher = 'none'"
            )
        held = sum(path.stat().st_size for path in files.home.rglob("*") if path.is_file())
        check_space(files.out, max(0, sum(self.disk.values()) - held), "the states of the training and its checkpoint")


def in_bytes(size: int) -> str:
    """Return a size with a unit: ``3.1 MB``, ``14.20 GB``."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def least_needs(
    student: Source, teacher: Source | None, precision: torch.dtype, device: torch.device, *, whole_blocks: bool
) -> Needs:
    """Add up what a training takes at least, from the headers of files: nothing is loaded.

    Args:
        student: trained in float32.
        teacher: None without one.
        precision: that the teacher is loaded in.
        device: of the training.
        whole_blocks: whether all weights of the blocks are trained.
    """
    memory = {"the student": _numbers(student) * _FLOAT}
    memory["the teacher"] = 0 if teacher is None else _numbers(teacher) * precision.itemsize
    if whole_blocks and student.shards:
        stacks = find_stacks(skeleton(student))
        trained = sum(each.numel() for stack in stacks for block in stack.blocks for each in block.parameters())
        memory |= {"gradients": trained * _FLOAT, "moments": _MOMENTS * trained * _FLOAT}
    return Needs(memory=memory, disk={}, held=0, device=device)


def _numbers(source: Source) -> int:
    """Return how many weights a checkpoint has; of a GGUF file, which is not looked into, none."""
    entries = [entry for path in source.shards for entry in read_shard(path).tensors]
    return sum(math.prod(entry.shape) for entry in entries if is_plain(entry.dtype))


def measured_needs(
    student: nn.Module,
    teacher: nn.Module | None,
    trained: Sequence[nn.Parameter],
    own: int,
    logits: int,
    activations: int,
    shape: Shape,
    output: int,
    device: torch.device,
) -> Needs:
    """Add up what a training takes.

    Args:
        student: in float32.
        teacher: as it lies in memory; None without one.
        trained: the parameters that are trained.
        own: bytes that the way to learn holds besides.
        logits: of one sequence, numbers.
        activations: bytes that one sequence keeps for the backward pass (`activation_bytes`).
        shape: of the training.
        output: bytes of the checkpoint that is written.
        device: of the training.
    """
    count = sum(each.numel() for each in trained)
    chunk = AT_ONCE_ON_GPU if device.type == "cuda" else LOGITS_AT_ONCE
    models = {"the student": _size(student), "the teacher": 0 if teacher is None else _size(teacher)}
    return Needs(
        memory={
            **models,
            "gradients": count * _FLOAT,
            "moments": _MOMENTS * count * _FLOAT,
            "the method": own,
            "activations": activations * shape.rows,
            "logits": _COPIES * min(chunk, logits * shape.rows) * _FLOAT,
        },
        disk={
            "states": 2 * ((1 + _MOMENTS) * count * _FLOAT + own),
            "the best weights": _BEST * (count * _FLOAT + own),
            "the checkpoint": output,
        },
        held=sum(models.values()) if next(student.parameters()).device.type == device.type else 0,
        device=device,
    )


def activation_bytes(run: Callable[[], Tensor]) -> int:
    """Return how many bytes a forward pass keeps for the backward pass, parameters left out.

    Args:
        run: the forward pass; returns the loss.
    """
    kept: dict[int, int] = {}
    parameters: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_leaf and tensor.requires_grad:
            parameters.add(storage.data_ptr())
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    found = sum(size for place, size in kept.items() if place not in parameters)
    del loss  # the graph held the tensors, so that no place was used twice
    return found


def _size(model: nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())
