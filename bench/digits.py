"""Top-1 of small image classifiers on scikit-learn's handwritten digits, dense and pruned to 2:4, by method.

    python bench/digits.py WORK
    python bench/digits.py WORK --models convnext,vit --seeds 0,1,2 --methods wanda,auto --pattern 2:4

Everything is made under WORK: the 1797 digits of 8 x 8 pixels as PNG files, a folder for each class, 1200 to train and
calibrate on and 597 held out; and for every seed a ConvNeXt, a ViT and a ResNet, trained here, as Hugging Face
checkpoints with their image processors. Then each is pruned as a user would, from the folder of pictures, and judged on
the held-out folder. Models that are there already are not trained again.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

import halve
from halve.evaluation.top_one import TopOne
from halve.run.contender import Contender

METHODS = ("magnitude", "wanda", "sparsegpt", "auto+cg", "auto+cg+block")
TRAINED_ON = 1200
_BATCH, _RATE = 64, 3e-3
_NAMES = {number: str(number) for number in range(10)}


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write the digits as PNG files under ``train/CLASS`` and ``test/CLASS``, and return the two folders."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    train, test = folder / "train", folder / "test"
    if train.is_dir() and test.is_dir():
        return train, test
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for place, number in enumerate(order):
        shade = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
        picture = (train if place < TRAINED_ON else test) / str(digits.target[number]) / f"{number:04d}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade).save(picture)
    return train, test


def convnext() -> Any:
    """Return an untrained ConvNeXt of two stages."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    widths: dict[str, Any] = {
        "hidden_sizes": [16, 16],
        "depths": [1, 1],
        "num_stages": 2,
        "layer_scale_init_value": 1.0,
    }
    return ConvNextForImageClassification(ConvNextConfig(image_size=8, patch_size=2, id2label=_NAMES, **widths))


def vit() -> Any:
    """Return an untrained vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, id2label=_NAMES, **sizes))


def resnet() -> Any:
    """Return an untrained ResNet of two stages; its stem makes pictures four times smaller, so they are enlarged."""
    from transformers import ResNetConfig, ResNetForImageClassification

    widths: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(id2label=_NAMES, **widths))


MODELS: dict[str, tuple[Callable[[], Any], int]] = {"convnext": (convnext, 8), "vit": (vit, 8), "resnet": (resnet, 16)}
"""How each model is made, and the pixels on a side that it is shown."""


def train_checkpoint(name: str, pictures: Path, out: Path, *, seed: int, epochs: int) -> None:
    """Train a model, and write it with its image processor.

    Args:
        name: in `MODELS`.
        pictures: folder with a folder for each class.
        out: directory of the checkpoint.
        seed: of the weights and of the order of the pictures.
        epochs: passes over the pictures.
    """
    from PIL import Image
    from transformers import ViTImageProcessorPil

    make, side = MODELS[name]
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    files = sorted(pictures.glob("*/*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([int(file.parent.name) for file in files])
    torch.manual_seed(seed)
    model = make().train()
    steps = math.ceil(len(files) / _BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(files)), _BATCH):
            loss = F.cross_entropy(model(pixel_values=pixels[batch]).logits, labels[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)


def pruned_top_one(model: Path, pictures: tuple[Path, Path], method: str, seed: int, options: Any) -> TopOne:
    """Prune a checkpoint, calibrated on training pictures, and return its top-1 on those held out."""
    contender = Contender.parse(method)
    pruned = halve.prune(
        model,
        pattern=options.pattern,
        method=contender.method,
        refit=contender.refit,
        reconstruct="block" if contender.reconstruct else "none",
        calibration=pictures[0],
        samples=options.samples,
        seed=seed,
        image_evaluation=halve.ImageEvaluation(pictures[1]),
    )
    if pruned.top_one_after is None:
        raise RuntimeError("; ".join(pruned.notes))
    return pruned.top_one_after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()

    pictures = write_digits(options.work / "digits")
    methods, seeds = options.methods.split(","), [int(seed) for seed in options.seeds.split(",")]
    print(f"| model | seed | dense | {' | '.join(methods)} |\n|---|---|---|{'---|' * len(methods)}", flush=True)
    for name in options.models.split(","):
        rows = []
        for seed in seeds:
            model = options.work / f"{name}-{seed}"
            if not (model / "preprocessor_config.json").exists():
                train_checkpoint(name, pictures[0], model, seed=seed, epochs=options.epochs)
            scores = [halve.top_one(model, pictures[1])]
            scores += [pruned_top_one(model, pictures, method, seed, options) for method in methods]
            rows.append([100 * score.value for score in scores])
            print(f"| {name} | {seed} | {' | '.join(f'{value:.2f}' for value in rows[-1])} |", flush=True)
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        print(f"| {name} | mean | {' | '.join(f'{value:.2f}' for value in means)} |", flush=True)


if __name__ == "__main__":
    main()
