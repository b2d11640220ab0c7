r"""Which layers gain from the off-diagonal of H, and with how many tokens: held-out loss by depth, kind and tokens.

    python experiments/which_layers.py SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4-calibration.jsonl

At 70B parameters the paper's method only matches Wanda, and its authors could not say why. Here every method prunes
matrices of a dense model from every second calibration sequence and is judged on the other sequences too. Part one:
all kinds of matrix at some depths, with facts about H that might explain the gain over Wanda. Part two: three matrices
of the middle block with statistics of n tokens, n / d_in from 1/4 on. Small size: 128 rows a matrix, 48 sequences of
512 tokens, prox-gradient's λ growing by 1.05 an iteration. ``--full``: all rows, 1024 sequences of 2048, the paper's
1.01.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import halve
import matrices_of_model
import results
from halve.maths.gram import Statistics
from halve.maths.quadratic import feature_scales, relative_loss
from halve.model.plan import Matrix
from halve.model.stacks import find_stack

NAME = "which_layers"
BASE = "wanda"
CONTENDERS = (BASE, "wanda+cg", "sparsegpt+cg", "alps+cg", "prox-gradient+cg", "auto+cg")
"""Method and refit; ``auto`` chooses its shrinkage from halves of the training tokens, as it does in a whole model."""
SWEPT = ("q_proj", "gate_proj", "down_proj")
TOKENS_PER_INPUT = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
FACTS = ("effective_rank", "participation", "effective_rank_scaled", "diagonal_share", "tokens_per_input", "block")
"""What may explain the gain: see `facts_of`."""


def facts_of(gram: Tensor) -> dict[str, float]:
    """Return what H looks like, each as a share of d_in, in (0, 1].

    ``effective_rank`` is the exponential of the entropy of the eigenvalues' shares, ``participation`` the square of
    their sum over the sum of their squares; ``effective_rank_scaled`` is the first for H̃, H scaled to unit diagonal,
    and ``diagonal_share`` the share of ‖H̃‖² that lies on its diagonal (the participation of H̃).

    Args:
        gram: (d_in, d_in), H.
    """
    exact = gram.double()
    scales = feature_scales(gram).double()
    scaled = exact / scales / scales.unsqueeze(-1)
    d_in = len(gram)
    values, scaled_values = (torch.linalg.eigvalsh(each).clamp(min=0.0) for each in (exact, scaled))
    return {
        "effective_rank": _effective_rank(values) / d_in,
        "participation": float(values.sum().square() / values.square().sum()) / d_in,
        "effective_rank_scaled": _effective_rank(scaled_values) / d_in,
        "diagonal_share": float(scaled.diagonal().square().sum() / scaled.square().sum()),
    }


def _effective_rank(eigenvalues: Tensor) -> float:
    return math.exp(float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum()))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the rank correlation of two lists of one length; equal values share a mean rank; 0 if a list is flat."""
    first, second = (_ranks(values) for values in (one, other))
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def losses(weight: Tensor, fitted: Statistics, held_out: Statistics, *, beta: float) -> dict[str, dict[str, float]]:
    """Return every contender's relative loss on the ``seen`` tokens and on the ``held_out`` ones.

    Args:
        weight: (d_out, d_in) float32.
        fitted: statistics that the methods see.
        held_out: statistics that only judge.
        beta: growth of prox-gradient's λ.
    """
    found = {}
    for contender in CONTENDERS:
        method, _, refit = contender.partition("+")
        options: dict[str, Any] = {"beta": beta} if method == "prox-gradient" else {}
        pruned = halve.prune_weight(weight, fitted, "2:4", method, refit or "none", **options).weight
        found[contender] = {
            "seen": relative_loss(pruned, weight, fitted.gram),
            "held_out": relative_loss(pruned, weight, held_out.gram),
        }
    return found


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure all matrices, writing after each.

    Returns:
        dict[str, Any]: ``matrices`` with name, block, kind, shape, facts and losses; ``sweep`` with kind, tokens,
            tokens_per_input and losses; ``correlations`` of gains with facts.
    """
    loaded, ids = matrices_of_model.load(given)
    count = len(find_stack(loaded.model)[1])
    blocks = given.blocks or spread(count, given.depths)
    middle = blocks[len(blocks) // 2]
    numbers: dict[str, Any] = {
        "model": str(given.model).rpartition("/")[2],
        "sequences": len(ids),
        "seq_len": ids.shape[1],
        "rows_of_a_matrix": given.rows,
        "beta": given.beta,
        "middle": middle,
        "matrices": [],
        "sweep": [],
    }

    def wanted(matrix: Matrix) -> list[int]:
        kind = matrix.parameter.removesuffix(".weight").rpartition(".")[2]
        return [int(r * matrix.d_in) for r in TOKENS_PER_INPUT] if (matrix.block, kind) in swept else []

    swept = {(middle, kind) for kind in SWEPT}
    for matrix in matrices_of_model.matrices_of_model(
        loaded.model, ids, blocks, rows=given.rows, held_out=True, snapshots=wanted, device=given.device
    ):
        assert matrix.held_out is not None
        found = losses(matrix.weight, matrix.fitted, matrix.held_out, beta=given.beta)
        numbers["matrices"].append(
            {
                "name": matrix.name,
                "block": matrix.block,
                "kind": matrix.kind,
                "shape": list(matrix.weight.shape),
                "tokens": matrix.fitted.tokens,
                "tokens_per_input": matrix.fitted.tokens / matrix.weight.shape[1],
                **facts_of(matrix.fitted.gram),
                "losses": found,
            }
        )
        print(matrix.name, json.dumps({name: round(pair["held_out"], 5) for name, pair in found.items()}), flush=True)
        for stats in matrix.snapshots:
            numbers["sweep"].append(
                {
                    "kind": matrix.kind,
                    "tokens": stats.tokens,
                    "tokens_per_input": stats.tokens / matrix.weight.shape[1],
                    "losses": losses(matrix.weight, stats, matrix.held_out, beta=given.beta),
                }
            )
        numbers["correlations"] = correlations(numbers["matrices"])
        results.save(NAME, numbers, None, given.out)
    results.save(NAME, numbers, picture(numbers), given.out)
    return numbers


def spread(count: int, depths: int) -> list[int]:
    """Return up to ``depths`` of ``count`` blocks, the first and the last among them."""
    depths = min(count, depths)
    return sorted({round(place * (count - 1) / max(1, depths - 1)) for place in range(depths)})


def gain(found: dict[str, dict[str, float]], contender: str, base: str = BASE, where: str = "held_out") -> float:
    """Return log loss(base) - log loss(contender): positive where the contender loses less."""
    return math.log(found[base][where] / found[contender][where])


def correlations(matrices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return Spearman's correlation of every fact with the held-out gain over Wanda, without and with ``cg``."""
    found = []
    for base in (BASE, "wanda+cg"):
        for contender in CONTENDERS[CONTENDERS.index(base) + 1 :]:
            gains = [gain(matrix["losses"], contender, base) for matrix in matrices]
            row: dict[str, Any] = {"base": base, "contender": contender}
            found.append(row | {fact: spearman(gains, [matrix[fact] for matrix in matrices]) for fact in FACTS})
    return found


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw held-out loss over Wanda's: by depth, by kind, against the diagonal's share, and against tokens."""
    figure, panels = results.axes(3, 2, width=5.0, height=4.0)
    matrices = numbers["matrices"]
    kinds = list(dict.fromkeys(matrix["kind"] for matrix in matrices))
    for axis, key, values, label in (
        (panels[0], "block", sorted({matrix["block"] for matrix in matrices}), "block"),
        (panels[1], "kind", kinds, "kind of matrix"),
    ):
        for index, contender in enumerate(CONTENDERS[1:]):
            means = [_mean_ratio([each for each in matrices if each[key] == value], contender) for value in values]
            axis.plot(values, means, label=contender, **results.style(index))
        axis.set(xlabel=label, ylabel="held-out loss / wanda's", title=f"geometric mean by {label}")
    panels[1].tick_params(axis="x", labelrotation=30)
    for index, kind in enumerate(kinds):
        points = [
            (each["diagonal_share"], math.exp(-gain(each["losses"], "auto+cg")))
            for each in matrices
            if each["kind"] == kind
        ]
        panels[2].plot(*zip(*points, strict=True), label=kind, linestyle="none", **results.style(index))
    panels[2].set(xscale="log", xlabel="share of ‖H̃‖² on its diagonal", ylabel="held-out loss / wanda's")
    panels[2].set_title("auto+cg, every matrix")
    for axis, kind in zip(panels[3:], SWEPT, strict=True):
        points_of = [point for point in numbers["sweep"] if point["kind"] == kind]
        for index, contender in enumerate(CONTENDERS[1:]):
            ratios = [math.exp(-gain(point["losses"], contender)) for point in points_of]
            shares = [point["tokens_per_input"] for point in points_of]
            axis.plot(shares, ratios, label=contender, **results.style(index))
        axis.set(xscale="log", yscale="log", xlabel="tokens / d_in", ylabel="held-out loss / wanda's")
        axis.set_title(f"{kind}, block {numbers['middle']}")
        axis.set_xticks([point["tokens_per_input"] for point in points_of])
        ticks = [digit * 10**power for power in range(-1, 5) for digit in (1, 2, 5)]
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in ticks if low <= tick <= high])
        axis.xaxis.set_major_formatter("{x:.3g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    for axis in panels:
        axis.axhline(1.0, color="black", linestyle=":", label="wanda")
    panels[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[5].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _mean_ratio(matrices: list[dict[str, Any]], contender: str, where: str = "held_out") -> float:
    """Return the geometric mean of loss over Wanda's."""
    return math.exp(-statistics.fmean(gain(matrix["losses"], contender, where=where) for matrix in matrices))


def markdown(numbers: dict[str, Any]) -> str:
    """Return the tables: by kind, by depth, correlations, and by tokens."""
    matrices = numbers["matrices"]
    tables = []
    for key in ("kind", "block"):
        values = list(dict.fromkeys(matrix[key] for matrix in matrices))
        rows = []
        for value in values:
            some = [matrix for matrix in matrices if matrix[key] == value]
            wanda = statistics.fmean(matrix["losses"][BASE]["held_out"] for matrix in some)
            share = statistics.fmean(matrix["diagonal_share"] for matrix in some)
            ratios = [f"{_mean_ratio(some, contender):.3f}" for contender in CONTENDERS[1:]]
            rows.append([str(value), f"{share:.3f}", f"{wanda:.4f}", *ratios])
        for where in ("held_out", "seen"):
            ratios = [f"{_mean_ratio(matrices, contender, where):.3f}" for contender in CONTENDERS[1:]]
            wanda = statistics.fmean(matrix["losses"][BASE][where] for matrix in matrices)
            rows.append([f"all, {where.replace('_', '-')} tokens", "", f"{wanda:.4f}", *ratios])
        tables.append(results.table([key, "diagonal's share", "wanda", *CONTENDERS[1:]], rows))
    correlated = [
        [row["contender"], row["base"], *[f"{row[fact]:+.2f}" for fact in FACTS]] for row in numbers["correlations"]
    ]
    names = [fact.replace("_", " ") for fact in FACTS]
    tables.append(results.table(["gain of", "over", *names], correlated))
    by_tokens = [
        [
            point["kind"],
            f"{point['tokens_per_input']:.2f}",
            f"{point['losses'][BASE]['held_out']:.4f}",
            *[f"{math.exp(-gain(point['losses'], contender)):.3f}" for contender in CONTENDERS[1:]],
        ]
        for point in numbers["sweep"]
    ]
    tables.append(results.table(["matrix", "tokens / d_in", "wanda", *CONTENDERS[1:]], by_tokens))
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    matrices_of_model.add_arguments(parser)
    parser.add_argument("--blocks", nargs="+", type=int, help="which; default: some, spread over the depth")
    parser.add_argument("--depths", type=int, default=6, help="how many blocks to spread over the depth")
    parser.add_argument("--beta", type=float, help="growth of prox-gradient's lambda; 1.01 is the paper's")
    given = parser.parse_args(arguments)
    matrices_of_model.complete(given, samples=(48, 1024), rows=128)
    given.beta = given.beta or (1.01 if given.full else 1.05)
    print(markdown(run(given)))


if __name__ == "__main__":
    main()
