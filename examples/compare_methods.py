"""Compare pruning methods on one model, one calibration set and one text: a row each, the dense model first.

python examples/compare_methods.py MODEL CALIBRATION EVALUATION

A name alone is the method as published; ``+cg`` lets the kept weights be fitted again afterwards, and ``+block`` tunes
each block against the dense model's.
"""

import argparse

import halve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("calibration", nargs="?", default="c4")
    parser.add_argument("evaluation", nargs="?", default="wikitext2")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "auto+cg"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()

    rows = halve.compare(
        options.model,
        data=[options.evaluation],
        methods=options.methods,
        calibration=options.calibration,
        samples=options.samples,
        seq_len=options.seq_len,
    )
    for row in rows:
        if row.error:
            print(f"{row.name:<20} failed: {row.error}")
            continue
        loss = "" if row.mean_relative_loss is None else f"mean relative loss {row.mean_relative_loss:.4f}, "
        print(f"{row.name:<20} perplexity {row.perplexities[0].value:8.2f}, {loss}{row.seconds:.0f} s of pruning")


if __name__ == "__main__":
    main()
