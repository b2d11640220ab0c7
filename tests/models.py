"""Tiny random models of many families, built in code; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf

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
