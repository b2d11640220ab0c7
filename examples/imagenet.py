"""Prune an image classifier to 2:4 with several methods, from folders of pictures, and measure top-1 of each.

python examples/imagenet.py MODEL TRAIN VALIDATION [--methods wanda,sparsegpt,auto,auto+block]

MODEL is a directory or a hub id: facebook/convnext-tiny-224, facebook/deit-small-patch16-224, microsoft/resnet-50, …
TRAIN and VALIDATION are folders with a folder of pictures for each class, such as ImageNet's (n01440764, …); the
pictures that the model is calibrated on are chosen from TRAIN at random.
"""

import argparse
from pathlib import Path

from transformers import AutoImageProcessor

import halve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--methods", default="wanda,sparsegpt,auto,auto+block", help="+block also tunes the blocks")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=512, help="pictures to calibrate on")
    parser.add_argument("--pictures", type=int, default=None, help="of VALIDATION to measure on; all, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=None, help="write each pruned checkpoint to OUT/METHOD")
    options = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(options.model, backend="pil")  # type: ignore[no-untyped-call]
    dense = halve.top_one(options.model, options.validation, max_images=options.pictures, device=options.device)
    low, high = dense.interval
    print(f"dense: top-1 {100 * dense.value:.2f} % of {dense.pictures} pictures ({100 * low:.2f} to {100 * high:.2f})")
    for name in options.methods.split(","):
        method, _, block = name.partition("+")
        pruned = halve.prune(
            options.model,
            None if options.out is None else options.out / name,
            pattern=options.pattern,
            method=method,
            refit="cg" if method == "auto" else "none",  # wanda and sparsegpt as they were published
            reconstruct="block" if block == "block" else "none",
            calibration=options.train,
            samples=options.samples,
            seed=options.seed,
            device=options.device,
        )
        score = halve.top_one(
            pruned.model,
            options.validation,
            max_images=options.pictures,
            image_processor=processor,
            device=options.device,
        )
        print(f"{name}: top-1 {100 * score.value:.2f} % ({score.minus(dense)})")


if __name__ == "__main__":
    main()
