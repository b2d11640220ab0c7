"""Tiny random models of the classes that transformers can build, for `sweep.py`.

A model starts from its class's own default configuration, which is shrunk field by field: what a field means is read
off its name (widths, heads, layers, experts, special tokens, …), in every configuration inside it too. A family whose
fields need more than that has a row in `FAMILIES`. Weights are random and large enough that nothing is the identity:
a gate of zeros or a scale of ones would hide what is wrong behind it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_families import EXPERTS, FAMILIES, IMAGE_PLACES, VOCABULARY

MOST_WEIGHTS = 5_000_000
"""A model with more weights than this is not built: its configuration was not shrunk as it should be."""
FIRST_SPECIAL = 64
"""Special tokens of a family are numbered from here on, ordinary ones are below."""
FIRST_ORDINARY = 8

KINDS = {
    "causal": ("CAUSAL_LM",),
    "image-text": ("IMAGE_TEXT_TO_TEXT",),
    "images": ("IMAGE_TEXT_TO_TEXT",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("SPEECH_SEQ_2_SEQ",),
    "masked": ("MASKED_LM",),
    "vision": ("IMAGE_CLASSIFICATION",),
    "audio": ("AUDIO_CLASSIFICATION", "CTC"),
}
"""Kinds of models, and the lists of transformers that name their classes; ``images`` has some of ``image-text`` again,
calibrated with images in their text."""


@dataclass(frozen=True)
class Case:
    """One class of transformers.

    Attributes:
        kind: one of `KINDS`.
        family: the family's name in transformers, its ``model_type``.
        cls: the class's name.
    """

    kind: str
    family: str
    cls: str

    @property
    def name(self) -> str:
        """What the case is called: two families may share a class, and a family may be of two kinds."""
        return f"{self.kind}:{self.family}:{self.cls}"


def cases(kinds: Iterable[str] = KINDS) -> list[Case]:
    """Return all classes of these kinds that the installed transformers names."""
    found: dict[str, Case] = {}
    for kind in kinds:
        for task in KINDS[kind]:
            for family, classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
                if kind == "images" and family not in IMAGE_PLACES:
                    continue
                for cls in (classes,) if isinstance(classes, str) else classes:
                    case = Case(kind, family, cls)
                    found.setdefault(case.name, case)
    return list(found.values())


class CannotBuildError(Exception):
    """A tiny model of a class cannot be built here, and why."""


_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|.*_vocab_size|n_vocab|vocab_size_.*|.*_vocab", VOCABULARY),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj_dim|hidden_dim|emb_dim|dim|model_dim", 32),
    (r".*_hidden_size|.*_embed_dim|embedding_dim|projection_dim|.*projection_size|out_hidden_size|.*hidden_dim", 32),
    (r"hidden_size_.*|output_dim|output_size|.*output_dim|adapter_in_dim|adapter_out_dim", 32),
    (r"intermediate_size|.*ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner|.*ffn_hidden_size|mlp_dim|.*intermediate_size", 64),
    (r"intermediate_size_.*|.*intermediate_dim|ffn_size|.*ffn_.*_size", 64),
    (r"moe_(?!shared).*intermediate_size|.*expert.*intermediate_size|expert_ffn_hidden_size|moe_.*ffn.*", 16),
    (r".*attention_heads|n_heads?|num_heads|.*encoder_heads|attention_heads|.*_n_heads|.*attn_heads", 4),
    (r"num_key_value_heads|.*num_key_value_heads|num_kv_heads|kv_n_heads|num_kv_groups|multi_query_group_num", 2),
    (r"linear_num_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"head_dim|.*_head_dim|d_head|d_kv|head_size|dim_head|kv_channels|linear_head_dim|attention_head_size", 8),
    (r"qk_head_dim", 16),
    (r"q_lora_rank|kv_lora_rank|.*lora_rank|.*_rank|lora_r", 16),
    (r"state_size|mamba_d_state|ssm_state_size|.*d_state", 16),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|ssm_num_heads", 4),
    (r"mamba_d_ssm|mamba_intermediate.*", 64),
    (r"mamba_n_groups|n_groups|mamba_ngroups|o_groups", 1),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"time_step_rank|.*dt_rank", 16),
    (
        r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|.*num_experts|n_experts|num_moe_experts",
        EXPERTS,
    ),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|.*experts_per_tok.*|top_k_experts|num_selected_experts|topk", 2),
    (r"topk_group", 1),
    (r"n_group|num_expert_group", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|model_max_length", 128),
    (r"max_(source|target)_positions|.*max_position_embeddings|max_2d_position_embeddings", 128),
    (r"sliding_window(_size)?|.*sliding_window|local_attention|attention_chunk_size|window_size_.*", 8),
    (r"index_topk|index_top_k", 8),
    (r"type_vocab_size", 2),
    (r"num_channels|in_channels", 3),
    (r"image_size|.*image_size|img_size|resolution", 16),
    (r"patch_size|.*_patch_size(?<!temporal_patch_size)", 4),
    (r"num_mel_bins|.*mel_bins|n_mels|feature_size|input_feat_per_channel", 16),
    (r"conv_channels|.*conv_channels", 16),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"classifier_proj_size|codevector_dim|proj_codevector_dim|xvector_output_dim", 16),
    (r"codebook_dim", 32),
    (r"codebook_size|num_embeddings|num_codevectors_per_group", 32),
    (r"base_channels|latent_channels|z_channels|(?!audio|input).*_channels", 32),
    (r"num_query_tokens|.*n_latents|num_latents|latent_query_num|num_queries", 8),
    (r"mask_(time|feature)_length", 2),
    (r"rotary_dim", 4),
    (r"resampler_depth|num_adapter_layers", 1),
)
_LAYERS = re.compile(
    r"(num_|n_)?(hidden_|text_|encoder_|decoder_)?(layers?|depth)|.*num_hidden_layers|n_layers?|.*encoder_layers|"
    r".*decoder_layers|num_blocks|num_layers_.*|depth|layers|.*_depth|num_(en|de)coder_layers"
)
_KINDS_OF_LAYERS = re.compile("layer_types|layers_block_type|mlp_layer_types")
_TOKEN = re.compile(r".*token_(id|index)s?|(boi|eoi|boa|eoa|image|video|audio|pad|bos|eos|.*_start|.*_end)_(id|index)")
_TOWER = re.compile("vision|audio|speech|image|sam_config|vq|qformer")
_LAYER_INDICES = re.compile(r".*(_indexes|_idxs|_indices|_layers|_layer_ids|_idx|feature_layers?)$")
_SIZE_PATTERNS = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
_KEEP = {
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "transformers_version",
    "architectures",
    "dtype",
    "ignore_keys_at_rope_validation",
}


def _size(key: str) -> int | None:
    # Later rows are more particular than earlier ones, except that a whole name beats a pattern with a wildcard.
    matching = [(pattern, value) for pattern, value in _SIZE_PATTERNS if pattern.fullmatch(key)]
    exact = [value for pattern, value in matching if key in pattern.pattern.split("|")]
    return exact[-1] if exact else matching[-1][1] if matching else None


@dataclass(frozen=True)
class _Level:
    """What is known of one configuration, which may be inside another, while its fields are shrunk.

    Attributes:
        path: where it is, with a dot at the end; empty for the outermost.
        chosen: which of the default's layers stay.
        lengths: how long lists with one entry a layer are.
        latent: whether keys and values come from a latent vector.
    """

    path: str
    chosen: list[int]
    lengths: set[int]
    latent: bool


class _Shrinker:
    """Shrinks the configurations of one family; special tokens get numbers that are all different."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self._overrides = overrides
        self._tokens: dict[str, int] = {}

    def config(self, config_class: Any, path: str = "", start: Any = None) -> Any:
        """Return a small configuration of a class; ``path`` ends in a dot inside another configuration."""
        own = FAMILIES.get(config_class.model_type, {})
        self._overrides = {**{f"{path}{key}": value for key, value in own.items()}, **self._overrides}
        default = self._default(config_class, path) if start is None else start
        fields = {key: value for key, value in vars(default).items() if not key.startswith("_") and key not in _KEEP}
        counts = {value for key, value in fields.items() if _LAYERS.fullmatch(key) and isinstance(value, int)}
        counts |= {len(value) for key, value in fields.items() if _KINDS_OF_LAYERS.fullmatch(key) and value}
        chosen = _chosen_layers(fields, counts, self._asked_layers(path))
        level = _Level(path, chosen, counts - set(range(5)), "kv_lora_rank" in fields)
        small = {key: self._value(key, value, level) for key, value in fields.items()}
        if not path and any(key in fields for key in ("depths", "depth", "sr_ratios", "encoder_stride")):
            small["image_size"] = 64  # each stage halves it
        small.update(self._of(path))
        small = {key: value for key, value in small.items() if value is not _ABSENT}
        return config_class(**small)

    def _default(self, config_class: Any, path: str) -> Any:
        """Return the default configuration; one that its own class refuses begins with the overrides."""
        try:
            return config_class()
        except Exception:  # noqa: BLE001 - whatever it is, the overrides have to mend it
            return config_class(**self._of(path))

    def _of(self, path: str) -> dict[str, Any]:
        """Return the overrides of the configuration at ``path``."""
        return {
            key.removeprefix(path): value
            for key, value in self._overrides.items()
            if key.startswith(path) and "." not in key.removeprefix(path)
        }

    def _asked_layers(self, path: str) -> int:
        """Return how many layers a stack gets: fewer where it feeds a language model, which is larger in real ones."""
        asked = [value for key, value in self._of(path).items() if _LAYERS.fullmatch(key) and isinstance(value, int)]
        return asked[0] if asked else 2 if _TOWER.search(path) else 3

    def _value(self, key: str, value: Any, level: "_Level") -> Any:
        if f"{level.path}{key}" in self._overrides:
            return self._overrides[f"{level.path}{key}"]
        if isinstance(value, transformers.PretrainedConfig):
            return self.config(type(value), f"{level.path}{key}.", value)
        if isinstance(value, bool) or value is None or isinstance(value, str | float):
            return value
        if isinstance(value, int):
            return self._number(key, value, level)
        if isinstance(value, dict):
            return _rope(value) if "rope" in key else value
        if isinstance(value, list | tuple):
            return self._sequence(key, value, level)
        return value

    def _number(self, key: str, value: int, level: "_Level") -> int:
        if _TOKEN.fullmatch(key):
            return self._token(key, value)
        if _LAYERS.fullmatch(key):
            return min(value, len(level.chosen))
        if key == "window_size":
            return min(value, 4)
        size = _size(key)
        if size is None or value <= 0:
            return value
        if key in {"n_group", "num_expert_group", "topk_group"}:
            return min(value, size)
        if key == "num_key_value_heads" and level.latent:
            return 4  # keys and values come from a latent vector, one of each a head
        # Real towers are smaller than what they feed.
        return size // 2 if size == 64 and _TOWER.search(level.path) else size

    def _token(self, key: str, value: int) -> int:
        if value < FIRST_ORDINARY:
            return value
        if key not in self._tokens:
            self._tokens[key] = FIRST_SPECIAL + len(self._tokens) % (VOCABULARY - FIRST_SPECIAL)
        return self._tokens[key]

    def _sequence(self, key: str, value: Any, level: "_Level") -> Any:
        if _TOKEN.fullmatch(key):
            return type(value)(self._token(f"{key}{i}", item) for i, item in enumerate(value))
        if len(value) in level.lengths and _per_layer(key, value):
            return type(value)(value[i] for i in level.chosen)
        if (stages := _stages(key, value)) is not None:
            return type(value)(stages)
        if _LAYER_INDICES.fullmatch(key) and all(isinstance(item, int) for item in value) and value:
            kept = [item for item in value if item < len(level.chosen)]
            return type(value)(kept or [len(level.chosen) - 1])
        return value


def _stages(key: str, value: Any) -> list[int] | None:
    """Return what a list with one number a stage of a vision model becomes; None if it is none."""
    if key == "conv_dim":  # of a feature extractor that makes waveforms shorter
        return [16] * len(value)
    if not 2 <= len(value) <= 5 or not all(isinstance(item, int) for item in value):
        return None
    if key in {"depths", "depth", "layers_repeats"}:
        return [min(item, 2) for item in value]
    if key in {"hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_sizes"}:
        return [16, 32, 32, 64, 64][: len(value)]
    if key in {"num_heads", "num_attention_heads"}:
        return [min(item, 2) for item in value]
    return None


_ABSENT = object()
"""In the place of a value: leave the field to the class."""


def _per_layer(key: str, value: Any) -> bool:
    return not isinstance(value[0], list | tuple | dict) and not key.startswith(("conv_", "tdnn_", "upsampl"))


def _chosen_layers(fields: dict[str, Any], counts: set[int], asked: int) -> list[int]:
    """Choose which layers of the default configuration stay: at least three, and at least one of every sort."""
    total = max([*counts, 3])
    lists = [
        value
        for key, value in fields.items()
        if isinstance(value, list | tuple) and len(value) in counts and len(value) > 4 and _per_layer(key, value)
    ]
    if not lists:
        return list(range(asked))
    seen: set[tuple[int, Any]] = set()
    chosen: list[int] = []
    for index in range(min(total, *(len(each) for each in lists))):
        new = {(n, each[index]) for n, each in enumerate(lists) if isinstance(each[index], str)} - seen
        if new:
            chosen.append(index)
            seen |= new
    for index in range(total):
        if len(chosen) >= asked:
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Fit the sections of multimodal rotary embeddings, and factors by frequency, to heads of 8."""
    small = {key: _rope(item) if isinstance(item, dict) else item for key, item in value.items()}
    if "mrope_section" in small:
        small["mrope_section"] = [2, 1, 1] if len(small["mrope_section"]) == 3 else [1, 1, 1, 1]
    for key in ("short_factor", "long_factor"):
        if small.get(key) is not None:
            small[key] = [1.0] * 4
    return small


def model_class(case: Case) -> Any:
    """Return the class itself."""
    found = getattr(transformers, case.cls, None)
    if found is None:
        module = modeling_auto.model_type_to_module_name(case.family)  # type: ignore[attr-defined]
        found = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), case.cls, None)
    if found is None:
        raise CannotBuildError(f"transformers has no class {case.cls}")
    return found


def tiny_config(case: Case) -> Any:
    """Return the small configuration of a class."""
    cls = model_class(case)
    config_class = cls.config_class or CONFIG_MAPPING[case.family]
    overrides = {**FAMILIES.get(case.family, {}), **FAMILIES.get(case.name, {})}
    config = _Shrinker(overrides).config(config_class)
    config.use_cache = getattr(config, "use_cache", True)
    return config


def count_weights(cls: Any, config: Any) -> int:
    """Count the weights of a model without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls._from_config(config).parameters())


def tiny_model(case: Case, seed: int = 0) -> Any:
    """Return a random model of a class, in float32 and evaluation mode.

    Raises:
        CannotBuildError: the class has no small configuration here, or needs a package that is not installed.
    """
    cls = model_class(case)
    config = tiny_config(case)
    try:
        weights = count_weights(cls, config)
    except (NotImplementedError, RuntimeError):  # something in the class needs real tensors
        weights = 0
    if weights > MOST_WEIGHTS:
        raise CannotBuildError(f"it would have {weights / 1e6:.0f} million weights")
    torch.manual_seed(seed)
    model = cls._from_config(config).float().eval()
    return enliven(model, seed)


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make weights large enough that each block changes its input, and nothing constant; returns the model."""
    random = torch.Generator().manual_seed(seed)
    matrices = {
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
        and (
            parameter.ndim == 3
            or isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            or type(module).__name__ == "Conv1D"
        )
    }
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if id(parameter) in matrices:
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                if spread < 0.1:
                    parameter.copy_(noise * 0.1)
            elif parameter.numel() and float(parameter.max()) == float(parameter.min()):
                parameter.add_(noise * 0.1)
    return model
