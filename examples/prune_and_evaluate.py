"""Prune a model to 2:4, check what was written, and measure perplexity before and after.

python examples/prune_and_evaluate.py MODEL TEXT [OUT]

MODEL is a directory, a hub id or a .gguf file; TEXT a file to calibrate on, or ``c4``.
"""

import argparse
from pathlib import Path

import halve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("text", nargs="?", default="c4")
    parser.add_argument("out", nargs="?", type=Path, default=Path("pruned"))
    parser.add_argument("--evaluate-on", default="wikitext2", help="never what was calibrated on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()

    pruned = halve.prune(
        options.model,
        options.out,
        pattern="2:4",
        effort="fast",  # "balanced", the default, and "best" take longer and lose less
        calibration=options.text,
        samples=options.samples,
        seq_len=options.seq_len,
    )
    print(f"mean relative loss of the matrices: {pruned.report.mean_relative_loss:.4f}")

    verdict = halve.check(options.out)  # reads the bytes on disk again
    print(f"{verdict.matrices} matrices at {verdict.pattern}, ok = {verdict.ok}")

    for name in (options.model, options.out):
        score = halve.evaluate(name, options.evaluate_on, seq_len=options.seq_len, max_windows=options.windows)
        print(f"{name}: perplexity {score.value:.2f} on {score.windows} windows of {score.seq_len} tokens")


if __name__ == "__main__":
    main()
