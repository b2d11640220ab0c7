"""How fast the proximal operator of 2:4 is, beside the usual alternating updates and beside copying the tensor.

    python bench/prox_operator.py [--device cuda] [--json PATH] [--weights N] [--peer-weights N] [--lams L ...]

The peer is what published implementations do, in plain PyTorch: a hundred sweeps of exact updates, one coordinate at a
time, over the whole tensor, the same that everyone else gets; `--peer-weights` gives it a part instead, which is too
kind to it where the part fits the cache and the whole does not. All contenders run in turns in the same process; the
medians are reported.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halve.maths import kernels
from halve.maths.proximal import prox, regulariser

SWEEPS = 100


def alternating_updates(z: Tensor, lam: float, sweeps: int = SWEEPS) -> Tensor:
    """Minimise over one coordinate after another, from z: ``w_i = max(0, |z_i| - lam e_2(the others))``."""
    magnitudes = [plane.contiguous() for plane in z.abs().unbind(-1)]
    w = list(magnitudes)
    for _ in range(sweeps):
        for i in range(4):
            a, b, c = (w[j] for j in range(4) if j != i)
            w[i] = (magnitudes[i] - lam * (a * b + b * c + c * a)).clamp_(min=0)
    return torch.stack(w, dim=-1) * z.sign()


def objective(w: Tensor, z: Tensor, lam: float) -> float:
    difference = w.double() - z.double()
    return float(0.5 * (difference * difference).sum() + lam * regulariser(w.double()).sum())


def median_seconds(
    contenders: dict[str, Callable[[], Tensor]], repeats: int, fewer: dict[str, int]
) -> dict[str, float]:
    """Time the contenders in turns, so that whatever else the machine does falls on all of them.

    Those named in `fewer` run that many of the times only, spread over the turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            wanted = fewer.get(name, repeats)
            if turn and turn * wanted // repeats == (turn - 1) * wanted // repeats:
                continue
            begin = time.perf_counter()
            if run().is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms caches and threads
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--weights", type=int, default=1 << 22, help="N(0, 1) weights in the tensor")
    parser.add_argument("--peer-weights", type=int, help="of them, how many the alternating updates get; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-repeats", type=int, default=3, help="of them, how often the alternating updates run")
    parser.add_argument("--lams", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0, 100.0])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    z = torch.randn(options.weights // 4, 4, generator=torch.Generator().manual_seed(0)).to(options.device)
    kernel = kernels.describe(options.device)
    share = z if options.peer_weights is None else z[: options.peer_weights // 4]
    fewer = {"alternating": min(options.peer_repeats, options.repeats)}
    print(f"{z.numel()} weights, float32, {options.threads} threads, median of {options.repeats}; {kernel}")
    print(f"alternating: {SWEEPS} sweeps over {share.numel()} weights, median of {fewer['alternating']}")
    print(f"{'lam':>6} {'backend':>11} {'M weights/s':>12} {'x alternating':>14} {'x copy time':>12} {'objective':>18}")
    rows = []
    for lam in options.lams:
        contenders: dict[str, Callable[[], Tensor]] = {
            "copy": z.clone,
            "alternating": partial(alternating_updates, share, lam),
            "reference": partial(prox, z, lam, backend="reference"),
        }
        if kernels.available(options.device):
            contenders["native"] = partial(prox, z, lam, backend="native")
        seconds = median_seconds(contenders, options.repeats, fewer)
        speed = {name: (share if name == "alternating" else z).numel() / time for name, time in seconds.items()}
        kept = [name for name in ("reference", "native") if name in contenders]
        lost: dict[str, float] = {name: objective(contenders[name](), z, lam) for name in kept}
        for name, rate in speed.items():
            row = {
                "lam": lam,
                "backend": name,
                "weights_per_second": rate,
                "times_alternating": rate / speed["alternating"],
                "times_the_time_of_a_copy": speed["copy"] / rate,
                "objective": lost.get(name),
            }
            rows.append(row)
            shown = "" if name not in lost else f"{lost[name]:.6f}"
            print(
                f"{lam:>6g} {name:>11} {rate / 1e6:>12.1f} {row['times_alternating']:>14.1f} "
                f"{row['times_the_time_of_a_copy']:>12.1f} {shown:>18}"
            )
    if options.json:
        facts = {
            "weights": z.numel(),
            "peer_weights": share.numel(),
            "threads": options.threads,
            "kernel": kernel,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
