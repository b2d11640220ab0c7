"""Models of convolutions, pruned from disk to disk: what is written, checked, packed, kept in training."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

import halve
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.verification import check
from models import convnext, resnet, save

PATTERN = Pattern("2:4")


def pictures(batches=2):
    return [{"pixel_values": torch.randn(6, 1, 16, 16)} for _ in range(batches)]


def in_pattern(weight):
    """Whether every tap of a convolution, or a matrix, has at most two of every four inputs; read off one by one."""
    rows = weight.unsqueeze(-1).unsqueeze(-1) if weight.ndim == 2 else weight
    return all(
        int((rows[k, first : first + 4, i, j] != 0).sum()) <= 2
        for k in range(rows.shape[0])
        for first in range(0, rows.shape[1], 4)
        for i in range(rows.shape[2])
        for j in range(rows.shape[3])
    )


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A ResNet on disk, and what pruning makes of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("resnet")
    source = save(resnet(), folder / "dense")
    done = halve.prune(source, folder / "pruned", calibration=pictures(), method="sparsegpt", batch_norm="keep")
    return source, done


def test_a_resnet_is_pruned_along_its_channels(pruned):
    source, done = pruned
    model = AutoModelForImageClassification.from_pretrained(done.out)
    names = {matrix.parameter for matrix in done.report.matrices}
    assert len(names) == 9
    assert {matrix.layout for matrix in done.report.matrices} == {"conv"}
    dense = AutoModelForImageClassification.from_pretrained(source)
    for name, parameter in model.named_parameters():
        if name in names:
            assert in_pattern(parameter)
            assert float((parameter == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        else:
            assert torch.equal(parameter, dense.get_parameter(name))


def test_the_solver_knows_the_patches(pruned):
    """With the inputs' statistics the outputs are nearer than by magnitude alone."""
    source, done = pruned
    x = pictures(1)[0]
    dense = AutoModelForImageClassification.from_pretrained(source)
    plain = halve.prune(source, None, calibration=pictures(), method="magnitude", refit="none").model
    with torch.no_grad():
        wanted, ours, theirs = (model.eval()(**x).logits for model in (dense, done.model, plain))
    assert (ours - wanted).norm() < 0.7 * (theirs - wanted).norm()


def test_check_knows_convolutions(pruned, tmp_path):
    source, done = pruned
    found = check(done.out, against=source)
    assert found.ok, found.problems
    assert found.matrices == 9
    assert found.sparsity == pytest.approx(0.5, abs=0.01)
    model = AutoModelForImageClassification.from_pretrained(done.out)
    weight = model.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight
    bare = save(model, tmp_path / "bare")
    found = check(bare, pattern="2:4")  # without a record the pattern tells
    assert found.ok
    assert found.matrices == 9
    with torch.no_grad():
        weight[0, :4, 0, 0] = 1.0
    found = check(save(model, tmp_path / "broken"), pattern="2:4")
    assert found.matrices == 8
    assert "1 matrix is not 2:4" in " ".join(found.notes)


def test_packing_leaves_convolutions_dense(pruned, tmp_path):
    with pytest.raises(InputError, match="a convolution, for which there is no sparse product"):
        halve.pack(pruned[1].out, tmp_path / "packed")
    source = save(convnext(), tmp_path / "dense")
    out = halve.prune(source, tmp_path / "pruned", calibration=pictures(), method="wanda").out
    packed = halve.pack(out, tmp_path / "mixed")
    assert {"a convolution, for which there is no sparse product"} == set(packed.left_dense.values())
    halve.unpack(tmp_path / "mixed", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_only_where_faster_leaves_no_convolutions_to_prune(pruned):
    with pytest.raises(InputError, match="all that could be pruned are convolutions"):
        halve.prune(pruned[0], None, calibration=pictures(), only_where_faster=0.1)


def test_training_keeps_the_masks_of_convolutions(pruned):
    model = AutoModelForImageClassification.from_pretrained(pruned[1].out).train()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = {name: parameter.detach() == 0 for name, parameter in model.named_parameters()}
    halve.keep_masks(model)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(**pictures(1)[0]).logits, torch.arange(6))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for matrix in pruned[1].report.matrices:
        weight = model.get_parameter(matrix.parameter)
        assert torch.equal(weight == 0, before[matrix.parameter])
        assert in_pattern(weight)


class Residual(nn.Sequential):
    """Layers whose outputs are added to what goes in."""

    def forward(self, x):
        return x + super().forward(x)


class Grouped(nn.Module):
    """Two stages side by side, with convolutions in groups that pad in their own ways."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3)
        self.layer1, self.layer2 = (nn.ModuleList([self.block(), self.block()]) for _ in range(2))

    def block(self):
        return Residual(
            nn.Conv2d(32, 32, 3, padding=1, groups=2, padding_mode="reflect", bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding="same", dilation=2),
        )

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        for block in (*self.layer1, *self.layer2):
            x = block(x)
        return x


@pytest.mark.parametrize("options", [{"method": "wanda"}, {"method": "auto", "effort": "fast", "match_dense": 0.5}])
def test_groups_have_matrices_of_their_own(options):
    torch.manual_seed(0)
    model = Grouped().eval()
    done = halve.prune(model, calibration=pictures(), **options)
    names = [matrix.name for matrix in done.report.matrices if matrix.expert is not None]
    assert names == [f"layer{n}.{b}.0.weight[{g}]" for n in (1, 2) for b in range(2) for g in range(2)]
    assert all(in_pattern(model.get_parameter(matrix.parameter)) for matrix in done.report.matrices)


@pytest.mark.parametrize("reconstruct", ["none", "block"])
def test_a_killed_run_ends_with_the_same_bytes(reconstruct, tmp_path):
    source, data = save(convnext(), tmp_path / "dense"), pictures()
    options = {"calibration": data, "method": "wanda", "reconstruct": reconstruct}
    whole = halve.prune(source, tmp_path / "whole", **options).out

    def stop(step):
        if step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve.prune(source, tmp_path / "cut", listen=stop, **options)
    cut = halve.prune(source, tmp_path / "cut", **options).out
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
