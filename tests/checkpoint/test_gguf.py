"""GGUF files: they are dequantised into ordinary models, in silence."""

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoTokenizer
from transformers.utils import logging

from halve.checkpoint.load import load_model
from halve.text.special_tokens import put_before_text
from halve.transformers_internals import without_progress_bars

gguf = pytest.importorskip("gguf")

_WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc"]


def tiny(path, adds_bos=None):
    """Write a Llama of one block and a byte-pair tokenizer of eight words."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(_WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_WORDS)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(_WORDS), 32),
        "output": (len(_WORDS), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def shown_bars():
    """A user who has switched all bars on."""
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not before:
        logging.disable_progress_bar()


@pytest.mark.usefixtures("shown_bars")
def test_a_gguf_file_is_loaded_in_silence(tmp_path, capfd):
    loaded = load_model(tiny(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not hasattr(loaded.model.config, "quantization_config")
    assert not hasattr(loaded.model, "hf_quantizer")
    assert loaded.tokenizer.tokenize("abc") == ["abc"]


def test_whoever_wants_no_bars_still_gets_none_afterwards():
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with without_progress_bars():
            assert not logging.is_progress_bar_enabled()
        assert not logging.is_progress_bar_enabled()
    finally:
        if before:
            logging.enable_progress_bar()


@pytest.mark.parametrize(("adds_bos", "expected"), [(None, ()), (False, ()), (True, (1,))])
def test_the_file_says_whether_text_begins_with_bos(tmp_path, adds_bos, expected):
    tokenizer = load_model(tiny(tmp_path / "tiny.gguf", adds_bos)).tokenizer
    assert put_before_text(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path / "saved")
    assert put_before_text(AutoTokenizer.from_pretrained(tmp_path / "saved")) == expected
