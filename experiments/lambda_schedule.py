r"""Loss against iterations of prox-gradient for every λ0 and β of a grid: what the schedule trades.

    python experiments/lambda_schedule.py SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4-calibration.jsonl

λ_k = λ0 β^k until every group is 2:4; the kept weights are then refitted by conjugate gradients. Matrices of one block,
with statistics of the dense model's own inputs. The paper's defaults are λ0 = 0.01 and β = 1.01, and 0.001 and 1.005
for models of 70B parameters; its λ has the layer's units, Halve's is relative to the row's mean magnitude. Small size:
128 rows of each of four matrices, 32 sequences of 512 tokens. ``--full``: all rows, 128 sequences of 2048.
"""

from itertools import product
from typing import Any

from matplotlib.figure import Figure

import halve
import matrices_of_model
import results

NAME = "lambda_schedule"
LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0)
BETAS = (1.005, 1.01, 1.02, 1.05, 1.1, 1.2)
KINDS = ("q_proj", "o_proj", "gate_proj", "down_proj")
DEFAULTS = ((0.01, 1.01), (0.001, 1.005))
"""The paper's pairs, for models below and at 70B parameters."""
_MOST_ITERATIONS = 20000


def run(given: Any) -> dict[str, Any]:
    """Prune every chosen matrix with every schedule, writing after every matrix.

    Returns:
        dict[str, Any]: ``matrices``, each with ``kind``, ``shape`` and ``runs``: ``lambda0``, ``beta``, ``iterations``
            (of the slowest row), ``row_iterations`` (mean over rows), ``loss`` (relative, after the refit) and
            ``loss_before_refit``.
    """
    loaded, ids = matrices_of_model.load(given)
    found = matrices_of_model.matrices_of_model(loaded.model, ids, [given.block], rows=given.rows, device=given.device)
    numbers: dict[str, Any] = {
        "model": str(given.model).rpartition("/")[2],
        "block": given.block,
        "tokens": ids.numel(),
        "rows": given.rows,
        "matrices": [],
    }
    for matrix in found:
        if matrix.kind not in given.kinds:
            continue
        runs = []
        for lambda0, beta in product(given.lambdas, given.betas):
            facts = halve.prune_weight(
                matrix.weight,
                matrix.fitted,
                "2:4",
                "prox-gradient",
                "cg",
                lambda0=lambda0,
                beta=beta,
                max_iterations=_MOST_ITERATIONS,
            ).facts
            runs.append(
                {
                    "lambda0": lambda0,
                    "beta": beta,
                    "iterations": int(facts["iterations"]),
                    "row_iterations": facts["row_iterations"],
                    "loss": facts["relative_loss"],
                    "loss_before_refit": facts["relative_loss_before_refit"],
                }
            )
            print(matrix.name, runs[-1], flush=True)
        numbers["matrices"].append({"kind": matrix.kind, "shape": list(matrix.weight.shape), "runs": runs})
        results.save(NAME, numbers, None, given.out)
    results.save(NAME, numbers, picture(numbers), given.out)
    return numbers


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw loss against iterations, a panel a matrix and a line a λ0, the paper's two schedules ringed."""
    count = len(numbers["matrices"])
    figure, panels = results.axes(min(2, count), -(-count // 2), width=5.2, height=3.6)
    for axis, matrix in zip(panels, numbers["matrices"], strict=False):
        lambdas = sorted({run["lambda0"] for run in matrix["runs"]})
        for index, lambda0 in enumerate(lambdas):
            points = sorted((run["iterations"], run["loss"]) for run in matrix["runs"] if run["lambda0"] == lambda0)
            axis.plot(*zip(*points, strict=True), label=f"λ0 = {lambda0:g}", **results.style(index))
        for (lambda0, beta), edge in zip(DEFAULTS, ("solid", "dotted"), strict=True):
            ringed = [run for run in matrix["runs"] if (run["lambda0"], run["beta"]) == (lambda0, beta)]
            if ringed:
                axis.scatter(
                    [run["iterations"] for run in ringed],
                    [run["loss"] for run in ringed],
                    s=160,
                    facecolors="none",
                    edgecolors="black",
                    linestyles=edge,
                    zorder=5,
                    label=f"the paper's λ0 = {lambda0:g}, β = {beta:g}",
                )
        title = f"{matrix['kind']}, block {numbers['block']}, {matrix['shape'][0]} rows of {matrix['shape'][1]}"
        axis.set(xscale="log", title=title, xlabel="iterations", ylabel="relative loss after refit")
    betas = sorted({run["beta"] for run in numbers["matrices"][0]["runs"]})
    figure.suptitle(
        f"along a line, from the left: β = {', '.join(f'{beta:g}' for beta in reversed(betas))}", fontsize=10
    )
    results.legend_below(figure, panels[0])
    return figure


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of loss and iterations: a row a schedule, a column a matrix; losses are relative to the best."""
    matrices = numbers["matrices"]
    schedules = [(run["lambda0"], run["beta"]) for run in matrices[0]["runs"]]
    rows = []
    for place, (lambda0, beta) in enumerate(schedules):
        mark = " (paper)" if (lambda0, beta) in DEFAULTS else ""
        cells = []
        for matrix in matrices:
            run, best = matrix["runs"][place], min(run["loss"] for run in matrix["runs"])
            cells.append(f"{run['loss'] / best:.3f} in {run['iterations']}")
        rows.append([f"{lambda0:g}", f"{beta:g}{mark}", *cells])
    rows.append(["best", "", *[f"{min(run['loss'] for run in matrix['runs']):.5f}" for matrix in matrices]])
    return results.table(["λ0", "β", *[matrix["kind"] for matrix in matrices]], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    matrices_of_model.add_arguments(parser)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--lambdas", nargs="+", type=float, default=list(LAMBDAS))
    parser.add_argument("--betas", nargs="+", type=float, default=list(BETAS))
    given = parser.parse_args(arguments)
    matrices_of_model.complete(given, samples=(32, 128), rows=128)
    print(markdown(run(given)))


if __name__ == "__main__":
    main()
