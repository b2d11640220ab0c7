"""How a model is run to be measured: one forward pass after the other, or, larger than memory, all of them in step.

In step, every pass goes through a block before any enters the next, so that the weights of a block are read from disk
once for all of them. Each pass is a coroutine of its own that runs the model's own forward, and stops where a block is
about to be called: nothing has to be known of the model's family, and what comes out is what would come out anyway.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from halve.checkpoint.mapped import Weights
from halve.device import autocast, evaluation_mode, forward_precision, model_device
from halve.memory import available_memory
from halve.model.calls import leaves
from halve.model.stacks import find_stacks

_SHARE = 0.25
"""Of the memory that is available, for what passes hold while they wait."""
_PLACES = ("cpu", "cuda")
T = TypeVar("T")


class Measuring:
    """What is asked for by a measurement that runs a model.

    Attributes:
        forward_dtype: products of forward passes: ``auto``, ``float32`` or ``bfloat16``.
    """

    forward_dtype: str

    def precision(self, device: torch.device) -> torch.dtype:
        """Return what float32 matrices are multiplied in there.

        Raises:
            InputError: the dtype is unknown.
        """
        return forward_precision(self.forward_dtype, device)


class Passes:
    """Forward passes of a model that is ready to be measured, one after the other.

    Args:
        dtype: what the model's matrices are multiplied in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Call every job, each of which runs the model once, and return what they return."""
        return [job() for job in jobs]


@contextmanager
def ready(
    model: nn.Module, device: torch.device, forward_dtype: str, weights: Weights | None = None
) -> Iterator[Passes]:
    """Make a model ready to be measured, and as it was again afterwards.

    Args:
        model: any model.
        device: where to run; weights that stay on disk are brought there block by block.
        forward_dtype: see `halve.evaluation.perplexity.perplexity`.
        weights: where the model's weights lie; None is memory.

    Raises:
        InputError: there is no such dtype.
    """
    products, widen = forward_precision(forward_dtype, device), forward_dtype == "float32"
    with ExitStack() as modes:
        if weights is None or not weights.mapped:
            modes.enter_context(_placed(model, device))
            modes.enter_context(evaluation_mode(model))
            modes.enter_context(_lent(_tensors(model), None, widen=widen))
            yield Passes(modes.enter_context(autocast(model, products)))
            return
        blocks = {name: block for stack in find_stacks(model) for name, block in stack.members.items()}
        inside = {id(tensor) for block in blocks.values() for tensor in _tensors(block)}
        outside = [tensor for tensor in _tensors(model) if id(tensor) not in inside]
        modes.enter_context(evaluation_mode(model))
        modes.enter_context(_lent(outside, device, widen=widen))
        used = modes.enter_context(autocast(model, products))
        if widen:  # the blocks are float32 when it is their turn
            used = torch.promote_types(used, torch.float32)
        yield _InStep(used, blocks, weights, device, widen=widen)


class _InStep(Passes):
    """Forward passes that go through the blocks in step.

    Args:
        dtype: see `Passes`.
        blocks: of the model, by name, in the order in which they mostly run.
        weights: where their weights lie.
        device: where they run.
        widen: whether narrower weights are multiplied as float32.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        blocks: Mapping[str, nn.Module],
        weights: Weights,
        device: torch.device,
        *,
        widen: bool,
    ) -> None:
        super().__init__(dtype)
        self._names = {block: name for name, block in blocks.items()}
        order = list(blocks.values())
        self._next = dict(pairwise(order))
        self._weights = weights
        self._device = device
        self._widen = widen
        self._used: nn.Module | None = None
        self._lending = ExitStack()

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """See `Passes`; as many jobs as memory allows are under way at once."""
        waiting = deque(_Pass(job) for job in jobs)
        passes = list(waiting)
        with ExitStack() as hooks:
            for block in self._names:
                hooks.enter_context(block.register_forward_pre_hook(partial(_stop, getcurrent()), with_kwargs=True))
            hooks.callback(self._use, None)
            while waiting:
                self._run_together(waiting)
        return [each.result for each in passes]

    def _run_together(self, waiting: "deque[_Pass[Any]]") -> None:
        """Take passes to their ends, as many of those that wait as there is room for."""
        first = waiting.popleft()
        under_way = [first] if first.go_on() else []
        room = _SHARE * available_memory() / max(1, first.held)
        try:
            while waiting and len(under_way) < room:
                following = waiting.popleft()
                under_way += [following] if following.go_on() else []
            while under_way:
                for each in tuple(under_way):
                    self._use(each.block)
                    if not each.go_on():
                        under_way.remove(each)
        finally:
            for each in under_way:
                each.give_up()

    def _use(self, block: nn.Module | None) -> None:
        """Let the block go whose turn it was, and bring the one that is used now."""
        if block is self._used:
            return
        if self._used is not None:
            self._lending.close()
            torch.clear_autocast_cache()
            self._weights.release(self._names[self._used])
        self._used = block
        if block is not None:
            self._lending.enter_context(_lent(_tensors(block), self._device, widen=self._widen))
            if block in self._next:
                self._weights.fetch(self._names[self._next[block]])


class _Pass(Generic[T]):
    """One job on its way through the blocks.

    Attributes:
        block: that it is about to run.
        held: bytes of the tensors that the block is given.
        result: of the job, when it has ended.
    """

    def __init__(self, job: Callable[[], T]) -> None:
        self._job = job
        self._coroutine: greenlet | None = None
        self.block: nn.Module | None = None
        self.held = 0
        self.result: T

    def go_on(self) -> bool:
        """Run to the next block, or to the end; return whether there is more to do."""
        modes = _modes()
        if self._coroutine is None:
            self._coroutine = greenlet(self._run)
            self._coroutine.gr_context = copy_context()  # else a pass would see no context variable that is set
        try:
            stopped = self._coroutine.switch()
        finally:
            _set_modes(modes)
        if self._coroutine.dead:
            return False
        self.block, self.held = stopped
        return True

    def give_up(self) -> None:
        """End the coroutine where it waits."""
        if self._coroutine is not None and not self._coroutine.dead:
            self._coroutine.throw(GreenletExit)

    def _run(self) -> None:
        self.result = self._job()


def _stop(main: greenlet, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Go back to who leads the passes, before a block is run: a hook, called in the coroutine of a pass."""
    found = {id(leaf): leaf.nbytes for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    modes = _modes()
    main.switch((block, sum(found.values())))
    _set_modes(modes)


def _modes() -> list[Any]:
    """Return what of torch a thread has set, and a model may have set for a while: whoever goes on needs its own."""
    return [torch.is_grad_enabled(), *((torch.is_autocast_enabled(at), torch.get_autocast_dtype(at)) for at in _PLACES)]


def _set_modes(modes: list[Any]) -> None:
    torch.set_grad_enabled(modes[0])
    for at, (enabled, dtype) in zip(_PLACES, modes[1:], strict=True):
        torch.set_autocast_enabled(at, enabled)
        torch.set_autocast_dtype(at, dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    home = model_device(model)
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def _lent(tensors: Sequence[Tensor], device: torch.device | None, *, widen: bool) -> Iterator[None]:
    """Give tensors a copy on a device, and back what they were at the end.

    Args:
        tensors: parameters and buffers.
        device: None leaves them where they are.
        widen: whether those of a narrower floating dtype than float32 are copied as float32.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in tensors:
            narrow = widen and tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
            lent = tensor.data.to(device=device, dtype=torch.float32 if narrow else None)
            if lent is not tensor.data:
                originals.append((tensor, tensor.data))
                tensor.data = lent
        yield
    finally:
        for tensor, original in originals:
            tensor.data = original
