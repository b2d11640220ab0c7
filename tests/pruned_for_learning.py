"""What the tests of adapters share: models pruned by magnitude, and a few steps of training."""

import warnings

import torch
from torch.nn.functional import cross_entropy

from halve.maths.pattern import Pattern
from halve.model.layers import is_conv1d, is_linear
from halve.model.masked import pruned_parameters
from models import decoder, tokens

TWO_OF_FOUR = Pattern("2:4")


def pruned_decoder(family="llama", seed=0, **changes):
    """Return a model whose block matrices are 2:4 by magnitude, and the layouts of those by name."""
    model = decoder(family, seed, **changes)
    layouts = {}
    for name, module in model.named_modules():
        if is_linear(module) and name != "lm_head" and "embed" not in name:
            layouts[f"{name}.weight"] = "in_out" if is_conv1d(module) else "out_in"
    for each in pruned_parameters(model, layouts):
        each.tensor.data.copy_(each.inputs_last(TWO_OF_FOUR.project(each.inputs_last(each.tensor.data))))
    return model, layouts


def targets(model, layouts):
    return list(pruned_parameters(model, layouts))


def loss_of(model, ids):
    logits = model(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model, parameters, steps=3, rate=1e-2):
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(model, tokens(2, 12, seed=step)).backward()
        optimiser.step()


def logits(model, seed=50):
    with torch.no_grad():
        return model(input_ids=tokens(2, 12, seed=seed)).logits


def stock(model, directory):
    """Return the model with an adapter as stock peft loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, directory)
