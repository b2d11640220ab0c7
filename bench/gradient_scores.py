"""Scores that weigh gradients beside those that do not, on a small language model and text that it wrote itself.

    python bench/gradient_scores.py MODEL [--pattern 2:4] [--samples 64] [--seq-len 256] [--seeds 3]

For every seed the model writes a calibration set and, once, the text that perplexity is measured on. One line a method:
perplexity over the dense model's, mean and standard deviation over the seeds, and seconds of pruning.
"""

import argparse
import statistics
from collections import defaultdict
from typing import Any

import torch

from halve.checkpoint.load import load_model, resolve
from halve.comparison import Comparison
from halve.run.contender import Contender, make_requests
from halve.text.generation import sample_text
from halve.text.tokens import TokenSet, hash_ids

ROUNDS: tuple[tuple[tuple[str, ...], dict[str, dict[str, Any]]], ...] = (
    (("wanda", "ria", "gblm", "pruner-zero", "wanda++", "sparsegpt"), {"wanda++": {"rounds": 0}}),
    (("gblm", "wanda++"), {"gblm": {"gradient_scale": 1.0}}),
    (("wanda++",), {"wanda++": {"learning_rate": 3e-4}}),
    (("wanda+cg", "gblm+cg", "pruner-zero+cg", "wanda+++cg", "auto+cg"), {"wanda++": {"rounds": 0}}),
)
"""What is compared together: names, and options by method. A name stands once in each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--windows", type=int, default=128)
    arguments = parser.parse_args()
    loaded = load_model(resolve(arguments.model))

    def written(seed: int, samples: int, name: str) -> TokenSet:
        first = torch.full((samples, 1), loaded.model.config.bos_token_id)
        generator = torch.Generator().manual_seed(seed)
        ids = sample_text(loaded.model, first, arguments.seq_len, loaded.model.config.vocab_size, generator)
        return TokenSet(ids, name, hash_ids(ids), samples)

    judged = written(10**6, arguments.windows, "held out")
    sets = [written(seed, arguments.samples, "own text") for seed in range(arguments.seeds)]
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for names, options in ROUNDS:
        contenders = [Contender.parse(name) for name in names]
        requests = make_requests(contenders, options, forward_dtype="float32", pattern=arguments.pattern)
        for calibration in sets:
            dense, *rows = Comparison(loaded, requests, calibration, [judged])
            for contender, row in zip(contenders, rows, strict=True):
                if row.error:
                    raise SystemExit(f"{row.name}: {row.error}")
                given = " ".join(f"{key}={value}" for key, value in options.get(contender.method, {}).items())
                ratio = row.perplexities[0].value / dense.perplexities[0].value
                found[f"{row.name} {given}"].append((ratio, row.seconds))
        for label, scores in found.items():
            ratios, seconds = zip(*scores, strict=True)
            spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
            mean = statistics.mean(ratios)
            print(f"{label:28} {mean:8.3f} ± {spread:.3f}  {statistics.mean(seconds):6.1f} s", flush=True)
        found.clear()


if __name__ == "__main__":
    main()
