"""What is left of an adapter once it is merged into a pruned model: stock LoRA, masked and fitted; masked LoRA; HiRA.

    python bench/adapters.py ../shared/data/stories260k [--steps 300 --rank 8]

The model is pruned to 2:4, each adapter is trained on text that the dense model has written itself, and perplexity is
that of other such text. A stock adapter is trained on the pruned model, and computes with all zeros filled; then it is
merged by `halve merge` without calibration text and with it. The others are trained with the mask, and merged exactly.
"""

import argparse
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import halve
from halve.text.generation import sample_text

LENGTH, ROWS = 256, 16


def loaded(path: Path) -> Any:
    """Return a model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def loss(model: Any, ids: Tensor) -> Tensor:
    """Return the mean loss of a token."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Return the perplexity of rows of tokens."""
    model.eval()
    batches = torch.split(ids, ROWS)
    return math.exp(sum(float(loss(model, rows)) for rows in batches) / len(batches))


def train(model: Any, ids: Tensor, steps: int, rate: float) -> None:
    """Train what requires gradients, along a cosine."""
    optimiser = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for step in range(steps):
        optimiser.zero_grad()
        rows = torch.arange(step * ROWS, (step + 1) * ROWS) % len(ids)
        loss(model, ids[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()


def main() -> None:
    """Print perplexities."""
    import peft

    from halve.learning.lora import MaskedLoraConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    dense = loaded(given.model).eval()
    begin = torch.full((1024 + 64, 1), 1)
    text = sample_text(dense, begin, LENGTH, dense.config.vocab_size, torch.Generator().manual_seed(0))
    training, held_out = text[:-64], text[-64:]
    ways: dict[str, dict[str, Any]] = {"merged": {}, "fitted": {"calibration": training[:128]}}
    common: dict[str, Any] = {"r": given.rank, "target_modules": "all-linear"}
    configs = {
        "stock LoRA": peft.LoraConfig(lora_alpha=given.rank, **common),
        "masked LoRA": MaskedLoraConfig(lora_alpha=given.rank, **common),
        "HiRA": peft.HiraConfig(**common),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        halve.prune(given.model, place / "pruned", calibration=training[:128])
        print(f"dense {perplexity(dense, held_out):.3f}, pruned {perplexity(loaded(place / 'pruned'), held_out):.3f}")
        for name, config in configs.items():
            torch.manual_seed(0)
            model = peft.get_peft_model(loaded(place / "pruned"), config)
            train(model, training, given.steps, given.rate)
            print(f"{name}: as trained {perplexity(model, held_out):.3f}", end="", flush=True)
            adapter = place / f"{name} adapter"
            model.save_pretrained(str(adapter))
            for how, options in ways.items():
                if how == "fitted" and name != "stock LoRA":
                    continue
                merged = halve.merge(adapter, place / "pruned", place / f"{name} {how}", **options)
                print(f", {how} {perplexity(loaded(merged.out), held_out):.3f}", end="")
            print()


if __name__ == "__main__":
    main()
