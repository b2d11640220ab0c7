"""Channels that pass norms and convolutions: found without a name, and held to what the dense model computes."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from halve.order.chains import find_chains
from halve.order.folds import Move, permute, random_order
from halve.order.proving import is_proven
from models import convnext, decoder, resnet, tokens
from order_trials import Scaled, first, trials


def alive(model):
    """Give norms, and what a new model has at one value, numbers that tell channels apart."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.std() == 0:
            low = 0.5 if name.endswith(("weight", "running_var", "scale")) else -0.5
            tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def pictures(channels=1, side=16):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(2, channels, side, side, generator=generator)} for _ in range(2)]


def bottleneck():
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, layer_type="bottleneck", num_labels=10))


def convnext_v2():
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}
    return tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(**sizes, num_labels=10))


def regnet():
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8}
    return tf.RegNetForImageClassification(tf.RegNetConfig(**sizes, layer_type="y", num_labels=10))


def bitnet():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.BitNetForCausalLM(tf.BitNetConfig(**sizes, num_key_value_heads=2, vocab_size=128, **ENDS))


ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Inverted(nn.Module):
    """A block as MobileNet has it: widened, convolved channel by channel, gated, scaled, narrowed."""

    def __init__(self, width=16, wide=32):
        super().__init__()
        self.expand = nn.Conv2d(width, wide, 1, bias=False)
        self.first = nn.BatchNorm2d(wide)
        self.depth = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.second = nn.BatchNorm2d(wide)
        self.squeeze = nn.Conv2d(wide, 8, 1)
        self.excite = nn.Conv2d(8, wide, 1)
        self.project = nn.Conv2d(wide, width, 1)
        self.last = nn.BatchNorm2d(width)

    def forward(self, hidden):
        wide = torch.relu_(self.second(self.depth(torch.relu_(self.first(self.expand(hidden))))))
        gate = self.excite(torch.relu(self.squeeze(wide.mean((2, 3), keepdim=True)))).sigmoid()
        return hidden + self.last(self.project(wide * gate))


class Mobile(nn.Module):
    """A classifier of such blocks."""

    def __init__(self, block=Inverted):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, pixel_values):
        hidden = self.stem(pixel_values)
        for block in self.blocks:
            hidden = block(hidden)
        return (self.head(hidden.mean((2, 3))),)


def mobile(block=Inverted):
    torch.manual_seed(0)
    return Mobile(block)


TEXT = [{"input_ids": tokens(2)}, {"input_ids": tokens(1, seed=1)}]
MODELS = {
    "resnet": (resnet, pictures(), 2),
    "bottleneck": (bottleneck, pictures(side=32), 4),
    "convnext": (convnext, pictures(), 2),
    "convnext v2": (convnext_v2, pictures(), 2),
    "regnet": (regnet, pictures(side=32), 2),
    "mobile": (mobile, pictures(), 1),
    "bitnet": (bitnet, TEXT, 1),
}


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_what_is_found_is_proven_and_leaves_the_whole_model_as_it_was(family):
    make, batches, at_least = MODELS[family]
    model = alive(make())
    found = []
    for name, trial, consumers in trials(model, batches):
        folds = find_chains(trial, consumers, (), seed=0)
        assert all(is_proven(trial, fold, torch.Generator().manual_seed(1)) for fold in folds), name
        assert len(folds) >= at_least
        found += [(name, fold) for fold in folds]
    exact = copy.deepcopy(model).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batches[0].items()}
    wanted, near = exact(**inputs)[0], model(**batches[0])[0]
    for number, (name, fold) in enumerate(found):
        order = random_order(fold.units, fold.width, torch.Generator().manual_seed(number))
        for each in (model, exact):
            permute(each.get_submodule(name), fold, order)
            assert not torch.equal(order, torch.arange(fold.width).expand_as(order))
    rounding = 1e-6 if family == "bitnet" else 1e-11  # its norms are computed in float32
    assert float((exact(**inputs)[0] - wanted).norm() / wanted.norm()) < rounding
    assert float((model(**batches[0])[0] - near).norm() / near.norm()) < 1e-5


def test_all_that_is_on_the_way_moves():
    trial, _ = first(alive(mobile()), pictures())
    folds = {fold.consumer: fold for fold in find_chains(trial, ["project.weight", "squeeze.weight"], (), seed=0)}
    norms = [f"{norm}.{leaf}" for norm in ("first", "second") for leaf in ("weight", "bias", *STATISTICS)]
    made = ["expand.weight", "depth.weight", "depth.bias", *norms, "excite.weight", "excite.bias"]
    read = [Move("project.weight", 1, 0, 32), Move("squeeze.weight", 1, 0, 32)]
    assert folds.keys() == {"project.weight"}  # the larger of the two that read the same channels
    assert folds["project.weight"].moves[0] == read[0]
    assert set(folds["project.weight"].moves) == {*read, *(Move(name, 0, 0, 32) for name in made)}


STATISTICS = ("running_mean", "running_var")


def test_the_response_norm_of_convnext_moves_along_its_last_dimension():
    trial, _ = first(alive(convnext_v2()), pictures())
    (fold, _) = find_chains(trial, ["layers.0.pwconv2.weight", "layers.1.pwconv2.weight"], (), seed=0)
    assert {move for move in fold.moves if "grn" in move.parameter} == {
        Move("layers.0.grn.weight", 3, 0, 64),
        Move("layers.0.grn.bias", 3, 0, 64),
    }


def test_a_fold_that_forgets_one_part_is_not_proven():
    trial, _ = first(alive(mobile()), pictures())
    (fold,) = find_chains(trial, ["project.weight"], (), seed=0)
    assert is_proven(trial, fold, torch.Generator().manual_seed(0))
    weights = copy.deepcopy(trial.block.state_dict())
    for left_out in fold.moves:
        fewer = tuple(move for move in fold.moves if move != left_out)
        wrong = type(fold)(fold.consumer, fold.units, fold.width, fewer)
        assert not is_proven(trial, wrong, torch.Generator().manual_seed(0)), left_out
    assert all(torch.equal(weights[name], value) for name, value in trial.block.state_dict().items())


def test_what_is_fixed_does_not_move():
    trial, _ = first(alive(mobile()), pictures())
    for fixed in ("second.running_var", "depth.weight", "squeeze.weight", "expand.weight"):
        assert not find_chains(trial, ["project.weight"], {fixed}, seed=0)


def test_outer_channels_of_a_residual_stay():
    for name, trial, consumers in trials(alive(bottleneck()), pictures(side=32)):
        folds = find_chains(trial, consumers, (), seed=0)
        assert not any(".layer.0." in fold.consumer for fold in folds), name
        assert not any("shortcut" in move.parameter for fold in folds for move in fold.moves)


class Telling(Inverted):
    """A block that treats a channel otherwise by its place, with no number for it."""

    def forward(self, hidden):
        wide = self.depth(torch.relu(self.expand(hidden)))
        return hidden + self.project(wide * torch.linspace(0.5, 2.0, wide.shape[1])[:, None, None])


class Grouped(Inverted):
    """A block whose middle convolution sees groups of channels."""

    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=4)

    def forward(self, hidden):
        return hidden + self.project(torch.relu(self.depth(torch.relu(self.expand(hidden)))))


class Leaking(Inverted):
    """A block that returns what is between its layers as well."""

    def forward(self, hidden):
        wide = self.first(self.expand(hidden))
        return hidden + self.project(torch.relu(wide)) + 0.1 * wide.mean(1, keepdim=True) + wide[:, :16]


def test_channels_told_apart_by_their_place_are_not_proven():
    trial, _ = first(alive(mobile(Telling)), pictures())
    (fold,) = find_chains(trial, ["project.weight"], (), seed=0)
    assert not is_proven(trial, fold, torch.Generator().manual_seed(0))


def test_outputs_of_a_grouped_convolution_stay_in_their_group_and_its_inputs_where_they_are():
    trial, _ = first(alive(mobile(Grouped)), pictures())
    (fold,) = find_chains(trial, ["project.weight", "depth.weight"], (), seed=0)
    assert (fold.consumer, fold.units, fold.width) == ("project.weight", 4, 8)
    assert {move.parameter for move in fold.moves} == {"project.weight", "depth.weight", "depth.bias"}
    assert is_proven(trial, fold, torch.Generator().manual_seed(0))
    across = type(fold)(fold.consumer, 1, 32, tuple(Move(m.parameter, m.dim, 0, 32) for m in fold.moves))
    assert not is_proven(trial, across, torch.Generator().manual_seed(0))


def test_what_leaves_the_block_is_no_fold():
    trial, _ = first(alive(mobile(Leaking)), pictures())
    assert not find_chains(trial, ["project.weight"], (), seed=0)


def test_a_scale_of_channels_moves_along():
    model = decoder("opt")
    for layer in model.model.decoder.layers:
        layer.activation_fn = Scaled(64)
    trial, _ = first(model, TEXT)
    (fold,) = find_chains(trial, ["fc2.weight"], (), seed=0)
    assert Move("activation_fn.scale", 0, 0, 64) in fold.moves
    assert is_proven(trial, fold, torch.Generator().manual_seed(0))


def test_a_norm_over_heads_leaves_values_where_they_are():
    """BitNet's norm between attention and its output layer moves with no head's order: the layer stays as it is."""
    trial, folds = first(alive(bitnet()), TEXT)
    consumer = "self_attn.o_proj.weight"
    assert consumer not in folds
    assert not find_chains(trial, [consumer], (), seed=0)
