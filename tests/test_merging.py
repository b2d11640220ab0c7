"""Merging adapters into pruned checkpoints, against least squares in float64, stock peft and trained models."""

import json
import warnings
from collections import defaultdict
from copy import deepcopy

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halve
from halve import merging
from halve.checkpoint import durable
from halve.errors import CorruptFileError, HalveError, InputError, UnsupportedModelError
from halve.learning.lora import adapter_learner
from halve.model.layers import is_conv1d, is_linear
from halve.text.calibration import Calibration
from models import decoder, edit_json, save, tokens
from packed_models import sums
from pruned_for_learning import stock, targets, train

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def loaded(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def pruned_checkpoint(path, family="llama", dtype=torch.float32, **changes):
    dense = save(decoder(family, **changes).to(dtype), path / "dense")
    halve.prune(dense, path / "pruned", method="magnitude", refit="none")
    return path / "pruned"


def stock_adapter(base, path, size=0.1, **options):
    """Save an adapter made with stock peft, with values as a training leaves them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(loaded(base), peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(7)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = size * torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(1 + noise if "magnitude" in name else noise)
        wrapped.save_pretrained(path)
    return path


def layouts_of(record):
    return {entry["name"]: entry["layout"] for entry in record["matrices"]}


def as_matrix(model, name):
    module = model.get_submodule(name.removesuffix(".weight"))
    return module.weight.data.T if is_conv1d(module) else module.weight.data


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return request.param


@pytest.fixture
def base(tmp_path, family):
    return pruned_checkpoint(tmp_path, family)


@pytest.fixture
def llama(tmp_path):
    return pruned_checkpoint(tmp_path)


@pytest.fixture
def adapter(tmp_path, llama):
    return stock_adapter(llama, tmp_path / "adapter", r=4, target_modules=TARGETS["llama"])


def inputs_of(model, names, ids):
    """Return the inputs of layers, (tokens, d_in) float64, by name of the weight."""
    seen, hooks = defaultdict(list), []
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        hooks.append(
            module.register_forward_pre_hook(
                lambda _module, args, name=name: seen[name].append(args[0].flatten(0, -2).double())
            )
        )
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def best_on_mask(target, mask, gram):
    """Solve every row's normal equations on its mask."""
    fitted = torch.zeros_like(target)
    for row in range(len(target)):
        kept = mask[row].nonzero().flatten()
        right = gram[kept] @ target[row]
        fitted[row, kept] = torch.linalg.lstsq(gram[kept][:, kept], right, driver="gelsd").solution
    return fitted


def loss(weight, target, gram):
    error = weight - target
    return float((error @ gram * error).sum())


def test_with_calibration_a_stock_adapter_becomes_the_best_weights_on_the_mask(base, family, tmp_path):
    path = stock_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=TARGETS[family])
    ids = tokens(32, seed=9)
    merged = halve.merge(path, base, tmp_path / "out", calibration=ids, device="cpu", forward_dtype="float32")
    assert {each.how for each in merged.matrices} == {"refit"}
    assert any("shrinkage" in each.facts for each in merged.matrices)
    old, new, whole = loaded(base), loaded(tmp_path / "out"), loaded(base)
    whole = stock(whole, path).merge_and_unload()
    # What the loop has seen: blocks before are merged already, this one and those after it hold W + s·BA.
    by_block = defaultdict(list)
    for each in merged.matrices:
        by_block[int(each.name.split(".")[2])].append(each)
    assert len(by_block) == 3
    for _, matrices in sorted(by_block.items()):
        seen = inputs_of(whole, [each.name for each in matrices], ids)
        for each in matrices:
            start, target, found = (as_matrix(model, each.name).double() for model in (old, whole, new))
            mask = start != 0
            x = seen[each.name]
            gram = x.T @ x / len(x)
            share = each.facts.get("shrinkage", 0.0)
            shrunk = (1 - share) * gram + share * torch.diag(gram.diagonal())
            assert not (found[~mask]).any()
            best = loss(best_on_mask(target, mask, shrunk), target, shrunk)
            assert best * (1 - 1e-6) <= loss(found, target, shrunk) <= 1.01 * best
            assert best < 0.999 * loss(target * mask, target, shrunk)
            total = loss(torch.zeros_like(target), target, gram)
            assert each.facts["relative_loss"] == pytest.approx(loss(found, target, gram) / total, rel=1e-3)
            assert each.facts["relative_loss_before_refit"] == pytest.approx(
                loss(target * mask, target, gram) / total, rel=1e-3
            )
            update = target - start
            share = float(update[~mask].square().sum() / update.square().sum())
            assert each.off_mask == pytest.approx(share, rel=1e-4)
        for each in matrices:
            as_matrix(whole, each.name).copy_(as_matrix(new, each.name))
    losses = [each.facts["relative_loss"] for each in merged.matrices]
    assert merged.mean_relative_loss == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"r": 4, "lora_alpha": 8}, {"r": 3, "use_rslora": True, "use_dora": True}, {"alpha_pattern": {"c_fc|q_proj": 32}}],
    ids=str,
)
def test_without_calibration_what_falls_on_zeros_is_left_out(family, options, dtype, tmp_path):
    base = pruned_checkpoint(tmp_path, family, dtype)
    path = stock_adapter(base, tmp_path / "adapter", target_modules=TARGETS[family], **options)
    merged = halve.merge(path, str(base), str(tmp_path / "out"))
    assert {each.how for each in merged.matrices} == {"masked"}
    assert merged.mean_relative_loss != merged.mean_relative_loss
    assert 0.3 < merged.mean_off_mask < 0.7
    old, new = loaded(base), loaded(tmp_path / "out")
    whole = stock(deepcopy(old), path).merge_and_unload()
    names = {each.name for each in merged.matrices}
    assert names == {
        name for name, each in old.named_parameters() if name.split(".")[-2] in TARGETS[family] and each.ndim > 1
    }
    for name in names:
        start, target, found = (as_matrix(model, name) for model in (old, whole, new))
        expected = (target * (start != 0)).to(dtype).float()
        torch.testing.assert_close(found, expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert halve.check(tmp_path / "out", against=base).ok
    assert halve.check(tmp_path / "out", against=tmp_path / "dense").ok
    assert halve.check(tmp_path / "out").matrices == halve.check(base).matrices


def test_all_other_bytes_stay_and_the_record_is_carried_on(llama, adapter, tmp_path):
    halve.merge(adapter, llama, tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (llama, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2] in TARGETS["llama"]}
    assert all(before[name].dtype == after[name].dtype for name in before)
    changing = {"model.safetensors", "halve.json", "README.md"}
    kept = {name: each for name, each in sums(llama).items() if name not in changing}
    ours = sums(tmp_path / "out")
    assert {name: ours[name] for name in kept if name in ours} == {
        name: each for name, each in kept.items() if name not in {"halve-measured.json", "report.html"}
    }
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"Adapter merged, its update kept off the zeros: `{adapter.name}`" in card.text
    assert "Perplexity was not measured" in card.text
    old, new = (json.loads((place / "halve.json").read_text()) for place in (llama, tmp_path / "out"))
    assert {name: new[name] for name in old if name != "files"} == {name: old[name] for name in old if name != "files"}
    (section,) = new["merges"]
    assert set(section["tensors"]) == changed
    assert section["adapter"]["kind"] == "lora"
    assert section["into"]["name"] == str(llama)
    assert section["calibration"] is None
    again = halve.merge(adapter, tmp_path / "out", tmp_path / "twice")
    assert len(again.record["merges"]) == 2
    assert halve.check(tmp_path / "twice", against=llama).ok
    assert new["files"]["model.safetensors"] == ours["model.safetensors"]


def test_a_weight_that_becomes_zero_is_told_in_the_record(llama, tmp_path):
    path = stock_adapter(llama, tmp_path / "adapter", r=1, target_modules=["q_proj"], layers_to_transform=[0])
    tensors = load_file(path / "adapter_model.safetensors")
    weight = as_matrix(loaded(llama), "model.layers.0.self_attn.q_proj.weight")
    column = int(weight[0].nonzero()[0])
    for name, tensor in tensors.items():
        tensor.zero_()
        if "lora_A" in name:
            tensor[0, column] = 1.0
        else:
            tensor[0, 0] = -weight[0, column] / 8
    save_file(tensors, path / "adapter_model.safetensors")
    merged = halve.merge(path, llama, tmp_path / "out")
    entry = next(each for each in merged.record["matrices"] if each["name"].endswith("0.self_attn.q_proj.weight"))
    assert entry["kept_per_group"] == [0, 1, weight.numel() // 4 - 1]
    old = json.loads((llama / "halve.json").read_text())
    assert entry["mask_sha256"] not in json.dumps(old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_an_adapter_trained_with_the_mask_gives_the_trained_weights(family, kind, dtype, tmp_path):
    base = pruned_checkpoint(tmp_path, family, dtype)
    record = json.loads((base / "halve.json").read_text())
    model = loaded(base)
    learner = adapter_learner(kind, targets(model, layouts_of(record)), rank=4, base=str(base))
    train(model, learner.attach(model))
    learner.save_adapter(tmp_path / "adapter")
    learner.finish()
    merged = halve.merge(tmp_path / "adapter", base, tmp_path / "out")
    assert {each.how for each in merged.matrices} == {"exact"}
    assert merged.mean_off_mask == 0.0
    found = load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    changed = 0
    for name in layouts_of(record):
        stored = next(each for each in found if name.endswith(each))
        assert torch.equal(found[stored], state[name].to(dtype))
        changed += not torch.equal(found[stored], load_file(base / "model.safetensors")[stored])
    assert changed == len(record["matrices"]) == len(merged.matrices)
    with pytest.raises(InputError, match="merges exactly: leave calibration out"):
        halve.merge(tmp_path / "adapter", base, tmp_path / "other", calibration=tokens(4))
    assert not (tmp_path / "other").exists()


def test_dense_matrices_take_the_whole_update(llama, tmp_path):
    path = stock_adapter(llama, tmp_path / "adapter", r=2, target_modules=["lm_head", "k_proj"])
    merged = halve.merge(path, llama, tmp_path / "out", calibration=tokens(16))
    head = next(each for each in merged.matrices if each.name == "lm_head.weight")
    assert (head.how, head.pruned, head.off_mask) == ("exact", False, 0.0)
    assert any("base_layer" in name for name in load_file(path / "adapter_model.safetensors"))  # peft adds a copy
    whole = stock(loaded(llama), path).merge_and_unload()
    torch.testing.assert_close(loaded(tmp_path / "out").lm_head.weight, whole.lm_head.weight)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.25
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"it has a copy of lm_head\.weight, and .* has other values there"):
        halve.merge(path, llama, tmp_path / "other")
    renamed = {name.replace("lm_head.base", "model.norm.base"): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"replaces the weights of model\.norm"):
        halve.merge(path, llama, tmp_path / "other")
    assert halve.check(tmp_path / "out", against=llama).ok
    assert halve.check(tmp_path / "out", against=tmp_path / "dense").ok


def test_what_cannot_be_fitted_is_masked_and_told(llama, adapter, tmp_path, monkeypatch):
    """A matrix whose inputs are not seen, as where a model multiplies with its weight itself."""
    real = merging.prune_blocks

    def blind(model, batches, settings, **options):
        blinded = {name: mask for name, mask in options.pop("masks").items() if "layers.1.mlp" not in name}
        skip = (*settings.skip, "model.layers.1.mlp.down_proj.weight")
        return real(model, batches, merging.replace(settings, skip=skip), masks=blinded, **options)

    monkeypatch.setattr(merging, "prune_blocks", blind)
    merged = halve.merge(adapter, llama, tmp_path / "out", calibration=tokens(16))
    (left,) = [each for each in merged.matrices if each.how == "masked"]
    assert left.name == "model.layers.1.mlp.down_proj.weight"
    assert left.reason == "skipped on request"
    assert "1 matrix could not be fitted, and what falls on zeros was left out" in merged.notes[-1]
    whole = stock(loaded(llama), adapter).merge_and_unload()
    expected = as_matrix(whole, left.name) * (as_matrix(loaded(llama), left.name) != 0)
    torch.testing.assert_close(as_matrix(loaded(tmp_path / "out"), left.name), expected)


def test_offloading_changes_nothing(llama, adapter, tmp_path):
    (tmp_path / "states").mkdir()
    options = {"calibration": Calibration(tokens(16), samples=3)}
    halve.merge(adapter, llama, tmp_path / "one", **options)
    halve.merge(adapter, llama, tmp_path / "other", **options, offload=tmp_path / "states")
    assert sums(tmp_path / "one") == sums(tmp_path / "other")
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize("place", ["model.safetensors", "config.json"])
def test_a_merge_that_failed_while_its_files_were_moved_goes_on(place, llama, adapter, tmp_path, monkeypatch):
    halve.merge(adapter, llama, tmp_path / "whole")
    real = durable.move_file

    def broken(path, target, kind):
        if target.name == place:
            raise OSError(5, "no volume")
        real(path, target, kind)

    monkeypatch.setattr(durable, "move_file", broken)
    with pytest.raises(HalveError, match="no volume"):
        halve.merge(adapter, llama, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(InputError, match="was begun differently"):
        halve.merge(adapter, llama, tmp_path / "out", calibration=tokens(16))
    monkeypatch.undo()
    merged = halve.merge(adapter, llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert len(merged.matrices) == 9


def test_a_merge_that_failed_before_leaves_nothing(llama, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "write_checkpoint", lambda *_a, **_k: (_ for _ in ()).throw(HalveError("no room")))
    with pytest.raises(HalveError, match="no room"):
        halve.merge(adapter, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_judged_before_it_is_published(llama, adapter, tmp_path, monkeypatch):
    real = merging.write_checkpoint

    def damaged(out, *args, **options):
        found = real(out, *args, **options)
        data = bytearray((out / "model.safetensors").read_bytes())
        data[-2] ^= 1
        (out / "model.safetensors").write_bytes(data)
        return found

    monkeypatch.setattr(merging, "write_checkpoint", damaged)
    with pytest.raises(HalveError, match="is wrong, do not use it"):
        halve.merge(adapter, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_model_is_refused(llama, tmp_path):
    (tmp_path / "other").mkdir()
    other = pruned_checkpoint(tmp_path / "other", intermediate_size=128)
    path = stock_adapter(other, tmp_path / "shapes", target_modules=["up_proj"])
    with pytest.raises(
        InputError, match=r"its update of model\.layers\.0\.mlp\.up_proj is 128 x 32, and .* has 64 x 32"
    ):
        halve.merge(path, llama, tmp_path / "out")
    (tmp_path / "gpt").mkdir()
    gpt = pruned_checkpoint(tmp_path / "gpt", "gpt2")
    path = stock_adapter(gpt, tmp_path / "names", target_modules=["c_fc"])
    with pytest.raises(InputError, match=r"has no module transformer\.h\.0\.mlp\.c_fc, tr"):
        halve.merge(path, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_weights_and_other_modules_are_refused(tmp_path):
    base = pruned_checkpoint(tmp_path, "llama_tied")
    path = stock_adapter(base, tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(UnsupportedModelError, match=r"changes lm_head\.weight, whose weights other modules share"):
        halve.merge(path, base, tmp_path / "out")
    whole = load_file(path / "adapter_model.safetensors")
    renamed = {name.replace("lm_head", "model.norm"): tensor for name, tensor in whole.items() if "lora" in name}
    save_file(renamed, path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"changes model\.norm, which is a LlamaRMSNorm"):
        halve.merge(path, base, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype has no effect on a merge"),
        ({"work": "somewhere"}, "work has no effect on a merge"),
        ({"samples": 4}, "go with calibration, which names no text"),
        ({"method": "wanda"}, "there is no option 'method'"),
        ({"calibration": "nowhere.txt"}, r"nowhere\.txt"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options, message, llama, adapter, tmp_path):
    with pytest.raises(InputError, match=message):
        halve.merge(adapter, llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_were_not_pruned_and_wrong_places_are_refused(llama, adapter, tmp_path):
    with pytest.raises(InputError, match=r"has no halve\.json, which says what was pruned in it"):
        halve.merge(adapter, tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InputError, match="is, or lies in, the adapter"):
        halve.merge(adapter, llama, adapter / "out")
    with pytest.raises(InputError, match="is, or lies in, the input"):
        halve.merge(adapter, llama, llama / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        halve.merge(adapter, llama, tmp_path / "full")
    edit_json(llama / "halve.json", pattern=None)
    with pytest.raises(InputError, match="nothing was pruned in"):
        halve.merge(adapter, llama, tmp_path / "out")
    edit_json(llama / "halve.json", pattern=["2:4"])
    with pytest.raises(CorruptFileError, match="is not as Halve writes it"):
        halve.merge(adapter, llama, tmp_path / "out")


def test_an_update_beyond_float32_is_refused(llama, adapter, tmp_path):
    edit_json(adapter / "adapter_config.json", lora_alpha=1e300)
    with pytest.raises(InputError, match="is not finite with the adapter"):
        halve.merge(adapter, llama, tmp_path / "out")
    assert is_linear(loaded(llama).lm_head)


def test_steps_are_told_without_a_plan(llama, adapter, tmp_path):
    heard = []
    halve.merge(adapter, llama, tmp_path / "out", calibration=tokens(16), listen=heard.append)
    assert not [step for step in heard if step.plan is not None]
    assert {step.matrix.method for step in heard if step.matrix is not None} == {"given"}
