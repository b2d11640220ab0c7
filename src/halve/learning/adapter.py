"""An adapter as numbers and as files: what it adds to which matrix, read from a directory that nobody here wrote.

Nothing here needs peft. The files are peft's: ``adapter_config.json`` and ``adapter_model.safetensors``. Pickles are
refused, and so is whatever would have to be left out for the merged model to be another function than the adapter's.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec import Struct
from torch import Tensor

from halve.checkpoint.directory import contained
from halve.checkpoint.durable import filling
from halve.checkpoint.shards import file_of, read_json, read_shard, read_tensor
from halve.checkpoint.validated import shown, validated
from halve.errors import CorruptFileError, InputError, UnsupportedModelError, first_few
from halve.maths.linalg import is_finite
from halve.maths.pattern import apply_mask

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
MASK = "halve_mask"
"""The field of an adapter's config that says that its update counts on the non-zeros of its base alone."""
NON_ZEROS = "nonzero"
"""The value of that field."""
PREFIX = "base_model.model."
"""What peft puts before the name of every module."""

Kind = Literal["lora", "hira"]

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|hira_A|hira_B)(?:\.weight)?"
)
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")
"""What peft saves besides of an output layer that an adapter is for: the layer's own weight."""
_PARTS = {"lora": ("lora_A", "lora_B"), "hira": ("hira_A", "hira_B")}
_MAGNITUDE = "lora_magnitude_vector"
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base as it is; others (PiSSA, OLoRA, CorDA, …) are relative to a base they changed."""
_USED = {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "peft_type", MASK}
_IGNORED = {  # what says nothing of the trained function, or what the tensors say themselves
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "hira_dropout",
    "fan_in_fan_out",
    "init_weights",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
}
_LONGEST_PATTERN, _MOST_REPEATS = 500, 3


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an adapter does to one matrix.

    Attributes:
        kind: ``lora`` adds ``s·BA``, ``hira`` multiplies elementwise by ``1 + BA``.
        first: A, (rank, d_in).
        second: B, (d_out, rank).
        scaling: s, of LoRA alone.
        magnitude: (d_out,), the norms that DoRA gives the rows of ``W + s·BA``; None leaves theirs.
    """

    kind: Kind
    first: Tensor
    second: Tensor
    scaling: float = 1.0
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix that it belongs to."""
        return self.second.shape[0], self.first.shape[1]

    def merged(self, weight: Tensor, *, masked: bool) -> Tensor:
        """Return the matrix with the adapter in it, float32 on the CPU.

        Products are float64, so that the result hardly depends on how they are summed up: a training that ends by
        merging and a later merge of the saved adapter give the same bits.

        Args:
            weight: (d_out, d_in), W, any float dtype.
            masked: whether what W has as zero stays zero.
        """
        base = weight.detach().to("cpu", torch.float64)
        product = self.second.detach().to("cpu", torch.float64) @ self.first.detach().to("cpu", torch.float64)
        if self.kind == "hira":
            return (base + base * product).float() + 0.0
        whole = base + self.scaling * product
        if self.magnitude is not None:
            size = self.magnitude.detach().to("cpu", torch.float64) / whole.norm(dim=1)
            whole = whole * size.unsqueeze(-1)
        return apply_mask(whole.float(), base != 0) if masked else whole.float()


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter.

    Attributes:
        updates: by the full name of the module in the model.
        masked: whether it was trained with the mask of its base, so that it adds nothing to zeros; HiRA always is.
        base: what its config names as its base model, empty where it names none.
        copies: weights of its base that peft has saved with it, by the full name of the module: they are to be those
            of the model that it is merged into.
    """

    updates: Mapping[str, Update]
    masked: bool
    base: str
    copies: Mapping[str, Tensor] = field(default_factory=dict)


class _Config(Struct, frozen=True, kw_only=True):
    peft_type: str
    base_model_name_or_path: str | None = None
    lora_alpha: float = 8
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    halve_mask: str | None = None


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter that peft, or Halve, has saved.

    Standard LoRA (with ranks and alphas by module, rank-stabilised scaling, DoRA) and HiRA are understood.

    Args:
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        InputError: it is no directory, or has no adapter.
        UnsupportedModelError: the weights are pickled, or it is an adapter of another kind, or it trains something
            besides low-rank updates of matrices: embeddings, biases, whole modules.
        CorruptFileError: a file is malformed, a link that leaves the directory, or the tensors do not fit together.
    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).exists():
        what = f"has no {CONFIG}" if path.is_dir() else "is not a directory"
        raise InputError(f"{directory} {what}: give the directory of an adapter that peft has saved")
    if not (path / WEIGHTS).exists():
        if (path / "adapter_model.bin").exists():
            raise UnsupportedModelError(
                f"{directory} has only pickled weights (adapter_model.bin), which can run code when read: save the "
                "adapter again where you trust it, with save_pretrained of peft, as safetensors"
            )
        raise InputError(f"{directory} has no {WEIGHTS}: give the directory of an adapter that peft has saved")
    content = read_json(contained(path, path / CONFIG))
    config = validated(content, _Config, path / CONFIG, "save the adapter again with peft", fault="is malformed")
    kind = _kind(config, content, path / CONFIG)
    copies: dict[str, Tensor] = {}
    return Adapter(
        updates=_updates(kind, config, path, copies),
        masked=kind == "hira" or config.halve_mask is not None,
        base=config.base_model_name_or_path or "",
        copies=copies,
    )


def _kind(config: _Config, content: Mapping[str, Any], path: Path) -> Kind:
    """Return the kind of an adapter; refuse those whose merged weights would not be the adapter's function."""
    kind = config.peft_type.lower()
    if kind not in _PARTS:
        raise UnsupportedModelError(
            f"{path} is an adapter of type {shown(config.peft_type)}, and LoRA and HiRA can be merged: merge it with "
            "peft into the dense model, and prune that"
        )
    if config.halve_mask not in (None, NON_ZEROS):
        raise UnsupportedModelError(
            f"{path} has the mask {shown(repr(config.halve_mask))}, and this version of Halve knows {NON_ZEROS!r}: "
            "merge it with the version that trained it"
        )
    if config.init_lora_weights not in _INITIAL:
        raise UnsupportedModelError(
            f"{path} began with init_lora_weights {shown(repr(config.init_lora_weights))}, which changed the base "
            "weights: save it relative to the given base (path_initial_model_for_weight_conversion of peft)"
        )
    trained = content.get("bias")
    if trained not in (None, "none"):
        raise UnsupportedModelError(
            f"{path} trains biases too (bias {shown(repr(trained))}), which a merge would lose: train with bias 'none'"
        )
    others = sorted(
        name for name, value in content.items() if name not in _USED | _IGNORED | {"bias"} and _says_something(value)
    )
    if others:
        raise UnsupportedModelError(
            f"{path} sets {shown(first_few(others))}, which goes beyond low-rank updates of matrices and would be lost "
            "by a merge: train an adapter without it"
        )
    return "lora" if kind == "lora" else "hira"


def _says_something(value: object) -> bool:
    return value not in (None, False, 0, "", [], {})


def _updates(kind: Kind, config: _Config, directory: Path, copies: dict[str, Tensor]) -> dict[str, Update]:
    """Return the updates by module, and put copies of base weights into ``copies``."""
    path = directory / WEIGHTS
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    allowed = {*_PARTS[kind], *([_MAGNITUDE] if config.use_dora else [])}
    strange: list[str] = []
    for entry in read_shard(contained(directory, path)).tensors:
        if copy := _COPY.fullmatch(entry.name):
            copies[copy["module"]] = read_tensor(entry)
            continue
        match = _KEY.fullmatch(entry.name)
        if match is None or match["part"] not in allowed:
            strange.append(entry.name)
            continue
        if match["part"] in found[match["module"]]:
            raise CorruptFileError(f"{path} has {shown(match['module'])}.{match['part']} twice: save the adapter again")
        tensor = read_tensor(entry)
        if not tensor.is_floating_point() or not is_finite(tensor):
            raise CorruptFileError(
                f"tensor {shown(repr(entry.name))} of {path} is not of finite floating-point numbers: save or train "
                "the adapter again"
            )
        found[match["module"]][match["part"]] = tensor
    if strange:
        raise UnsupportedModelError(
            f"{path} holds {shown(first_few(strange))}, which is no low-rank update of a matrix and would be lost by a "
            "merge: train an adapter without embeddings, biases or modules_to_save"
        )
    if not found:
        raise CorruptFileError(f"{path} holds no tensor: save the adapter again")
    return {module: _update(kind, config, module, parts, directory) for module, parts in sorted(found.items())}


def _update(kind: Kind, config: _Config, module: str, parts: Mapping[str, Tensor], directory: Path) -> Update:
    path = directory / WEIGHTS
    first, second = (parts.get(name) for name in _PARTS[kind])
    magnitude = parts.get(_MAGNITUDE)
    if first is None or second is None or (config.use_dora and magnitude is None):
        raise CorruptFileError(f"{path} holds a part of the update of {shown(module)} only: save the adapter again")
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1] or not first.shape[0]:
        raise CorruptFileError(
            f"{path} has A of shape {tuple(first.shape)} and B of {tuple(second.shape)} for {shown(module)}, whose "
            "ranks must be the same: save the adapter again"
        )
    if magnitude is not None and magnitude.shape != second.shape[:1]:
        raise CorruptFileError(
            f"{path} has a magnitude of shape {tuple(magnitude.shape)} for the {second.shape[0]} rows of "
            f"{shown(module)}: save the adapter again"
        )
    scaling = 1.0
    if kind == "lora":
        alpha = _alpha(config, module, directory / CONFIG)
        if not math.isfinite(alpha):
            raise CorruptFileError(f"{directory / CONFIG} has an alpha of {alpha}: save the adapter again")
        scaling = alpha / (math.sqrt(first.shape[0]) if config.use_rslora else first.shape[0])
    return Update(kind=kind, first=first, second=second, scaling=scaling, magnitude=magnitude)


def _alpha(config: _Config, module: str, path: Path) -> float:
    """Return the alpha of a module, as peft finds it: by the first pattern that its name ends with."""
    for pattern, alpha in (config.alpha_pattern or {}).items():
        # Nobody here wrote these expressions: only such as cannot take forever are tried.
        repeats = len(re.findall(r"[*+{?]", pattern))
        if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)\s*[*+{?]", pattern):
            raise UnsupportedModelError(
                f"{path} has the alpha_pattern {shown(repr(pattern))}, which is too involved to be tried: name the "
                "modules plainly"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        except re.error as error:
            raise CorruptFileError(
                f"{path} has the alpha_pattern {shown(repr(pattern))}, which is no regular expression ({error}): save "
                "the adapter again"
            ) from error
    return config.lora_alpha


def write_adapter(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str, *, again: bool = False
) -> None:
    """Write an adapter's files, whole or none of them.

    Args:
        directory: absent or empty.
        config: the content of ``adapter_config.json``.
        tensors: by their names in peft's file.
        card: the content of its README.md.
        again: whether files of those names may be there, to be replaced.

    Raises:
        InputError: the directory holds something.
        HalveError: the volume is full or failed.
    """
    own = (WEIGHTS, CARD, CONFIG) if again else ()
    if directory.exists() and (
        not directory.is_dir() or any(not path.name.lstrip(".").startswith(own) for path in directory.iterdir())
    ):
        raise InputError(f"{directory} is not an empty directory: give a new one for the adapter")
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    with filling(directory) as write:
        write(WEIGHTS, file_of(dict(sorted(tensors.items()))), "adapter")
        write(CARD, [card.encode()], "card")
        write(CONFIG, [text.encode()], "adapter")
