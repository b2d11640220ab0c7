"""Runs that reorder channels: what is written, checked, continued, merged into, and what is refused."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halve
from halve.errors import InputError
from halve.learning.adapter import read_adapter
from halve.order.folds import inverse
from halve.recorded import ChannelOrder, Record, SourcedRecord, channel_order, orders_of, read_record
from models import OF_ONE_RUN, decoder, save, tokens
from taught import QUICK, write_text
from tiny_tokenizers import byte_bpe

GIVEN = {"method": "sparsegpt", "refit": "none", "permute": "fold", "device": "cpu", "forward_dtype": "float32"}


def calibration():
    return tokens(16, seed=5)


def contents(directory):
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name not in OF_ONE_RUN
    }


@pytest.fixture
def dense(tmp_path):
    model = decoder("llama", attention_bias=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save(model, tmp_path / "dense")


@pytest.fixture
def pruned(dense, tmp_path):
    halve.prune(dense, tmp_path / "pruned", calibration=calibration(), skip=["*.gate_proj.*", "*.v_proj.*"], **GIVEN)
    return tmp_path / "pruned"


def test_what_stayed_dense_is_the_originals_once_put_back(dense, pruned):
    found = halve.check(pruned, against=dense)
    assert found.ok, found.problems
    record = read_record(pruned, Record)
    assert len(record.orders) == 6  # down and o of three blocks
    ours, theirs = load_file(pruned / "model.safetensors"), load_file(dense / "model.safetensors")
    for channels, moves in orders_of(record, pruned):
        for move in moves:
            name = move.parameter
            if "gate_proj" in name or "v_proj" in name:
                assert not torch.equal(ours[name], theirs[name])
                assert torch.equal(move.applied(ours[name], inverse(channels)), theirs[name])
    assert found.compared > halve.check(pruned).compared


def test_the_check_tells_of_what_was_moved_alone(dense, pruned):
    theirs, ours = load_file(dense / "model.safetensors"), load_file(pruned / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file({**ours, name: theirs[name]}, pruned / "model.safetensors", {"format": "pt"})
    problems = halve.check(pruned, against=dense).problems
    assert any(name in problem and "go with such" in problem for problem in problems)


def test_the_report_begins_with_it(pruned):
    page = (pruned / "report.html").read_text()
    card = (pruned / "README.md").read_text()
    assert "Channels were reordered in 6 places" in page[: page.index("Every matrix was pruned")]
    assert "Channels were reordered in 6 places" in card[: card.index("What was done")]


def test_reordered_layers_lose_less(dense):
    lost = {}
    for order in ("none", "fold"):
        report = halve.prune(dense, calibration=calibration(), **GIVEN | {"permute": order}).report
        assert len(report.orders) == (6 if order == "fold" else 0)
        lost[order] = sum(m.facts["relative_loss"] for m in report.matrices if "down_proj" in m.name)
    assert lost["fold"] < 0.95 * lost["none"]


def test_auto_reorders_unasked(dense, tmp_path):
    asked = {"calibration": calibration(), "device": "cpu", "forward_dtype": "float32"}
    record = halve.prune(dense, tmp_path / "out", **asked).record
    assert record["permute"] == "fold"
    assert len(record["orders"]) == 6
    assert halve.check(tmp_path / "out", against=dense).ok
    assert "orders" not in halve.prune(dense, tmp_path / "alone", permute="none", **asked).record


@pytest.mark.parametrize("options", [{"stream": "always"}, {"offload": True}])
def test_the_bytes_are_the_same_wherever_weights_and_states_lie(dense, tmp_path, options):
    given = GIVEN | {"reconstruct": "block", "reconstruct_epochs": 1}
    halve.prune(dense, tmp_path / "one", calibration=calibration(), **given)
    options = {"offload": tmp_path} if "offload" in options else options
    halve.prune(dense, tmp_path / "other", calibration=calibration(), **given, **options)
    assert halve.check(tmp_path / "other", against=dense).ok
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one == other


@pytest.mark.parametrize("block", [1, 2])
def test_a_run_that_was_stopped_comes_to_the_same_bytes(dense, tmp_path, block):
    given = GIVEN | {"method": "gblm", "refit": "cg", "match_dense": 0.5, "shrinkage": "auto"}
    halve.prune(dense, tmp_path / "one", calibration=calibration(), **given)

    def stop(step):
        if step.block == block and step.phase == "reorder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve.prune(dense, tmp_path / "other", calibration=calibration(), listen=stop, **given)
    again = halve.prune(dense, tmp_path / "other", calibration=calibration(), **given)
    assert again.report.resumed_blocks == block
    assert len(again.report.orders) == 6
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_first_block_that_shows_nothing_hides_no_folds_of_the_others(tmp_path):
    model = decoder("opt")
    model.model.decoder.layers[0].fc1.bias.data.fill_(-1e4)  # its ReLU lets nothing through
    dead = save(model, tmp_path / "dead")
    given = GIVEN | {"fallback": "magnitude"}

    def stop(step):
        if step.block == 1 and step.phase == "reorder":
            raise KeyboardInterrupt

    one = halve.prune(dead, tmp_path / "one", calibration=calibration(), **given)
    assert not one.report.not_reordered  # the values of the first block are
    assert {order.block[-1] for order in one.report.orders if order.fold.consumer == "fc2.weight"} == {"1", "2"}
    with pytest.raises(KeyboardInterrupt):
        halve.prune(dead, tmp_path / "other", calibration=calibration(), listen=stop, **given)
    halve.prune(dead, tmp_path / "other", calibration=calibration(), **given)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_what_folds_nothing_says_so(dense, tmp_path):
    given = GIVEN | {"skip": ["*.down_proj.*", "*.o_proj.*"]}
    found = halve.prune(dense, tmp_path / "out", calibration=calibration(), **given)
    assert found.report.not_reordered == tuple(f"model.layers.{block}" for block in range(3))
    (warning,) = [each for each in found.record["warnings"] if "permute" in each]
    assert warning.startswith("permute fold: nothing could be folded in 3 of 3 blocks (the first is model.layers.0)")
    assert "nothing could be folded" in (tmp_path / "out" / "report.html").read_text()


def adapter(base, path):
    """Save an adapter of stock peft with values as a training leaves them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "up_proj", "v_proj", "o_proj"], use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(path)
    return path


def test_an_adapter_of_the_original_is_moved_along(dense, tmp_path):
    halve.prune(dense, tmp_path / "pruned", calibration=calibration(), **GIVEN)
    made = adapter(dense, tmp_path / "adapter")
    halve.merge(made, tmp_path / "pruned", tmp_path / "merged")
    record = read_record(tmp_path / "pruned", Record)
    pruned, merged = (load_file(tmp_path / each / "model.safetensors") for each in ("pruned", "merged"))
    back = {}
    for held, target in ((pruned, "pruned"), (merged, "merged")):
        back[target] = dict(held)
        for channels, moves in orders_of(record, tmp_path / "pruned"):
            for move in moves:
                back[target][move.parameter] = move.applied(back[target][move.parameter], inverse(channels))
    save_file(back["pruned"], tmp_path / "back.safetensors")
    update = read_adapter(made).updates
    moved = 0
    for module, each in update.items():
        name = f"{module}.weight"
        weight = back["pruned"][name].float()
        wanted = torch.where(weight != 0, each.merged(weight, masked=False), 0.0)
        torch.testing.assert_close(back["merged"][name].float(), wanted, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(merged[name], back["merged"][name])
    assert moved == len(update)
    assert halve.check(tmp_path / "merged", against=tmp_path / "pruned").ok


def test_an_adapter_of_the_reordered_checkpoint_is_taken_as_it_is_and_any_other_refused(dense, tmp_path):
    halve.prune(dense, tmp_path / "pruned", calibration=calibration(), **GIVEN)
    made = adapter(tmp_path / "pruned", tmp_path / "adapter")
    halve.merge(made, tmp_path / "pruned", tmp_path / "merged")
    pruned, merged = (load_file(tmp_path / each / "model.safetensors") for each in ("pruned", "merged"))
    for module, each in read_adapter(made).updates.items():
        weight = pruned[f"{module}.weight"].float()
        wanted = torch.where(weight != 0, each.merged(weight, masked=False), 0.0)
        torch.testing.assert_close(merged[f"{module}.weight"].float(), wanted, rtol=1e-5, atol=1e-6)
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/else"}))
    with pytest.raises(InputError, match="were reordered, and the adapter's base is 'someone/else'"):
        halve.merge(made, tmp_path / "pruned", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_reordered_checkpoint_is_pruned_again_and_says_so(pruned, dense, tmp_path):
    halve.prune(pruned, tmp_path / "again", calibration=calibration(), **GIVEN | {"permute": "none"})
    assert halve.check(tmp_path / "again", against=pruned).ok
    record = json.loads((tmp_path / "again" / "halve.json").read_text())
    assert record["source"]["reordered"] is True
    for name in ("report.html", "README.md"):
        assert "had its channels reordered already" in (tmp_path / "again" / name).read_text()
    found = halve.check(tmp_path / "again", against=dense)
    assert f"compare with {pruned}, and that with" in found.problems[0]
    made = adapter(dense, tmp_path / "adapter")
    with pytest.raises(InputError, match="were reordered"):
        halve.merge(made, tmp_path / "again", tmp_path / "refused")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pattern": "50%"}, "50% has none"),
        ({"method": "magnitude", "refit": "none"}, "magnitude with refit none uses none"),
        ({"permute": "all"}, "permute = 'all' is not known: choose one of auto, none, fold"),
    ],
)
def test_what_cannot_be_reordered_is_refused(dense, tmp_path, options, why):
    with pytest.raises(InputError, match=why):
        halve.prune(dense, tmp_path / "out", calibration=calibration(), **GIVEN | options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def spoken(tmp_path):
    """A tiny model with a tokenizer, the same reordered, and text to learn on."""
    found = save(decoder("llama", vocab_size=320), tmp_path / "spoken")
    byte_bpe().save_pretrained(found)
    write_text(tmp_path / "text.jsonl")
    halve.prune(found, tmp_path / "pruned", calibration=calibration(), **GIVEN)
    return found, tmp_path / "pruned", {"data": tmp_path / "text.jsonl", "method": "maskllm", **QUICK}


def test_a_prior_and_masks_of_another_order_are_refused(spoken, tmp_path):
    model, reordered, given = spoken
    with pytest.raises(InputError, match="channels of the prior"):
        halve.learn(model, tmp_path / "refused", prior=str(reordered), **given)
    halve.learn(model, tmp_path / "learned", save_masks=tmp_path / "masks.safetensors", **given)
    with pytest.raises(InputError, match="was learned for other weights"):
        halve.apply_masks(reordered, tmp_path / "masks.safetensors", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_masks_of_a_reordered_checkpoint_stay_with_it(spoken, tmp_path):
    model, reordered, given = spoken
    halve.learn(reordered, tmp_path / "learned", save_masks=tmp_path / "masks.safetensors", **given)
    with pytest.raises(InputError, match=r"were reordered, and .* was learned for other weights"):
        halve.apply_masks(model, tmp_path / "masks.safetensors", tmp_path / "refused")
    halve.apply_masks(reordered, tmp_path / "masks.safetensors", tmp_path / "applied")
    source = read_record(tmp_path / "applied", SourcedRecord).source
    assert source.reordered
    assert source.made_from.name == str(model)
    with pytest.raises(InputError, match="were reordered, and the adapter's base is"):
        halve.merge(adapter(model, tmp_path / "adapter"), tmp_path / "applied", tmp_path / "refused")


def test_masks_of_what_was_pruned_again_fit_the_checkpoint_that_it_was_pruned_from(spoken, tmp_path):
    model, reordered, given = spoken
    halve.prune(
        reordered, tmp_path / "again", calibration=calibration(), **GIVEN | {"permute": "none", "pattern": "1:4"}
    )
    halve.learn(tmp_path / "again", tmp_path / "learned", save_masks=tmp_path / "masks.safetensors", **given)
    record = halve.apply_masks(reordered, tmp_path / "masks.safetensors", tmp_path / "applied")
    assert any("the masks may not suit them" in warning for warning in record["warnings"])
    with pytest.raises(InputError, match=r"such as what it was pruned from without reordering"):
        halve.apply_masks(model, tmp_path / "masks.safetensors", tmp_path / "refused")


def test_priors_are_held_to_the_order_of_the_model_wherever_it_was_changed(spoken, tmp_path):
    model, reordered, given = spoken
    plain = GIVEN | {"permute": "none"}
    halve.prune(reordered, tmp_path / "again", calibration=calibration(), **plain)
    halve.prune(model, tmp_path / "plain", calibration=calibration(), **plain)
    for began, prior in ((model, "again"), (reordered, "plain")):
        with pytest.raises(InputError, match="were reordered, so that the prior's masks"):
            halve.learn(began, tmp_path / "refused", prior=str(tmp_path / prior), **given)
    orders = {name: channel_order(tmp_path / name, name) for name in ("again", "plain", "pruned")}
    sums = {"pruned": read_record(tmp_path / "again", SourcedRecord).source.sha256}
    pruned = ChannelOrder(reordered=True, sha256s=frozenset(sums.values()))
    assert orders["again"].is_that_of(pruned)
    assert not orders["plain"].is_that_of(pruned)


def test_what_is_trained_on_keeps_the_orders_on_record(spoken, tmp_path):
    model, reordered, given = spoken
    del given["method"]
    halve.finetune(reordered, tmp_path / "tuned", **given)
    assert len(read_record(tmp_path / "tuned", Record).orders) == 6
    assert halve.check(tmp_path / "tuned", against=model).ok
    made = adapter(reordered, tmp_path / "adapter")
    halve.merge(made, tmp_path / "tuned", tmp_path / "both")
    halve.merge(made, reordered, tmp_path / "once")
    halve.merge(made, tmp_path / "once", tmp_path / "twice")
    for before, after in (("tuned", "both"), ("once", "twice")):  # taken as it is
        held, merged = (load_file(tmp_path / each / "model.safetensors") for each in (before, after))
        for module, each in read_adapter(made).updates.items():
            weight = held[f"{module}.weight"].float()
            wanted = torch.where(weight != 0, each.merged(weight, masked=False), 0.0)
            torch.testing.assert_close(merged[f"{module}.weight"].float(), wanted, rtol=1e-5, atol=1e-6)


def test_a_packed_checkpoint_comes_back(pruned, tmp_path):
    halve.pack(pruned, tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(pruned)
