"""Tiny random models of many families, built in code; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from halve.device import compute_dtype

VOCAB = 64
FORWARD_DTYPE = str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")
"""In which float32 models are multiplied unasked, which depends on the processor."""
OF_ONE_RUN = {"halve-measured.json", "report.html"}
"""What differs between runs that are otherwise equal to the byte: it holds times."""
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "sliding_window": 8}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_ROPE_FREE = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SMALL),
    "llama_tied": ("Llama", {**_SMALL, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**_SMALL, "sliding_window": 8}),
    "qwen2": ("Qwen2", _SMALL),
    "qwen3": ("Qwen3", {**_SMALL, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_SMALL, **_GEMMA}),
    "gemma3": ("Gemma3", {**_SMALL, **_GEMMA, "sliding_window_pattern": 2}),
    "phi": ("Phi", _SMALL),
    "phi3": ("Phi3", _SMALL),
    "opt": (
        "OPT",
        {**_ROPE_FREE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoX", _ROPE_FREE),
    "bloom": (
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mixtral": ("Mixtral", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_SMALL, **_MOE, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_SMALL, **_MOE, "head_dim": 8}),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def decoder(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random causal language model of ``family`` in evaluation mode."""
    name, settings = DECODERS[family]
    config_class = getattr(tf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model_class = getattr(tf, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    torch.manual_seed(seed)
    return _alive(model_class(config_class(**{**settings, **changes})))


def bert(seed: int = 0) -> Any:
    """Return a random masked language model."""
    torch.manual_seed(seed)
    return _alive(tf.BertForMaskedLM(tf.BertConfig(**_ROPE_FREE)))


def vit(seed: int = 0) -> Any:
    """Return a random vision transformer for 16 x 16 images in 4 x 4 patches."""
    torch.manual_seed(seed)
    settings = {
        key: _SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    return _alive(tf.ViTForImageClassification(tf.ViTConfig(**settings, image_size=16, patch_size=4)))


def resnet(seed: int = 0) -> Any:
    """Return a random ResNet for 16 x 16 grey images, with two stages of two blocks."""
    torch.manual_seed(seed)
    settings = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    return _alive(tf.ResNetForImageClassification(tf.ResNetConfig(**settings, layer_type="basic", num_labels=10)))


def convnext(seed: int = 0) -> Any:
    """Return a random ConvNeXt for 16 x 16 grey images, with two stages of two blocks."""
    torch.manual_seed(seed)
    settings = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}
    return _alive(tf.ConvNextForImageClassification(tf.ConvNextConfig(**settings, num_labels=10)))


_SEQ2SEQ = {"d_model": 32, "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_BART = {
    **_SEQ2SEQ,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    "max_position_embeddings": 128,
}
ENCODER_DECODERS = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_SEQ2SEQ, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_BART)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **_BART, num_mel_bins=8, max_source_positions=20, max_target_positions=64, suppress_tokens=None
        )
    ),
}


def seq2seq() -> dict[str, Any]:
    """Return settings of a tiny encoder-decoder like BART."""
    return dict(_BART)


def encoder_decoder(family: str, seed: int = 0) -> Any:
    """Return a random encoder-decoder of ``family`` in evaluation mode."""
    torch.manual_seed(seed)
    return _alive(ENCODER_DECODERS[family]())


def pairs(family: str, rows: int = 4, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch for an encoder-decoder: what the encoder reads, and what the decoder is fed."""
    decoder_ids = tokens(rows, length - 5, seed + 100)
    if family == "whisper":
        generator = torch.Generator().manual_seed(seed)
        return {"input_features": torch.randn(rows, 8, 40, generator=generator), "decoder_input_ids": decoder_ids}
    return {"input_ids": tokens(rows, length, seed), "decoder_input_ids": decoder_ids}


def llava(seed: int = 0) -> Any:
    """Return a random image-text model whose text tower is a Llama and whose vision tower is larger."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=4, projection_dim=32),
        text_config=tf.LlamaConfig(**_SMALL),
        image_token_index=3,
        vision_feature_layer=-2,
    )
    return _alive(tf.LlavaForConditionalGeneration(config))


def gemma4(seed: int = 0) -> Any:
    """Return a random model whose last blocks read the keys and values of earlier ones."""
    torch.manual_seed(seed)
    config = tf.Gemma4TextConfig(
        **{**_SMALL, "num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=8,
        sliding_window=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    )
    return _alive(tf.Gemma4ForCausalLM(config))


def mamba(seed: int = 0) -> Any:
    """Return a random state-space model, which multiplies with one of its weights without calling the layer."""
    torch.manual_seed(seed)
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=8, time_step_rank=8)
    return _alive(tf.MambaForCausalLM(config))


def tokens(rows: int = 8, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Return random token ids of shape (rows, length)."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def save(model: Any, path: Path, **options: Any) -> Path:
    """Save a model, and return where."""
    model.save_pretrained(path, **options)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _alive(model: Any) -> Any:
    # The default initialisation (0.02) makes blocks nearly the identity; larger weights make replay errors visible.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model.eval()


class Attention(nn.Module):
    """A block whose output projection is used without being called (F.linear inside MultiheadAttention)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.up(self.attention(x, x, x, need_weights=False)[0])
