"""Prune one linear layer of a model in a loop of your own: gather its inputs, solve, write the weights back.

python examples/one_matrix.py [MODEL] [--layer NAME]

MODEL is a directory, a hub id or a .gguf file. What Halve needs of a layer is its weight matrix (d_out, d_in), and H,
the mean of x xᵀ over the inputs x that it sees.
"""

import argparse
from typing import Any

import torch
from torch import nn

import halve

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it would do such a thing. " * 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layer", help="the name of a linear layer; the first one if left out")
    options = parser.parse_args()

    loaded: Any = halve.load(options.model)
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear)}
    name = options.layer or next(iter(layers))
    layer = layers[name]

    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        loaded.model(**loaded.tokenizer(TEXT, return_tensors="pt"))
    hook.remove()
    x = torch.cat(inputs).float()  # (tokens, d_in)
    gram = x.T @ x / len(x)

    print(f"{name}: {tuple(layer.weight.shape)}, {len(x)} tokens; loss relative to the layer's output, by method:")
    for method in ("magnitude", "wanda", "sparsegpt", "prox-gradient", "auto"):
        outcome = halve.prune_weight(layer.weight.detach(), gram, "2:4", method=method, refit="cg")
        print(f"  {method:<14} {outcome.facts['relative_loss']:.4f}  ({outcome.status.name})")
    with torch.no_grad():
        layer.weight.copy_(outcome.weight)  # the last method's
    print(f"in the model now: 2:4 holds = {halve.Pattern('2:4').satisfied_by(layer.weight.detach())}")


if __name__ == "__main__":
    main()
