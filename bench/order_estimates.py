"""Which estimate of a layer's loss chooses the better order of channels: what the solvers then really lose.

    python bench/order_estimates.py MODEL --calibration c4.jsonl --blocks 1 8 15 22 28

The inputs of a dense Llama's ``down_proj`` and ``o_proj`` are summed up in some blocks. Each is put into the order that
an estimate chooses, and pruned to 2:4; printed are the relative loss without an order, and times what it becomes.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import halve
from halve.checkpoint.load import load_model, resolve
from halve.maths.gram import GramAccumulator, Statistics
from halve.maths.pattern import Pattern
from halve.model.layers import layer_matrix
from halve.order.choosing import choose_order
from halve.order.folds import Move
from halve.order.saliency import by_unit, saliencies
from halve.text.calibration import Calibration
from halve.text.tokens import TokenSet

PATTERN = Pattern("2:4")
SOLVERS = {
    "sparsegpt": {"method": "sparsegpt", "refit": "none"},
    "auto, fast": {"method": "auto", "effort": "fast"},
    "auto": {"method": "auto"},
}


def damped(gram: Tensor) -> Tensor:
    """Return H with a hundredth of its mean diagonal added."""
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))


ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "w² H_jj": lambda weight, gram: weight.square() * gram.diagonal(),
    "w² / [H⁻¹]_jj": lambda weight, gram: weight.square() / torch.linalg.inv(damped(gram)).diagonal(),
    "their geometric mean": saliencies,
    "|w| √H_jj": lambda weight, gram: weight.abs() * gram.diagonal().sqrt(),
}


def inputs(
    path: Path, calibration: Path, blocks: list[int], samples: int, seq_len: int
) -> dict[str, tuple[Tensor, Statistics]]:
    """Return weights, and statistics of their inputs in the dense model, by name."""
    loaded = load_model(resolve(str(path)), dtype=torch.float32)
    data = Calibration(source=str(calibration), samples=samples, seq_len=seq_len).data(loaded, None)
    if not isinstance(data, TokenSet):
        raise TypeError(type(data))
    model = loaded.model
    names = [f"model.layers.{block}.{kind}" for block in blocks for kind in ("self_attn.o_proj", "mlp.down_proj")]
    weights = {name: layer_matrix(model.get_submodule(name)).detach() for name in names}
    sums = {name: GramAccumulator(weight.shape[1], name=name) for name, weight in weights.items()}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: sums[name].add(args[0]))
    with torch.no_grad():
        for part in torch.split(data.ids, 4):
            model.base_model(part, use_cache=False)
    return {name: (weight, sums[name].finish()) for name, weight in weights.items()}


def main() -> None:
    """Print a line for every matrix and estimate, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    asked = parser.parse_args()
    config = resolve(str(asked.model))
    heads, shared = heads_of(config.path)
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for name, (weight, stats) in inputs(
        asked.model, asked.calibration, asked.blocks, asked.samples, asked.seq_len
    ).items():
        kind = name.rpartition(".")[2]
        units, repeats = (shared, heads // shared) if kind == "o_proj" else (1, 1)
        width = weight.shape[1] // (units * repeats)
        before = {solver: lost(weight, stats.gram, solver) for solver in asked.solvers}
        print(name, {solver: f"{loss:.5f}, {seconds:.1f} s" for solver, (loss, seconds) in before.items()}, flush=True)
        for estimate, of in ESTIMATES.items():
            begun = time.perf_counter()
            laid = by_unit(of(weight, stats.gram), units, repeats)
            order = choose_order(laid, PATTERN, torch.Generator().manual_seed(0))
            seconds = time.perf_counter() - begun
            index = Move("", 1, 0, width, repeats).index(order, weight.shape[1])
            moved, gram = weight[:, index], stats.gram[index][:, index]
            found = {solver: lost(moved, gram, solver)[0] / before[solver][0] for solver in asked.solvers}
            for solver, ratio in found.items():
                ratios.setdefault((kind, solver, estimate), []).append(ratio)
            print(
                f"  {estimate}: {seconds:.1f} s",
                {solver: f"{ratio:.4f}" for solver, ratio in found.items()},
                flush=True,
            )
    for (kind, solver, estimate), every in sorted(ratios.items()):
        print(f"{kind}, {solver}, {estimate}: {sum(every) / len(every):.4f}")


def heads_of(path: Path) -> tuple[int, int]:
    """Return the numbers of query heads and of heads of values."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    return config.num_attention_heads, config.num_key_value_heads


def lost(weight: Tensor, gram: Tensor, solver: str) -> tuple[float, float]:
    """Return the relative loss that a solver leaves, and its seconds."""
    outcome = halve.prune_weight(weight, gram, PATTERN, **SOLVERS[solver])  # type: ignore[arg-type]
    return outcome.facts["relative_loss"], outcome.facts["seconds"]


if __name__ == "__main__":
    main()
