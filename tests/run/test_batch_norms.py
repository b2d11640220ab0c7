"""Statistics of batch norms, held to full forward passes of the finished model, and to plain means of the inputs."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

import halve
from halve.errors import InputError
from halve.run import batch_norms as batch_norms_module
from halve.run import local
from halve.run.batch_norms import STATISTICS, batch_norms, estimate
from models import convnext, resnet, save
from test_convolutions import pictures


def trained(seed=0):
    """A ResNet whose batch norms have statistics of some pictures, as after training."""
    model = resnet(seed)
    for norm in batch_norms(model).values():
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def inputs_of_norms(model, batches):
    """Everything that each norm is given in full forward passes, (tokens, channels) float64, by name."""
    seen = {name: [] for name in batch_norms(model)}
    hooks = [
        norm.register_forward_pre_hook(
            lambda _norm, args, name=name: seen[name].append(args[0].double().movedim(1, -1).flatten(0, -2))
        )
        for name, norm in batch_norms(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture(autouse=True)
def few_values_are_enough(monkeypatch):
    monkeypatch.setattr(batch_norms_module, "LEAST", 2)


@pytest.mark.parametrize("skip", [(), ("*stages.1*",)])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_statistics_are_those_of_the_finished_model_in_blocks_without_pruned_matrices_too(method, skip):
    torch.manual_seed(0)
    model, batches = trained(), pictures(3)
    dense = copy.deepcopy(model)
    options = {"method": method, "skip": skip, "forward_dtype": "float32"}
    done = halve.prune(model, calibration=batches, **options)
    inside = {f"{path}.{leaf}" for path in batch_norms(model) if ".stages." in path for leaf in STATISTICS}
    assert set(done.report.norms) == inside
    assert inside <= done.report.changed
    for name, x in inputs_of_norms(model, batches).items():
        norm, before = model.get_submodule(name), dense.get_submodule(name)
        if ".stages." not in name:
            assert torch.equal(norm.running_mean, before.running_mean)
        else:
            torch.testing.assert_close(norm.running_mean, x.mean(0).float(), atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(norm.running_var, x.var(0).float(), atol=1e-4, rtol=1e-3)
        assert torch.equal(norm.num_batches_tracked, before.num_batches_tracked)


class Twice(nn.Module):
    """Calls one norm twice, another behind it, and never a third."""

    def __init__(self):
        super().__init__()
        self.twice, self.behind, self.never = (nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x):
        return self.behind(self.twice(self.twice(x) * 3 + 1))


def test_norms_are_estimated_in_the_order_in_which_they_run_each_from_all_its_calls():
    torch.manual_seed(0)
    block, batches = Twice().eval(), [torch.randn(5, 4), torch.randn(8, 4) + 2]
    first = copy.deepcopy(block)
    with torch.no_grad():
        found = estimate(block, lambda batch: block(batches[batch]), 2)
    assert found.keys() == {f"{name}.{leaf}" for name in ("twice", "behind") for leaf in STATISTICS}
    x = torch.cat(batches)
    with torch.no_grad():
        both = torch.cat([x, first.twice(x) * 3 + 1])
        torch.testing.assert_close(block.twice.running_mean, both.mean(0))
        torch.testing.assert_close(block.twice.running_var, both.var(0))
        behind = block.twice(block.twice(x) * 3 + 1)
    torch.testing.assert_close(block.behind.running_var, behind.var(0))
    assert torch.equal(block.never.running_mean, torch.zeros(4))


def test_it_does_not_matter_how_the_data_is_cut_into_batches():
    torch.manual_seed(0)
    one, x = Twice().eval(), torch.randn(12, 4)
    other = copy.deepcopy(one)
    with torch.no_grad():
        a = estimate(one, lambda _: one(x), 1)
        b = estimate(other, lambda batch: other(x[3 * batch :][:3]), 4)
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"method": "wanda", "batch_norm": "keep"}, True),
        ({"method": "wanda", "skip": ["*stages.0*"]}, False),
        ({"method": "magnitude", "refit": "none"}, False),
    ],
)
def test_they_are_kept_on_request_and_before_the_first_pruned_block(options, kept):
    model = trained()
    before = copy.deepcopy(model.state_dict())
    done = halve.prune(model, calibration=pictures(), **options)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert kept == (not done.report.norms)
    assert set(done.report.norms) == {name for name in changed if "running" in name}
    assert not any("stages.0" in name for name in changed) or "skip" not in options


def test_what_saw_few_values_keeps_its_statistics_and_a_caution_says_so(monkeypatch):
    monkeypatch.setattr(batch_norms_module, "LEAST", 60)  # 12 pictures of 4 x 4, then of 2 x 2 positions
    monkeypatch.setattr(local, "LEAST", 60)
    cautions = []
    done = halve.prune(
        trained(), calibration=pictures(), method="wanda", listen=lambda step: cautions.append(step.caution)
    )
    assert done.report.norms
    assert all("stages.0" in name for name in done.report.norms)
    assert any("saw fewer than 60 values a channel" in caution for caution in cautions)


def test_a_reconstruction_goes_on_from_them():
    model = trained()
    done = halve.prune(model, calibration=pictures(), method="wanda", reconstruct="block")
    assert done.report.norms
    assert set(done.report.norms) <= done.report.changed


def test_a_checkpoint_has_them_and_a_killed_run_ends_with_the_same_bytes(tmp_path):
    source, data = save(trained(), tmp_path / "dense"), pictures()
    whole = halve.prune(source, tmp_path / "whole", calibration=data, method="wanda")
    model = AutoModelForImageClassification.from_pretrained(whole.out)
    for name in whole.report.norms:
        assert torch.equal(model.get_buffer(name), whole.model.get_buffer(name))
    assert whole.record["norm_statistics"] == sorted(whole.report.norms)
    assert halve.check(whole.out, against=source).ok

    def stop(step):
        if step.block == 1 and step.phase == "solve":
            raise KeyboardInterrupt

    for stream in ("never", "always"):
        with pytest.raises(KeyboardInterrupt):
            halve.prune(source, tmp_path / stream, calibration=data, method="wanda", listen=stop, stream=stream)
        cut = halve.prune(source, tmp_path / stream, calibration=data, method="wanda", stream=stream)
        assert cut.report.resumed_blocks == 1
        assert cut.report.norms == whole.report.norms
        assert (cut.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_a_statistic_that_was_changed_since_is_told(tmp_path):
    source = save(trained(), tmp_path / "dense")
    kept = halve.prune(source, tmp_path / "kept", calibration=pictures(), method="wanda", batch_norm="keep").out
    model = AutoModelForImageClassification.from_pretrained(kept)
    norm = next(iter(batch_norms(model.resnet.encoder).values()))
    norm.running_mean.add_(1.0)
    model.save_pretrained(kept)
    problems = " ".join(halve.check(kept, against=source).problems)
    assert "was neither pruned nor tuned and differs from the original" in problems


def test_models_without_batch_norms_are_not_concerned():
    done = halve.prune(convnext(), calibration=pictures(), method="wanda")
    assert done.report.norms == ()


def test_what_cannot_be_done_is_refused():
    with pytest.raises(InputError, match="batch_norm = 'reset' is not known: choose one of estimate, keep"):
        halve.prune(resnet(), calibration=pictures(), batch_norm="reset")


def test_the_report_and_the_card_say_so(tmp_path):
    source = save(trained(), tmp_path / "dense")
    out = halve.prune(source, tmp_path / "out", calibration=pictures(), method="wanda").out
    card, page = ((out / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    norms = len([name for name in batch_norms(trained()) if ".stages." in name])
    assert f"- Statistics of {norms} batch norms estimated anew on the calibration data." in card
    assert f"The statistics of {norms} batch norms were estimated anew on the calibration data." in page
    assert "<td>estimate</td>" in page
    assert "`halve pack DIR" not in card  # all that was pruned are convolutions
