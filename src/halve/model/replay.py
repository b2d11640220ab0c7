"""Before a model is pruned: which of its stacks run, how their blocks are called, and whether a replay is faithful."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from halve.errors import CalibrationError, HalveError, UnsupportedModelError, one_line
from halve.model.blocks import Batch, Passing, capture, caution_of_sizes, check_finite, run_model
from halve.model.calls import Behaviour, Template, hidden_of, is_plain, items_of, leaves
from halve.model.stacks import Stack
from halve.model.stream import Stream

PROBE_TOKENS = 32
"""Tokens of the first short sample; the second has a quarter less, since a replay must not depend on the length."""
_REPLAY_TOLERANCE = 1e-4
_ALONG_TOKENS = frozenset(
    {
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "decoder_position_ids"),
    }
)
"""Tensors of a batch whose second dimension is tokens."""


def probe_batches(batches: Sequence[Batch], *, rows: bool = True) -> list[Batch]:
    """Return two short samples of a calibration set, of different lengths where that can be chosen.

    The first row of the first batch and the last row of the last; of token sequences the first 32 and 24 positions,
    unless something other than tokens belongs to the batch (images, whose places in the text must not be cut off).
    Without ``rows``, all rows.
    """
    first, last = (slice(0, 1), slice(-1, None)) if rows else (slice(None), slice(None))
    return [_part(batches[0], first, PROBE_TOKENS), _part(batches[-1], last, PROBE_TOKENS * 3 // 4)]


def _part(batch: Batch, rows: slice, length: int) -> Batch:
    if len({len(value) for value in batch.values() if value.ndim}) != 1:
        return batch  # rows that do not belong to each other one by one
    cut = batch.keys() <= _ALONG_TOKENS
    return {
        key: value[rows, : _length(key, value, length)].contiguous() if cut and value.ndim >= 2 else value[rows]
        for key, value in batch.items()
    }


def _length(key: str, value: Tensor, most: int) -> int:
    """Return how many tokens to keep: of a decoder's fewer, so that what sees the encoder can be told by its length."""
    kept = min(most, value.shape[1])
    return kept - kept // 4 if key.startswith("decoder_") else kept


def short_samples(
    model: nn.Module, stacks: Sequence[Stack], batches: Sequence[Batch]
) -> tuple[list[Batch], list[Stack]]:
    """Find short samples that the model takes, and the stacks that run on them.

    They are those of `probe_batches`. Where the model fails on them they are cut less, since its rows may not be the
    batch's (several codebooks of audio): along tokens only, then not at all.

    Returns:
        tuple[list[Batch], list[Stack]]: the samples, and the stacks in the order in which they run.
    """
    samples = [probe_batches(batches), probe_batches(batches, rows=False), [batches[0], batches[-1]]]
    for short in samples:
        try:
            running = [in_running_order(model, stacks, batch) for batch in short]
        except HalveError:
            raise
        except Exception as error:  # a model may raise anything
            if short is samples[-1]:
                why = caution_of_sizes(batches) or one_line(error)
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be run on the calibration data: {why}"
                ) from error
        else:
            return short, running[0]
    raise AssertionError


def in_running_order(model: nn.Module, stacks: Sequence[Stack], batch: Batch) -> list[Stack]:
    """Return the stacks of which a block runs on a batch, in the order in which they first do."""
    ran: dict[str, Stack] = {}
    with ExitStack() as hooks:
        for stack in stacks:
            for block in stack.blocks:
                hooks.enter_context(
                    block.register_forward_pre_hook(lambda *_, stack=stack: ran.setdefault(stack.name, stack) and None)
                )
        run_model(model, batch)
    return list(ran.values())


def watch_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch
) -> tuple[tuple[Template, ...], bool, list[Tensor]]:
    """Run ``batch`` through the whole model and note what each block is given and returns.

    Args:
        model: the model.
        blocks: its blocks, in order.
        batch: a short batch (`probe_batches`).

    Returns:
        tuple[tuple[Template, ...], bool, list[Tensor]]: what each block returns, whether a block wrote into a dict or
        list that it was given, and the hidden state after every block.

    Raises:
        UnsupportedModelError: a block ran not once but more often or never, or takes or returns no hidden state.
    """
    ran: list[list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = [[] for _ in blocks]
    contents: list[Any] = []
    kept: list[Any] = []  # so that no object of another run gets the same id
    written = False

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        contents.append(_containers((args, kwargs)))
        kept.extend(leaf for _, leaf in leaves((args, kwargs)))

    def after(calls: list[Any], _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal written
        written |= contents.pop() != _containers((args, kwargs))
        calls.append((args, kwargs, output))

    with ExitStack() as hooks:
        for block, calls in zip(blocks, ran, strict=True):
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(partial(after, calls), with_kwargs=True))
        run_model(model, batch)
    name = type(model).__name__
    for index, calls in enumerate(ran):
        if len(calls) != 1:
            how_often = f"ran {len(calls)} times" if calls else "did not run"
            raise UnsupportedModelError(
                f"block {index} of {name} {how_often} in one forward pass on the calibration data: Halve needs blocks "
                "that run exactly once"
            )
        if not isinstance(hidden_of(calls[0][2]), Tensor):
            raise UnsupportedModelError(
                f"block {index} of {name} returned {type(hidden_of(calls[0][2])).__name__}, not a hidden state"
            )
    found = [calls[0] for calls in ran]
    states = [hidden_of(output) for _, _, output in found]
    places = _hidden_places([(args, kwargs) for args, kwargs, _ in found], states)
    for index, ((args, kwargs, _), place) in enumerate(zip(found, places, strict=True)):
        if place is None:
            raise UnsupportedModelError(f"block {index} of {name} is given no hidden state: {_kinds(args, kwargs)}")
    templates = tuple(
        Template.of(output, args, kwargs, place)
        for (args, kwargs, output), place in zip(found, places, strict=True)
        if place is not None
    )
    return templates, written, states


def _containers(value: Any) -> Any:
    """What dicts and lists in a nest hold, by identity: different afterwards if somebody has written into one."""
    if not is_plain(value):
        return id(value)
    return [(key, _containers(item)) for key, item in items_of(value)]


def _kinds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    given = [type(value).__name__ for value in args] + [f"{key}={type(item).__name__}" for key, item in kwargs.items()]
    return f"it was called with ({', '.join(given)})"


def _hidden_places(calls: Sequence[tuple[Any, Any]], states: Sequence[Tensor]) -> list[int | str | None]:
    """Return which argument of each block is the hidden state: the one that the block before has returned.

    Where none is (the first block, or a model that hands on a copy), it is the argument that it is for the other
    blocks, or the first if that is a tensor, or the first tensor among the keywords.
    """
    found: list[int | str | None] = [None]
    for (args, kwargs), state in zip(calls[1:], states, strict=False):
        named = [*enumerate(args), *kwargs.items()]
        found.append(next((key for key, value in named if value is state), None))
    usual = Counter(place for place in found if place is not None).most_common(1)
    for index, (args, kwargs) in enumerate(calls):
        given = {**dict(enumerate(args)), **kwargs}
        tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
        if found[index] is None and usual and usual[0][0] in tensors:
            found[index] = usual[0][0]
        elif found[index] is None:
            found[index] = next((key for key in tensors if key == 0 or isinstance(key, str)), None)
    return found


def verify_replay(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    masks: tuple[str | None, str | None] = ("attention_mask", None),
    passing: Passing = (),
) -> Behaviour:
    """Check on short batches that running the blocks one after the other equals the model's own forward pass.

    Every block is run twice on each batch, and the batches take turns: what one run leaves behind must reach neither
    the next nor another batch.

    Args:
        model: the model.
        blocks: its blocks, in order.
        batches: short ones (`probe_batches`).
        masks: names of the masks of the blocks' own positions and of what they see of an encoder (`Behaviour`).
        passing: as for `halve.model.blocks.capture`.

    Returns:
        Behaviour: of the blocks, as `capture` needs it.

    Raises:
        UnsupportedModelError: the results differ: the model does something between its blocks that a replay misses.
        CalibrationError: the dense model gives NaN or infinity.
    """
    watched = [watch_blocks(model, blocks, batch) for batch in batches]
    templates = watched[0][0]
    living = any(written for _, written, _ in watched)
    expected = [states for _, _, states in watched]
    handing = [(block, path) for block, template in enumerate(templates) for path in template.own]
    behaviour = Behaviour(templates, living=living, hands_on=bool(handing), mask=masks[0], memory_mask=masks[1])
    try:
        _check_replay(model, blocks, batches, behaviour, expected, passing)
    except HalveError:
        raise
    except Exception as error:
        if not handing:
            raise UnsupportedModelError(
                f"{type(model).__name__} fails where its blocks are not computed ({one_line(error)}): it uses more of "
                "theirs than what they return, such as a cache, which Halve cannot hand on"
            ) from error
        # The model computes with what it was handed between blocks; it may do without, where it is not there.
        behaviour = replace(behaviour, hands_on=False)
        try:
            _check_replay(model, blocks, batches, behaviour, expected, passing)
        except CalibrationError:
            raise
        except Exception as missed:
            block, path = handing[0]
            raise UnsupportedModelError(
                f"block {block} of {type(model).__name__} returns, beside its hidden state, a value at {list(path)} "
                f"that the model's own code computes with between its blocks ({one_line(error)}): Halve can only hand "
                "such a value on as it is"
            ) from missed
    return behaviour


def _check_replay(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    behaviour: Behaviour,
    expected: Sequence[Sequence[Tensor]],
    passing: Passing,
) -> None:
    stream = capture(model, blocks, batches, behaviour, passing=passing)
    other = stream.fork("other")  # as if it were another model's: nothing of it must reach the first
    for batch in range(len(batches)):
        other.hidden[batch] = other.hidden[batch] * 0.5
    name = type(model).__name__
    for index, block in enumerate(blocks):
        for keep in (False, True):
            for batch, states in enumerate(expected):
                place = states[index].device
                hidden, versions = stream.hidden[batch], _versions(stream, index, batch)
                other.run(index, batch, block, place, dtype=None, keep=keep)
                output = stream.run(index, batch, block, place, dtype=None, keep=keep)
                if _versions(stream, index, batch, hidden=hidden if keep else None) != versions:
                    raise UnsupportedModelError(
                        f"block {index} of {name} writes into its own input, so it cannot be run twice on it"
                    )
                check_finite(output, f"the outputs of the dense model's block {index}")
                error = _relative_error(output, states[index])
                if not error <= _REPLAY_TOLERANCE:
                    again = " when it is run a second time" if keep else ""
                    raise UnsupportedModelError(
                        f"running {name} block by block does not reproduce its own output (block {index}{again}: "
                        f"relative error {error:.2g}): it changes the hidden state between blocks, or hands on "
                        "something that a replay misses, which Halve does not support"
                    )


def _versions(stream: Stream, block: int, batch: int, hidden: Tensor | None = None) -> list[int]:
    """Return how often the tensors of a call were written into: PyTorch counts it."""
    call = stream.calls[block][batch]
    tensors = [stream.hidden[batch] if hidden is None else hidden]
    tensors += [leaf for _, leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    return [tensor._version for tensor in tensors]  # noqa: SLF001 - the only way to see an in-place write


def _relative_error(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    return float((output.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
