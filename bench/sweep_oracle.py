"""Judge a pruned model by full forward passes: what the sweep holds Halve's results to.

Nothing here knows how Halve runs a model. What it fed to a block is seen by hooks that are put on the model's blocks
beforehand: a copy of a block has them too. What it should have fed is what the model's own forward pass, without a
cache, gives the block: of the dense model, of the finished pruned model, or of the finished model with this one block
dense again, which is what a matrix of the block is judged by while it is being pruned. Masks of the method wanda are
computed once more from the inputs that matrices get in that pass.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = Mapping[str, Tensor]

TOLERANCE = 1e-4
"""How far a hidden state may be off, relative to its norm; float32 leaves about 1e-6."""
MASK_TOLERANCE = 5e-3
"""Share of groups that may be chosen otherwise, twice as many in one matrix; what float32 cannot tell apart does not
count at all."""
_TIE = 1e-3


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
            running.pop().output = next((tensor for _, tensor in _tensors(output)), None)
            self._copies_running -= module is not original

        self._hooks.callback(original.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._hooks.callback(original.register_forward_hook(after, with_kwargs=True, always_call=True).remove)

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


class _Products(TorchFunctionMode):
    """Sum up the squares of what is multiplied with given parameters, or with the slices of three-dimensional ones.

    Args:
        matrices: the parameters by name.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._at = {parameter.untyped_storage().data_ptr(): (name, parameter) for name, parameter in matrices.items()}
        self.squares: dict[tuple[str, int | None], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "__rmatmul__"}:
            operands = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            for position, weight in enumerate(operands):
                found = self._at.get(weight.untyped_storage().data_ptr())
                if found is not None and position > 0 and weight.ndim >= 2:
                    self._note(*found, operands[position - 1], weight)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, parameter: Tensor, x: Tensor, weight: Tensor) -> None:
        if parameter.ndim == 2:
            self._add(name, None, x)
        elif weight.ndim == 2:
            self._add(name, weight.storage_offset() // parameter[0].numel(), x)
        else:
            for expert in range(parameter.shape[0]):
                self._add(name, expert, x[expert])

    def _add(self, name: str, expert: int | None, x: Tensor) -> None:
        total = x.detach().double().reshape(-1, x.shape[-1]).square().sum(0)
        key = (name, expert)
        self.squares[key] = self.squares[key] + total if key in self.squares else total


@dataclass(frozen=True)
class Matrix:
    """A pruned matrix, as the public report of a run names it.

    Attributes:
        parameter: name of the parameter that holds it.
        expert: its index there, None for a parameter of two dimensions.
        transposed: whether it is stored as (d_in, d_out).
    """

    parameter: str
    expert: int | None
    transposed: bool

    def of(self, parameter: Tensor) -> Tensor:
        """Return it as (d_out, d_in)."""
        stored = parameter.detach() if self.expert is None else parameter.detach()[self.expert]
        return stored.T if self.transposed else stored


def judge_masks(matrices: Sequence[Matrix], reference: Reference, blocks: Iterable[str]) -> Findings:
    """Choose once more what wanda keeps of 2:4 groups, |w| · ‖x‖ from full forward passes, and compare.

    Args:
        matrices: what was pruned.
        reference: the models.
        blocks: names of the blocks.
    """
    findings = Findings()
    groups = differing = unseen = 0
    worst = (0.0, "")
    for block in blocks:
        inside = [matrix for matrix in matrices if matrix.parameter.startswith(f"{block}.")]
        if not inside:
            continue
        squares = _input_squares(reference, block, {matrix.parameter for matrix in inside})
        for matrix in inside:
            total = squares.get((matrix.parameter, matrix.expert))
            before = matrix.of(reference.dense.get_parameter(matrix.parameter)).double()
            after = matrix.of(reference.pruned.get_parameter(matrix.parameter)).double()
            if bool(((after != 0) & (after != before)).any()):
                findings.wrong.append(f"{matrix.parameter}: a weight that was kept has changed")
            if total is None or total.shape[0] != before.shape[1]:
                unseen += matrix.expert is None
                continue
            count, wrong = _compare_groups(before, after, total.sqrt())
            groups, differing = groups + count, differing + wrong
            worst = max(worst, (wrong / max(count, 1), f"{matrix.parameter}"))
    if groups and (differing / groups > MASK_TOLERANCE or worst[0] > 2 * MASK_TOLERANCE):
        findings.wrong.append(
            f"{100 * differing / groups:.2g} % of wanda's groups differ, most in {worst[1]} ({100 * worst[0]:.2g} %)"
        )
    findings.facts.update(groups=groups, groups_differ=differing, matrices_unseen=unseen)
    return findings


def _input_squares(reference: Reference, block: str, names: set[str]) -> dict[tuple[str, int | None], Tensor]:
    with reference.with_dense(block) as model:
        products = _Products({name: model.get_parameter(name).data for name in names})
        with eager_experts(model):
            for batch in reference.batches:
                with products:
                    forward(model, batch)
    return products.squares


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Have transformers multiply experts one by one, so that each one's inputs can be seen."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    if all(value is None for value in before.values()):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _compare_groups(before: Tensor, after: Tensor, norms: Tensor) -> tuple[int, int]:
    """Return the number of groups of four, and of those whose kept pair is not the one with the largest scores."""
    scores = (before.abs() * norms).reshape(before.shape[0], -1, 4)
    kept = (after != 0).reshape(after.shape[0], -1, 4)
    ranked = scores.sort(dim=-1, descending=True).values
    threshold = ranked[..., 1:2]
    tie = (ranked[..., 1] - ranked[..., 2]) <= _TIE * ranked[..., 1]
    expected = scores >= threshold
    wrong = (kept != expected).any(-1) & ~tie
    return wrong.numel(), int(wrong.sum())


def judge_routers(matrices: Sequence[Matrix], pruned: nn.Module, experts: int) -> Findings:
    """A matrix with as many outputs as there are experts chooses among them, and must have stayed dense."""
    findings = Findings()
    for matrix in matrices:
        if matrix.of(pruned.get_parameter(matrix.parameter)).shape[0] == experts:
            findings.wrong.append(f"{matrix.parameter} chooses among experts, and was pruned")
    return findings


def judge_untouched(dense: nn.Module, found: nn.Module, pruned: nn.Module, changed: Iterable[str]) -> Findings:
    """Hold a model that was read from disk to the one in memory, bit for bit.

    Args:
        dense: the model before pruning.
        found: the one that plain transformers has read.
        pruned: the one that was pruned in memory, with the same method.
        changed: the parameters that pruning may have changed.
    """
    findings = Findings()
    allowed = set(changed)
    expected = {**dense.state_dict(), **{k: v for k, v in pruned.state_dict().items() if k in allowed}}
    got = found.state_dict()
    findings.wrong += [f"{name} is not in what was read" for name in expected.keys() - got.keys()][:1]
    for name, tensor in expected.items():
        other = got.get(name)
        if other is not None and not same_bits(tensor, other):
            what = "differs from the model pruned in memory" if name in allowed else "was not pruned, and has changed"
            findings.wrong.append(f"{name} {what}")
            break
    return findings


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = (a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1))
    return torch.equal(*(each.view(torch.uint8) if each.numel() else each for each in flat))
