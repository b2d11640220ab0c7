"""Which matrices of a block are solved together, what that costs, and how it is done; and what it takes beforehand."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import CalibrationError, InputError, LayerFailedError
from halve.maths.gram import Gradient, Statistics
from halve.maths.pattern import apply_mask
from halve.memory import whole_memory
from halve.model.gradients import output_gradients
from halve.model.plan import Matrix
from halve.model.reconstruct import Example, optimise_in_rounds
from halve.run.settings import Settings
from halve.solve import methods
from halve.solve.matrix import GIVEN, prune_weight, prune_weights
from halve.solve.outcome import Outcome, Status

BUNDLE_WEIGHTS = 1 << 26
"""Most weights of matrices that are solved together: 256 MiB in float32, of which a solver needs up to a dozen.

It decides bytes, since libraries of matrix products round differently by shape: no machine may have another one.
"""
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "out_lin", "fc2", "fc_out", "down_proj", "w2")
"""What layers are called that read what their siblings have made."""
_MOST_SUMS = 0.5
"""Share of a GPU's memory that the sums over a block's inputs may take, those of two shards."""
_LEAST_SECONDS = 1e-3
"""What a time limit that is used up counts as."""


def likely_input(parameter: str, d_in: int, expert: int | None = None) -> Hashable:
    """Return what is equal for matrices that are going to read the same input, as far as names and widths can tell.

    Siblings of one width do, but for those that are called like the last of them; fused experts do not.

    Args:
        parameter: full name.
        d_in: inputs of the matrix.
        expert: its index in a fused parameter.
    """
    if expert is not None:
        return parameter, expert
    module, _, leaf = parameter.removesuffix(".weight").rpartition(".")
    return module, d_in, leaf if leaf in _OUTPUTS else ""


def bytes_of_sums(widths: Iterable[int], *, halves: bool, cross: bool) -> int:
    """Return how much the sums over a block's inputs take, in bytes; twice that while one shard's are added to others.

    Args:
        widths: d_in of each distinct input.
        halves: whether each half of the tokens is summed by itself.
        cross: whether products of the dense model's inputs with the pruned model's are summed too.
    """
    return (1 + halves + cross) * torch.float32.itemsize * sum(width**2 for width in widths)


def home_of_sums(size: int, device: torch.device) -> torch.device:
    """Return where the inputs of a block are summed, and their statistics kept.

    That is the device, but the machine's memory, and its processor, where two shards' sums would take more than half of
    all that the device has, as those of many experts do; each bundle's statistics come to the device as it is solved.
    Neither what is free there counts nor how many shards there are: every worker, and a run that goes on, has to find
    the same place.

    Args:
        size: of the sums of one shard, in bytes (`bytes_of_sums`).
        device: where blocks run and matrices are solved.
    """
    on_host = device.type != "cpu" and 2 * size > _MOST_SUMS * whole_memory(device)
    return torch.device("cpu") if on_host else device


def bundles(
    matrices: Sequence[Matrix], leaders: Mapping[str, str], most: int = BUNDLE_WEIGHTS
) -> Iterator[list[Matrix]]:
    """Yield groups of neighbours that share their statistics.

    Args:
        matrices: of one block, in order.
        leaders: for each matrix that received inputs, the one under whose name they were summed.
        most: weights that a group of several may have.
    """
    bundle: list[Matrix] = []
    for matrix in matrices:
        shared = leaders.get(matrix.name)
        size = sum(other.d_out * other.d_in for other in (*bundle, matrix))
        if bundle and (shared is None or shared != leaders.get(bundle[0].name) or size > most):
            yield bundle
            bundle = []
        bundle.append(matrix)
    if bundle:
        yield bundle


def operations(matrix: Matrix) -> float:
    """About how many multiplications the default solver takes: products of every row, and factorisations."""
    return float(matrix.d_in**2 * (60 * matrix.d_out + 15 * matrix.d_in))


def share_of_time(bundle: Sequence[Matrix], ahead: Sequence[Matrix], seconds: float) -> float:
    """Return how many of the ``seconds`` that are left for all matrices ``ahead`` are for ``bundle``, by operations."""
    cost = sum(operations(matrix) for matrix in bundle) / sum(operations(matrix) for matrix in ahead)
    return max(_LEAST_SECONDS, seconds) * cost


def prune_bundle(
    bundle: Sequence[Matrix],
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    settings: Settings,
    options: Mapping[str, Any],
    *,
    routed: bool,
    masks: Sequence[Tensor] | None = None,
    gradients: Sequence[Gradient] | None = None,
) -> list[Outcome]:
    """Prune matrices that share their statistics.

    Args:
        bundle: the matrices.
        weights: (d_out, d_in) of each.
        statistics: of their inputs, None if there are none.
        settings: what was asked.
        options: of method and refit, for these matrices.
        routed: whether only the tokens that a router sent there are in ``statistics``, which then may be too few.
        masks: (d_out, d_in) bool of what each keeps; None lets the method choose.
        gradients: of each matrix, for a method that weighs them.

    Returns:
        list[Outcome]: one for each matrix.

    Raises:
        InputError: a matrix or its statistics cannot be used as they are; the message names the matrices.
        LayerFailedError: too few tokens, and no fallback.
    """
    tokens = 0 if statistics is None else statistics.tokens
    if routed and tokens < settings.min_expert_tokens:
        if masks is not None:
            reason = _unseen(tokens, settings)
            kept = [apply_mask(weight, mask) for weight, mask in zip(weights, masks, strict=True)]
            return [Outcome(weight, Status.FELL_BACK, GIVEN, reason, {"tokens": float(tokens)}) for weight in kept]
        return [_prune_unseen(matrix, weight, tokens, settings) for matrix, weight in zip(bundle, weights, strict=True)]
    try:
        return prune_weights(
            weights,
            statistics,
            settings.pattern,
            settings.method,
            settings.refit,
            fallback=settings.fallback,
            objective=settings.objective,
            masks=masks,
            gradients=gradients,
            **options,
        )
    except InputError as error:
        raise InputError(f"{', '.join(matrix.name for matrix in bundle)}: {error}") from error


def gradients_of_output(
    block: nn.Module,
    name: str,
    matrices: Sequence[Matrix],
    statistics: Mapping[str, Statistics | None],
    settings: Settings,
    examples: Callable[[int], Example],
    count: int,
    precision: torch.dtype,
) -> dict[str, Gradient]:
    """Take the gradients of a block's output, and let its weights be tuned in rounds if the method asks for that.

    Args:
        block: in float32, dense; left as the rounds leave it.
        name: of the block in the model.
        matrices: of the block.
        statistics: of their inputs, by name.
        settings: what was asked, of a method that weighs such gradients.
        examples: gives sample number i; its target is not used.
        count: number of samples.
        precision: dtype of the products in forward and backward passes.

    Returns:
        dict[str, Gradient]: by the matrix's name, with tuned weights where there were rounds.

    Raises:
        CalibrationError: a norm or a gradient is not finite.
    """
    parameters = {matrix.name: matrix.parameter.removeprefix(f"{name}.") for matrix in matrices}
    names = sorted(set(parameters.values()))
    try:
        roots = output_gradients(block, names, examples, count, precision)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error
    found = {matrix.name: Gradient(matrix.view(roots[parameters[matrix.name]]), count) for matrix in matrices}
    method = methods.get(settings.method)
    of_method = {each.name for each in fields(method.options)}
    options = method.options(**{key: value for key, value in settings.options.items() if key in of_method})
    if not options.rounds:
        return found

    def weight_of(matrix: Matrix) -> Tensor:
        return matrix.view(block.get_parameter(parameters[matrix.name]).data)

    def prune() -> None:
        for matrix in matrices:
            stats = statistics[matrix.name]
            if stats is None or (matrix.routed and stats.tokens < settings.min_expert_tokens):
                continue  # such an expert is pruned by magnitude in the end
            weight = weight_of(matrix)
            stats = replace(stats.to(weight.device), gradient=found[matrix.name])
            with suppress(CalibrationError):  # what is wrong is said in the end
                weight.copy_(method.solve(weight, stats, settings.pattern, options).weight)

    optimise_in_rounds(
        block,
        names,
        prune,
        examples,
        count,
        rounds=options.rounds,
        drawn=options.round_samples,
        learning_rate=options.learning_rate,
        precision=precision,
    )
    return {matrix.name: replace(found[matrix.name], tuned=weight_of(matrix).clone()) for matrix in matrices}


def _unseen(tokens: float, settings: Settings) -> str:
    return f"only {tokens} calibration tokens reached this expert (at least {settings.min_expert_tokens} are needed)"


def _prune_unseen(matrix: Matrix, weight: Tensor, tokens: int, settings: Settings) -> Outcome:
    """Prune an expert whose statistics are missing or too thin by magnitude, and say so; refuse if strict."""
    reason = _unseen(tokens, settings)
    as_asked = settings.method == "magnitude" and settings.refit == "none"
    if settings.fallback is None and not as_asked:
        if settings.method == "magnitude":
            raise LayerFailedError(
                f"{matrix.name}: {reason} for refit {settings.refit}: use more samples, or refit none"
            )
        raise LayerFailedError(
            f"{matrix.name}: {reason}: use more samples or a smaller min_expert_tokens, or give a fallback, and such "
            "experts are pruned by magnitude"
        )
    outcome = prune_weight(weight, None, settings.pattern, "magnitude", "none")
    if as_asked:
        return outcome
    facts = {**outcome.facts, "tokens": float(tokens)}
    return Outcome(outcome.weight, Status.FELL_BACK, "magnitude", reason, facts)
