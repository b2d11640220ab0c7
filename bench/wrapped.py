"""A language model as the text tower of an image-text model, pruned and measured beside the same model alone.

    python bench/wrapped.py MODEL --calibration FILE --data FILE

Both are given the same tokens, so masks and perplexities must be the same: what differs is only the wrapper, whose
forward passes its arguments on without naming them.
"""

import argparse
from typing import Any

import torch
import transformers

import halve
from halve.checkpoint.load import load_model
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.text.calibration import Calibration


def wrapped(model: Any) -> Any:
    """Return a LLaVA with a small random vision tower, whose text tower has the weights of a Llama."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=model.config)
    made = transformers.LlavaForConditionalGeneration(config).to(model.dtype).eval()
    made.model.language_model.load_state_dict(model.model.state_dict())
    made.lm_head.load_state_dict(model.lm_head.state_dict())
    return made


def main() -> None:
    """Prune both with wanda, and print their perplexities and the share of weights whose mask differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Llama: a directory, a .gguf file or a hub id")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    tokens = Calibration(arguments.calibration, arguments.samples, arguments.seq_len).text_tokens(loaded)
    (text,) = evaluation_texts(
        loaded, [arguments.data], seq_len=arguments.seq_len, max_windows=arguments.windows, text_field="text"
    )
    models = {"alone": loaded.model, "wrapped": wrapped(loaded.model)}
    for name, model in models.items():
        print(f"{name}, dense: {perplexity(model, text, forward_dtype='float32').value:.4f}", flush=True)
        halve.prune(model, calibration=tokens, method="wanda", refit="none", forward_dtype="float32")
        print(f"{name}, wanda: {perplexity(model, text, forward_dtype='float32').value:.4f}", flush=True)
    pairs = zip(
        models["alone"].model.layers.parameters(),
        models["wrapped"].model.language_model.layers.parameters(),
        strict=True,
    )
    differ = total = 0
    for one, other in pairs:
        differ += int(torch.count_nonzero((one == 0) != (other == 0)))
        total += one.numel()
    print(f"masks differ at {differ} of {total} weights")


if __name__ == "__main__":
    main()
