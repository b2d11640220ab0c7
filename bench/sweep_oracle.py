"""Judge a pruned model by full forward passes: what the sweep holds Halve's results to.

Nothing here knows how Halve runs a model. What it fed to a block is seen by hooks that are put on the model's blocks
beforehand: a copy of a block has them too. What it should have fed is what the model's own forward pass, without a
cache, gives the block: of the dense model, of the finished pruned model, or of the finished model with this one block
dense again, which is what a matrix of the block is judged by while it is being pruned.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

TOLERANCE = 1e-4
"""How far a hidden state may be off, relative to its norm; float32 leaves about 1e-6."""


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Run a full forward pass without a cache, and return its first tensor: the logits."""
    parameters = signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "use_cache" in parameters:
        extra["use_cache"] = False
    with torch.no_grad(), _uncached(model):
        outputs = model(**batch, **extra)
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return next(value for value in values if isinstance(value, Tensor))


@contextmanager
def _uncached(model: nn.Module) -> Iterator[None]:
    """Switch caches off in every configuration of the model: not every forward pass takes the argument."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = {key: config.use_cache for key, config in configs.items() if hasattr(config, "use_cache")}
    for key in before:
        configs[key].use_cache = False
    try:
        yield
    finally:
        for key, value in before.items():
            configs[key].use_cache = value


@dataclass
class Call:
    """One call of a module: every tensor that went in, by where it stood, and the first that came out.

    Attributes:
        inputs: those tensors, copied.
        output: the first that came out, None while it runs.
        on_its_own: whether it was a call of a copy, and not on behalf of another copy's.
    """

    inputs: dict[str, Tensor]
    output: Tensor | None = None
    on_its_own: bool = False


class Listening:
    """Note every call of all members of a model's module lists, and of copies of them, until it is closed.

    Which of them are the blocks that are run one by one shows in the calls: copies of those are called on their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[Call]] = {}
        self._hooks = ExitStack()
        self._copies_running = 0
        self._latest: tuple[list[Call], Call] | None = None
        for name, member in members_of(model).items():
            self.calls[name] = []
            self._listen(name, member)

    @property
    def blocks(self) -> dict[str, list[Call]]:
        """The calls of copies on their own, by the name of the block; names in the order of the model."""
        alone = {name: [call for call in calls if call.on_its_own] for name, calls in self.calls.items()}
        return {name: calls for name, calls in alone.items() if calls}

    def _listen(self, name: str, original: nn.Module) -> None:
        calls = self.calls[name]
        running: list[Call] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            copied = module is not original
            call = Call(dict(_tensors((args, kwargs))), on_its_own=copied and not self._copies_running)
            self._copies_running += copied
            calls.append(call)
            running.append(call)

        def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            call = running.pop()
            call.output = next((tensor for _, tensor in _tensors(output)), None)
            self._copies_running -= module is not original
            if call.on_its_own:
                self._latest = calls, call

        self._hooks.callback(original.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._hooks.callback(original.register_forward_hook(after, with_kwargs=True, always_call=True).remove)

    def forget(self) -> None:
        """Leave out the latest call of a block on its own, whose output is not what the block gives."""
        if self._latest is not None:
            calls, call = self._latest
            calls[:] = [each for each in calls if each is not call]

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()


def members_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of all module lists of a model that have matrices, by name."""
    return {
        f"{name}.{key}".lstrip("."): member
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for key, member in module.named_children()
        if any(parameter.ndim >= 2 for parameter in member.parameters())
    }


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a nest of tuples, lists and mappings, copied, and where they stood."""
    if isinstance(value, Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}")


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to what was expected; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    found, expected = found.double(), expected.double()
    same = found == expected  # infinities of attention masks
    gap = torch.where(same, 0.0, found - expected).nan_to_num(torch.inf, torch.inf, torch.inf).norm()
    return float(gap / torch.where(expected.isfinite(), expected, 0.0).norm().clamp_min(1e-30))


@dataclass
class Findings:
    """What is wrong, as sentences, and the figures behind them."""

    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Reference:
    """Full forward passes of the dense model, the finished one, and the finished one with a block dense again.

    Args:
        dense: the model before it was pruned.
        pruned: the finished model; it is put back as it was after every use.
        changed: names of the parameters that pruning has changed.
        batches: what it was calibrated on.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, changed: Iterable[str], batches: Sequence[Batch]) -> None:
        self.dense, self.pruned, self.changed, self.batches = dense, pruned, sorted(changed), batches
        self._before = dict(dense.named_parameters(remove_duplicate=False))
        self._after = dict(pruned.named_parameters(remove_duplicate=False))
        self._passes: dict[str, list[dict[str, list[Call]]]] = {}

    def passes(self, which: str) -> list[dict[str, list[Call]]]:
        """Return the calls of all blocks for each batch: of ``dense``, ``pruned``, or with the named block dense."""
        if which not in self._passes:
            with self.with_dense(which) as model:
                self._passes[which] = [_calls(model, batch) for batch in self.batches]
        return self._passes[which]

    @contextmanager
    def with_dense(self, which: str) -> Iterator[nn.Module]:
        """Lend the model that `passes` means."""
        if which in {"dense", "pruned"}:
            yield self.dense if which == "dense" else self.pruned
            return
        names = [name for name in self.changed if name.startswith(f"{which}.")]
        kept = {name: self._after[name].data.clone() for name in names}
        for name in names:
            self._after[name].data.copy_(self._before[name].data)
        try:
            yield self.pruned
        finally:
            for name, tensor in kept.items():
                self._after[name].data.copy_(tensor)


def _calls(model: nn.Module, batch: Batch) -> dict[str, list[Call]]:
    listening = Listening(model)
    try:
        forward(model, batch)
    finally:
        listening.close()
    return listening.calls


def judge_streams(listening: Listening, reference: Reference, *, dense_too: bool) -> Findings:
    """Hold what blocks were fed, and what they gave, to full forward passes.

    Args:
        listening: the calls during pruning.
        reference: the passes.
        dense_too: whether the dense model's hidden states had to be fed to every block beside the pruned one's.
    """
    findings = Findings()
    worst = 0.0
    blocks = {
        name: calls
        for name, calls in listening.blocks.items()
        if any(each.startswith(f"{name}.") for each in reference.changed)
    }
    for parameter in reference.changed:
        if not any(parameter.startswith(f"{name}.") for name in blocks):
            findings.wrong.append(f"{parameter} was pruned, but no block that holds it was seen to run on its own")
            break
    for name, calls in blocks.items():
        seen: set[tuple[str, int]] = set()
        for call in calls:
            matched, gap = _match(name, call, reference)
            worst = max(worst, gap)
            if not matched:
                findings.wrong.append(f"{name}: {_nearest(name, call, reference)}")
                break
            seen |= matched
        else:
            for stream in ("pruned", "dense") if dense_too else ("pruned",):
                missing = [batch for batch in range(len(reference.batches)) if (stream, batch) not in seen]
                if missing:
                    findings.wrong.append(
                        f"{name} was not fed the {stream} model's hidden states of batch {missing[0]}"
                    )
    findings.facts["blocks"] = len(blocks)
    findings.facts["stream_error"] = worst
    return findings


def _references(name: str, reference: Reference) -> Iterator[tuple[str, int, Call]]:
    """Yield what a block may have been fed and given: for each stream and batch."""
    for which, stream in (("dense", "dense"), ("pruned", "pruned"), (name, "pruned")):
        for batch, calls in enumerate(reference.passes(which)):
            for call in calls[name]:
                yield stream, batch, call


def _match(name: str, call: Call, reference: Reference) -> tuple[set[tuple[str, int]], float]:
    """Return the streams and batches whose hidden state and output these are, and how far the nearest is off."""
    matched: set[tuple[str, int]] = set()
    least = float("inf")
    for stream, batch, expected in _references(name, reference):
        gap = max(_hidden_gap(call, expected), _output_gap(call, expected))
        least = min(least, gap)
        if gap <= TOLERANCE:
            matched.add((stream, batch))
    return matched, least


def _hidden_gap(call: Call, expected: Call) -> float:
    """Compare the first floating-point tensors."""
    first, other = (next((t for t in each.inputs.values() if t.is_floating_point()), None) for each in (call, expected))
    return float("inf") if first is None or other is None else difference(first, other)


def _output_gap(call: Call, expected: Call) -> float:
    if call.output is None or expected.output is None:
        return 0.0 if call.output is expected.output else float("inf")
    return difference(call.output, expected.output)


def _nearest(name: str, call: Call, reference: Reference) -> str:
    """Say how a call that matches nothing differs from the nearest that it might have been."""
    options = list(_references(name, reference))
    if not options:
        return "was fed a hidden state, but the model's own forward pass never runs it"
    stream, batch, nearest = min(options, key=lambda each: (_hidden_gap(call, each[2]), _output_gap(call, each[2])))
    hidden, output = _hidden_gap(call, nearest), _output_gap(call, nearest)
    if hidden > TOLERANCE:
        shape = next((tuple(t.shape) for t in call.inputs.values() if t.is_floating_point()), ())
        return f"its hidden state {shape} is {hidden:.2g} off the nearest, the {stream} model's of batch {batch}"
    other = [
        path
        for path, tensor in nearest.inputs.items()
        if path in call.inputs and difference(call.inputs[path], tensor) > TOLERANCE
    ]
    absent = sorted(set(nearest.inputs) ^ set(call.inputs))
    why = f"arguments that differ: {', '.join(other)}" if other else "no tensor argument differs"
    why += f"; given only once: {', '.join(absent)}" if absent else ""
    return f"its output is {output:.2g} off the {stream} model's of batch {batch} on the same hidden state ({why})"
