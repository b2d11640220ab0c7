"""Convolutions whose channels were reordered through norms: what is pruned, checked, resumed, and told of it."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import halve
from halve.order.folds import inverse
from halve.recorded import Record, orders_of, read_record
from models import OF_ONE_RUN, convnext, resnet, save

GIVEN = {"method": "sparsegpt", "refit": "none", "permute": "fold", "device": "cpu", "forward_dtype": "float32"}


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(8, 1, 16, 16, generator=generator)} for _ in range(2)]


def contents(directory):
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name not in OF_ONE_RUN
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A ResNet whose norms tell channels apart."""
    model = resnet()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "normalization" in name and tensor.ndim:
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return save(model, tmp_path_factory.mktemp("resnet") / "dense")


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    """The same pruned in another order, its inner layers' makers left dense and its norms as they were."""
    out = tmp_path_factory.mktemp("reordered") / "pruned"
    given = GIVEN | {"skip": ["*.layer.0.convolution*"], "batch_norm": "keep"}
    return halve.prune(dense, out, calibration=pictures(), **given)


def test_the_check_puts_weights_norms_and_statistics_back(dense, pruned):
    found = halve.check(pruned.out, against=dense)
    assert found.ok, found.problems
    ours, theirs = load_file(pruned.out / "model.safetensors"), load_file(dense / "model.safetensors")
    moved = set()
    for channels, moves in orders_of(read_record(pruned.out, Record), pruned.out):
        for move in moves[1:]:
            assert not torch.equal(ours[move.parameter], theirs[move.parameter])
            assert torch.equal(move.applied(ours[move.parameter], inverse(channels)), theirs[move.parameter])
            moved.add(move.parameter.rpartition(".")[2])
    assert moved == {"weight", "bias", "running_mean", "running_var"}
    assert len(read_record(pruned.out, Record).orders) == 4
    assert not pruned.report.norms


@pytest.mark.parametrize("leaf", ["running_var", "weight"])
def test_the_check_tells_of_a_norm_that_was_not_moved(dense, pruned, tmp_path, leaf):
    name = f"resnet.encoder.stages.1.layers.1.layer.0.normalization.{leaf}"
    path = pruned.out / "model.safetensors"
    before = path.read_bytes()
    try:
        save_file({**load_file(path), name: load_file(dense / "model.safetensors")[name]}, path, {"format": "pt"})
        problems = halve.check(pruned.out, against=dense).problems
    finally:
        path.write_bytes(before)
    assert any(name in problem and "go with such" in problem for problem in problems)


def test_the_dense_model_in_the_new_order_is_the_same_function(dense, pruned):
    model = AutoModelForImageClassification.from_pretrained(dense).double().eval()
    x = pictures()[0]["pixel_values"].double()
    with torch.no_grad():
        before = model(x).logits
        state = model.state_dict()
        for channels, moves in orders_of(read_record(pruned.out, Record), pruned.out):
            for move in moves:
                state[move.parameter].copy_(move.applied(state[move.parameter], channels))
        torch.testing.assert_close(model(x).logits, before, rtol=1e-10, atol=1e-12)


def test_how_many_folds_came_of_it_is_told(pruned):
    assert (pruned.report.folds_found, pruned.report.folds_proven) == (4, 4)
    record = json.loads((pruned.out / "halve.json").read_text())
    assert record["folds"] == {"found": 4, "proven": 4, "lowered": 4}
    page = (pruned.out / "report.html").read_text()
    assert "Of 4 folds that were found 4 were proven" in page[: page.index("Every matrix was pruned")]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_reordered_convolutions_lose_less(dense, pruned, method):
    lost = {}
    for order in ("none", "fold"):
        given = GIVEN | {"permute": order, "method": method, "batch_norm": "keep"}
        report = halve.prune(dense, calibration=pictures(), **given).report
        lost[order] = sum(m.facts["relative_loss"] for m in report.matrices if ".layer.1." in m.name)
    assert lost["fold"] < 0.97 * lost["none"]


@pytest.mark.parametrize("batch_norm", ["keep", "estimate"])
def test_a_run_that_was_stopped_comes_to_the_same_bytes(dense, tmp_path, batch_norm):
    given = GIVEN | {"batch_norm": batch_norm, "refit": "cg"}
    whole = halve.prune(dense, tmp_path / "one", calibration=pictures(), **given)

    def stop(step):
        if step.block == 1 and step.phase == "reorder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve.prune(dense, tmp_path / "other", calibration=pictures(), listen=stop, **given)
    again = halve.prune(dense, tmp_path / "other", calibration=pictures(), **given)
    assert again.report.resumed_blocks == 1
    assert (again.report.norms, again.report.folds_found) == (whole.report.norms, whole.report.folds_found)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert halve.check(tmp_path / "other", against=dense).ok


@pytest.mark.parametrize("version", [1, 2])
def test_both_convnexts_are_reordered_and_checked(tmp_path, version):
    if version == 1:
        model = convnext()
    else:
        torch.manual_seed(0)
        sizes = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}
        model = tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(**sizes, num_labels=10)).eval()
        for name, parameter in model.named_parameters():
            if "grn" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    dense = save(model, tmp_path / "dense")
    done = halve.prune(dense, tmp_path / "pruned", calibration=pictures(), **GIVEN)
    assert [order.fold.consumer.split(".")[2] for order in done.report.orders] == 4 * ["pwconv2"]
    found = halve.check(tmp_path / "pruned", against=dense)
    assert found.ok, found.problems
