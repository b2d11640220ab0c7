"""Perplexity and layer loss of every method on a real model, on the same calibration set and texts.

    python bench/end_to_end.py MODEL --calibration c4-calibration.jsonl --data c4-validation.jsonl --data wikitext2.txt

Each method prunes its own copy, block by block; one JSON object a line, the record of `halve compare --json` with one
row, is appended as soon as a method is finished.
"""

import argparse
import json
import time
from pathlib import Path

import halve

METHODS = (
    "magnitude,wanda,wanda+cg,sparsegpt,sparsegpt+cg,alps+cg,prox-gradient,prox-gradient+gd,prox-gradient+cg,"
    "auto+cg,auto+cg+block"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=1.01, help="of prox-gradient")
    parser.add_argument("--effort", default="balanced", help="of auto")
    parser.add_argument("--epochs", type=int, default=6, help="of the block reconstruction")
    parser.add_argument("--forward-dtype", default="auto")
    parser.add_argument("--json", type=Path, default=Path("end_to_end.jsonl"))
    arguments = parser.parse_args()

    every = {
        "prox-gradient": {"beta": arguments.beta},
        "auto": {"effort": arguments.effort},
        "block": {"epochs": arguments.epochs},
    }
    options = {name: values for name, values in every.items() if name in arguments.methods}
    compared = halve.compare(
        arguments.model,
        arguments.data,
        methods=arguments.methods.split(","),
        method_options=options,
        calibration=arguments.calibration,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        eval_max_windows=arguments.windows,
        forward_dtype=arguments.forward_dtype,
    )
    for row in compared:
        entry = compared.as_json()
        entry["rows"] = entry["rows"][-1:]
        entry |= {
            "options": options,
            "forward_dtype": arguments.forward_dtype,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with arguments.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        scores = row.error or "  ".join(f"{Path(p.source).name} {p.value:9.2f}" for p in row.perplexities)
        loss = "" if row.mean_relative_loss is None else f"  mean relative loss {row.mean_relative_loss:.4f}"
        print(f"{row.name:20s} {scores}{loss}  {row.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
