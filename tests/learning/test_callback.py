"""KeepMasks under transformers.Trainer: masks are kept, stored with each checkpoint and taken from there again."""

import importlib.util
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import halve
from halve.errors import CorruptFileError, HalveError, InputError, PatternError
from halve.learning.pruned_weights import check_written
from kept_models import assert_kept, pruned_decoder, zeros
from models import decoder, tokens
from packed_models import edit_tensor, pruned


class Rows(Dataset):
    """Random documents, each of them its own labels."""

    def __init__(self, count=16):
        self.rows = tokens(rows=count, length=12)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model, out, *, keep=True, record=None, **changes):
    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    callbacks = [halve.KeepMasks(record=record)] if keep else []
    return Trainer(model=model, args=TrainingArguments(**options), train_dataset=Rows(), callbacks=callbacks)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "adamw_torch_fused"])
def test_the_trainer_keeps_them(optim, tmp_path):
    model = pruned_decoder()
    before = zeros(model)
    ours = trainer(model, tmp_path, optim=optim)
    ours.train()
    assert_kept(model, before)
    written = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for name, mask in before.items():
        assert not bool((written[name][mask] != 0).any())


def test_without_it_they_are_lost(tmp_path):
    model = pruned_decoder()
    before = zeros(model)
    trainer(model, tmp_path, keep=False).train()
    with pytest.raises(AssertionError):
        assert_kept(model, before)


def test_a_resumed_training_is_the_one_that_was_not_stopped(tmp_path):
    whole = pruned_decoder()
    trainer(whole, tmp_path / "whole").train()
    stopped = pruned_decoder()
    trainer(stopped, tmp_path / "stopped").train()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    resumed = pruned_decoder(seed=5)  # its own zeros must not count
    before = zeros(stopped)
    trainer(resumed, tmp_path / "stopped").train(resume_from_checkpoint=True)
    assert same(resumed, whole)
    assert_kept(resumed, before)


def zero_a_kept_weight(directory):
    """Let a kept weight be zero in a checkpoint, as it may be while it passes through; return where."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(directory / "model.safetensors")[name]
    row, column = map(int, (weight != 0).nonzero()[3])

    def change(tensor):
        tensor[row, column] = 0.0
        return tensor

    edit_tensor(directory / "model.safetensors", name, change)
    return row, column


@pytest.mark.parametrize("loaded", ["pruned", "checkpoint", "elsewhere"])
def test_a_kept_weight_at_zero_is_not_lost_by_a_resume(loaded, tmp_path):
    trainer(pruned_decoder(), tmp_path / "out", max_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    row, column = zero_a_kept_weight(checkpoint)
    model, record, out = pruned_decoder(), None, tmp_path / "out"
    if loaded == "checkpoint":  # goes on as a training of its own
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        trainer(model, tmp_path / "new").train()
    else:
        if loaded == "elsewhere":
            record, out = checkpoint, tmp_path / "new"
        trainer(model, out, record=record).train(resume_from_checkpoint=str(checkpoint))
    assert float(model.model.layers[0].mlp.up_proj.weight.detach()[row, column]) != 0.0


def test_masks_lost_with_a_checkpoint_that_was_cut_short_are_those_of_the_run(tmp_path):
    trainer(pruned_decoder(), tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "halve.masks").unlink()
    row, column = zero_a_kept_weight(tmp_path / "checkpoint-2")
    model = pruned_decoder()
    trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert float(model.model.layers[0].mlp.up_proj.weight.detach()[row, column]) != 0.0


def test_a_training_that_goes_on_without_masks_is_refused(tmp_path):
    trainer(pruned_decoder(), tmp_path, keep=False, max_steps=2).train()
    with pytest.raises(
        InputError, match=r"training goes on after step 2, and there is no halve\.masks in .*: give Keep"
    ):
        trainer(pruned_decoder(), tmp_path).train(resume_from_checkpoint=True)


def test_masks_of_other_weights_are_refused(tmp_path):
    trainer(pruned_decoder(), tmp_path / "one", max_steps=2).train()
    trainer(pruned_decoder(seed=5), tmp_path / "two", max_steps=2).train()
    for directory in ("checkpoint-2", "."):
        shutil.copy(tmp_path / "one" / "halve.masks", tmp_path / "two" / directory / "halve.masks")
    with pytest.raises(InputError, match=r"halve\.masks prunes weights that are not zero in model\.layers\.0"):
        trainer(pruned_decoder(), tmp_path / "two").train(resume_from_checkpoint=True)


def test_masks_of_another_model_are_refused(tmp_path):
    trainer(pruned_decoder(), tmp_path, max_steps=2).train()
    with pytest.raises(InputError, match=r"has a mask of model\.layers\..*, and GPT2LMHeadModel has no such parameter"):
        halve.keep_masks(pruned_decoder("gpt2"), record=tmp_path)
    with pytest.raises(InputError, match=r"the saved mask of .* is torch\.uint8 \(.*\), and should be uint8"):
        halve.keep_masks(pruned_decoder(intermediate_size=128), record=tmp_path)


def test_a_damaged_file_of_masks_is_refused(tmp_path):
    trainer(pruned_decoder(), tmp_path, max_steps=2).train()
    path = tmp_path / "halve.masks"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError):
        halve.keep_masks(pruned_decoder(), record=tmp_path)


def test_what_the_file_holds(tmp_path):
    """Read by the library of safetensors, and unpacked bit by bit."""
    model = pruned_decoder()
    before = zeros(model)
    trainer(model, tmp_path, max_steps=2).train()
    shutil.copy(tmp_path / "checkpoint-2" / "halve.masks", tmp_path / "copy.safetensors")
    packed = load_file(tmp_path / "copy.safetensors")
    assert packed.keys() == before.keys()
    for name, pruned_at in before.items():
        bits = torch.stack([(packed[name] >> bit) & 1 for bit in range(8)], dim=-1).flatten(-2)
        assert torch.equal(bits.bool(), ~pruned_at)


def test_a_checkpoint_with_its_masks_is_a_checkpoint_as_before(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned(tmp_path / "made", dtype=torch.float32))
    trainer(model, tmp_path / "out", max_steps=2).train()
    result = halve.check(tmp_path / "out" / "checkpoint-2", pattern="2:4")
    assert result.ok, result.problems
    assert result.matrices == 3 * 7


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_the_bytes_on_disk_are_judged(family, tmp_path):
    """Mixtral's experts are matrices of their own there."""
    directory = pruned(tmp_path, family, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    packed = halve.keep_masks(model).state_dict()
    check_written(model, packed, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if any(part in name for part in ("up_proj", "experts.0.w3", "c_fc.weight")))
    tensors[name][tensors[name] == 0] = 1e-3
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(HalveError, match=r"model\.safetensors has \d+ pruned weights that should be zero in "):
        check_written(model, packed, directory)


def test_a_weight_that_is_written_by_another_callback_is_told_at_the_next_checkpoint(tmp_path):
    class Careless(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **others):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(1.0)

    ours = trainer(pruned_decoder(), tmp_path)
    ours.add_callback(Careless())
    with pytest.raises(HalveError, match=r"pruned weights of model\.layers\.0\.mlp\.up_proj\.weight are not zero"):
        ours.train()


def test_nothing_is_written_where_nothing_is_saved(tmp_path):
    model = pruned_decoder()
    before = zeros(model)
    ours = trainer(model, tmp_path, save_strategy="no")
    ours.train()
    assert_kept(model, before)
    assert not list(tmp_path.rglob("halve.masks"))
    ours.train()  # once more, with the masks of the first
    assert_kept(model, before)
    kept = next(c for c in ours.callback_handler.callbacks if isinstance(c, halve.KeepMasks)).kept
    assert kept is halve.keep_masks(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"deepspeed": {}}, "does not work with DeepSpeed"), ({"is_hyper_param_search": True}, "hyperparameter_search")],
)
def test_what_cannot_work_is_refused_before_it_trains(changes, message, tmp_path):
    args, state = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True), transformers.TrainerState()
    if "deepspeed" in changes:
        args.deepspeed = {"zero_optimization": {"stage": 2}}
    else:
        state.is_hyper_param_search = True
    with pytest.raises(InputError, match=message):
        halve.KeepMasks().on_train_begin(args, state, transformers.TrainerControl(), model=pruned_decoder())


def test_a_dense_model_is_refused_before_it_trains(tmp_path):
    with pytest.raises(InputError, match="no matrix in the blocks of LlamaForCausalLM is pruned to 2:4"):
        trainer(decoder("llama").train(), tmp_path).train()
    with pytest.raises(PatternError, match="is not understood"):
        halve.KeepMasks(pattern="two of four")


def test_adapters_train_beside_kept_weights(tmp_path):
    import warnings

    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = get_peft_model(pruned_decoder(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        before = {name: mask for name, mask in zeros(model).items() if "lora_" not in name}
        trainer(model, tmp_path, max_steps=2).train()
    assert_kept(model, before)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_sft_trainer_keeps_them(tmp_path):
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    from tiny_tokenizers import byte_bpe

    model = pruned_decoder(vocab_size=320)
    before = zeros(model)
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    table = Table.from_dict({"text": ["some text to train on, and more of it"] * 16})
    SFTTrainer(
        model=model, args=config, train_dataset=table, processing_class=byte_bpe(), callbacks=[halve.KeepMasks()]
    ).train()
    assert_kept(model, before)
