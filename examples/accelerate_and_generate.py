"""Run a pruned model: its pruned layers packed where that is measured to be faster on this machine.

python examples/accelerate_and_generate.py DIRECTORY [PROMPT]

DIRECTORY is what ``halve prune`` wrote. Nothing changes on disk; ``halve.pack`` writes packed files, for less of it.
"""

import argparse
import time
from typing import Any

import torch

import halve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", default="pruned")
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--everything", action="store_true", help="pack all pruned layers, to save memory")
    options = parser.parse_args()

    loaded: Any = halve.load(options.directory)
    prompt = loaded.tokenizer(options.prompt, return_tensors="pt")

    def generate(title: str) -> None:
        begun = time.perf_counter()
        with torch.no_grad():
            ids = loaded.model.generate(**prompt, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=0)
        rate = (ids.shape[1] - prompt["input_ids"].shape[1]) / (time.perf_counter() - begun)
        print(f"{title}, {rate:.1f} tokens/s: {loaded.tokenizer.decode(ids[0], skip_special_tokens=True)!r}")

    generate("dense")
    try:
        done = halve.accelerate(loaded.model, only_where_faster=None if options.everything else 1.0)  # in place
    except halve.HalveError as error:  # where nothing would be faster, nothing is changed
        print(f"stays as it is: {error}")
    else:
        print(done)
        generate("packed")


if __name__ == "__main__":
    main()
