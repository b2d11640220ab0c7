"""The files of foreign checkpoints: which belong to a model, and what is refused and how."""

import os
import shutil

import pytest

import models
from halve.checkpoint.directory import companions, forbidden_fields
from halve.checkpoint.load import resolve
from halve.errors import CorruptFileError, InputError, UnsupportedModelError
from halve.report.facts import read_run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("compression_config", {"format": "sparse"}),
        ("transformers_weights", "other.safetensors"),
        ("_attn_implementation_internal", "org/kernel"),
        ("text_config", {"auto_map": {}}),
        ("list", [{"quantization_config": {}}]),
    ],
)
def test_configs_that_ask_for_more_are_refused(llama, field, value):
    models.edit_json(llama / "config.json", **{field: value})
    with pytest.raises(UnsupportedModelError, match=r"config\.json has '"):
        resolve(llama)


def test_an_absent_field_may_be_null(llama):
    models.edit_json(llama / "config.json", quantization_config=None)
    resolve(llama)
    assert forbidden_fields({"a": {"auto_map": {}}}).keys() == {"auto_map"}


def test_code_named_by_a_tokenizer_is_refused(llama):
    (llama / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json has 'auto_map'"):
        resolve(llama)


def test_directories_without_a_config(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="merge it"):
        resolve(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"one \.gguf file"):
        resolve(tmp_path)


def test_links_out_of_the_checkpoint_are_refused(tmp_path, llama):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (llama / "vocab.txt").symlink_to(outside / "secret.txt")
    with pytest.raises(CorruptFileError, match=r"vocab\.txt is a link that leaves"):
        resolve(llama)
    (llama / "vocab.txt").unlink()
    shutil.move(llama / "model.safetensors", outside / "model.safetensors")
    (llama / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is a link that leaves"):
        resolve(llama)


def test_a_pipe_is_no_shard(llama):
    (llama / "model.safetensors").unlink()
    os.mkfifo(llama / "model.safetensors")
    with pytest.raises(CorruptFileError, match="not a regular file"):
        resolve(llama)


def test_companions_are_the_files_a_model_needs(llama):
    wanted = [
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "LICENSE",
        "licence.md",
        "Copying",
        "USE_POLICY.md",
        "preprocessor_config.json",
        "BASE_MODEL_README.md",
    ]
    unwanted = [
        "README.md",
        "modeling.py",
        "license_check.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "halve.json",
        "x.gguf",
    ]
    for name in [*wanted, *unwanted]:
        (llama / name).write_text("{}")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tools.jinja").write_text("x")
    names = {str(path.relative_to(llama)) for path in companions(llama)}
    assert names == {*wanted, "generation_config.json", "additional_chat_templates/tools.jinja"}


def test_a_packed_checkpoint_is_refused_with_the_way_to_the_plain_one(llama):
    (llama / "halve-packed.json").write_text("{}")
    assert not any(path.name == "halve-packed.json" for path in companions(llama))
    for read in (resolve, read_run):
        with pytest.raises(InputError, match=r"is a packed checkpoint: .*`halve unpack .*llama --out DIR`"):
            read(llama)
