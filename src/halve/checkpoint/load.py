"""Reading models that nobody here wrote: find the files, refuse what is unsafe or broken, then load.

A checkpoint directory is untrusted input. No code in it is run unless the user says so, nothing is unpickled, no file
outside it is read, and transformers is shown only the files that were validated here.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from halve.checkpoint.attention import choices
from halve.checkpoint.directory import (
    CONFIG,
    INDEX,
    check_config,
    companions,
    refuse_packed,
    refuse_unfinished,
)
from halve.checkpoint.disk_layout import DiskLayout, DiskTensor
from halve.checkpoint.hub import download, similar
from halve.checkpoint.mapped import Weights
from halve.checkpoint.quantised import refuse_quantised
from halve.checkpoint.shards import read_json, read_shard
from halve.checkpoint.weight_files import read_weights
from halve.errors import CorruptFileError, InputError, UnsupportedModelError, first_few, one_line
from halve.maths.linalg import is_finite
from halve.transformers_internals import (
    build,
    dequantising,
    forget_quantisation,
    without_progress_bars,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILES = ("tokenizer", "vocab.", "spiece.", "sentencepiece.", "tekken.")  # how their names begin
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, its files found and validated.

    Attributes:
        kind: what the user named; ``packed`` is only what `halve.load` opens.
        path: the directory, or the GGUF file, on disk.
        name: what the user wrote.
        revision: the commit that was downloaded; None unless from the hub.
        shards: the safetensors files that are loaded, in the order of their names; empty for a GGUF file.
        trust_remote_code: whether the user trusts the Python code in the directory.
        carried: the safetensors files that transformers does not load; a checkpoint written from this one has them too.
        copies: the safetensors files with a second copy of the weights.
        index: the index of the safetensors files; None where there is none that belongs to them.
    """

    kind: Literal["directory", "hub", "gguf", "packed"]
    path: Path
    name: str
    revision: str | None = None
    shards: tuple[Path, ...] = ()
    trust_remote_code: bool = False
    carried: tuple[Path, ...] = ()
    copies: tuple[Path, ...] = ()
    index: Path | None = None

    @property
    def size(self) -> int:
        """Size of the weight files in bytes, those included that are carried along."""
        return sum(path.stat().st_size for path in (*self.shards, *self.carried) or (self.path,))


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to be pruned.

    Attributes:
        model: on the CPU, in evaluation mode, no parameter requiring a gradient.
        tokenizer: the model's tokenizer, None when it has none.
        source: where it came from; None for a model built in memory.
        notes: what the user should know of how it was loaded, a sentence each.
        weights: where they lie, in memory or on disk.
        decoding: of a packed model, why each next token is computed module by module; empty where it is computed in one
            call, and of a plain model, for which `halve.accelerate` says it.
    """

    model: "PreTrainedModel"
    tokenizer: Any | None
    source: Source | None
    notes: tuple[str, ...] = ()
    weights: Weights = field(default_factory=Weights)
    decoding: str = ""

    @cached_property
    def layout(self) -> DiskLayout:
        """The map from parameters to tensors on disk.

        Raises:
            UnsupportedModelError: a parameter cannot be traced to its tensors.
        """
        if self.source is not None and self.source.kind == "packed":
            raise UnsupportedModelError(f"{self.source.name} is packed: restore the plain one with `halve unpack`")
        if self.source is None or not self.source.shards:
            return DiskLayout(self.model)
        entries = [entry for path in self.source.shards for entry in read_shard(path).tensors]
        return DiskLayout(self.model, [DiskTensor(entry.name, entry.dtype, entry.shape) for entry in entries])


def resolve(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> Source:
    """Find and validate the files of a model, without loading it.

    Args:
        source: a directory, a ``.gguf`` file, or the name of a model on the Hugging Face hub, which is downloaded
            (from the local cache when ``HF_HUB_OFFLINE`` is set).
        revision: branch, tag or commit; only for a model on the hub.
        trust_remote_code: whether to accept a model that comes with Python code of its own, and to run it.
        weights: False looks at the settings alone, and downloads no more: enough for `skeleton`.

    Raises:
        InputError: nothing usable under that name.
        UnsupportedModelError: a checkpoint that cannot be pruned safely or faithfully.
        CorruptFileError: a file is missing, truncated or malformed, or points outside the checkpoint.
    """
    name, path = str(source), Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(f"revision {revision!r} was given, but {name} is on this disk: leave the revision out")
        if path.is_dir():
            found = _validate_directory(path, code=trust_remote_code, weights=weights)
            return Source("directory", path, name, None, trust_remote_code=trust_remote_code, **found)
        return _resolve_gguf(path, name)
    if isinstance(source, Path) or _is_clearly_a_path(name):
        near = similar(path)
        raise InputError(
            f"{name} does not exist: {f'did you mean {near}? ' if near else ''}give a directory, a .gguf file, or a "
            "model name such as org/model"
        )
    path = download(name, revision, code=trust_remote_code, weights=weights)
    found = _validate_directory(path, code=trust_remote_code, weights=weights)
    return Source("hub", path, name, path.name, trust_remote_code=trust_remote_code, **found)


def load_model(
    source: str | Path | Source,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer on the CPU.

    Args:
        source: as for ``resolve``, or what it returned.
        dtype: of the parameters in memory; None takes the checkpoint's own, and float32 for a GGUF file, which is
            dequantised.
        trust_remote_code: as for ``resolve``.
        attention: implementation of attention (`halve.checkpoint.attention.KINDS`); None is the config's own, or one
            that runs on every device where that does not.

    Raises:
        InputError: as ``resolve``; a parameter that is NaN or infinite; a tokenizer that cannot be loaded.
        UnsupportedModelError: as ``resolve``; an architecture that transformers does not have; weights that are not
            plain floating point on disk; a parameter that the checkpoint does not hold and that would be random.
        CorruptFileError: as ``resolve``.
    """
    found = source if isinstance(source, Source) else resolve(source, trust_remote_code=trust_remote_code)
    refuse_quantised(found.name, found.shards, lambda: skeleton(found))
    with validated_files(found) as directory:
        gguf = {"gguf_file": found.path.name} if found.kind == "gguf" else {}
        with without_progress_bars():
            model, note = _load_weights(found, directory, dtype, gguf, attention=attention)
            tokenizer = _load_tokenizer(found, directory, gguf)
    freeze(model, found.name)
    loaded = LoadedModel(model, tokenizer, found, (note,) if note else ())
    _ = loaded.layout  # a checkpoint that could not be written back is refused now, not after the work
    return loaded


def load_feature_extractor(source: Source) -> Any:
    """Load what makes the inputs of a model that hears out of audio.

    Raises:
        InputError: it has none, or it cannot be loaded.
    """
    from transformers import AutoFeatureExtractor

    with validated_files(source) as directory:
        try:
            return AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
                directory, local_files_only=True, trust_remote_code=source.trust_remote_code
            )
        except Exception as error:  # a foreign config can provoke any error in there
            raise InputError(
                f"the feature extractor of {source.name} could not be loaded: {one_line(error)}; put its "
                "preprocessor_config.json beside the weights"
            ) from error


def load_tokenizer(source: Source) -> Any | None:
    """Load the tokenizer of a model that is no GGUF file; None where it has none.

    Raises:
        InputError: it cannot be loaded.
    """
    with validated_files(source) as directory:
        return _load_tokenizer(source, directory, {})


def assemble(
    source: Source,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> LoadedModel:
    """Load a model whose tensors are in memory already, exactly as if they were read from its files.

    Args:
        source: where everything else of it is.
        tensors: by their names on disk; where dtypes agree, parameters share their memory, whatever their strides.
        dtype: as for `load_model`.
        attention: as for `load_model`.

    Raises:
        InputError, UnsupportedModelError: as `load_model`, but NaN and infinity are not looked for.
    """
    with validated_files(source) as directory:
        model, note = _load_weights(source, directory, dtype, {}, tensors, attention=attention)
        return LoadedModel(model, _load_tokenizer(source, directory, {}), source, (note,) if note else ())


def freeze(model: "PreTrainedModel", name: str, weights: Weights | None = None) -> None:
    """Let no parameter require a gradient, and refuse one that is not finite.

    Args:
        model: the model.
        name: of the checkpoint.
        weights: where its weights lie; None is memory.

    Raises:
        InputError: a parameter is NaN or infinite.
    """
    weights = weights or Weights()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if not is_finite(parameter):
            raise InputError(f"parameter {parameter_name!r} of {name} holds NaN or infinity: mend the checkpoint")
        weights.done_with(parameter)


def skeleton(source: Source) -> "PreTrainedModel":
    """Build a model without its weights, on the meta device, in its own dtype (float32 where it names none).

    Args:
        source: what ``resolve`` returned, with or without its weights.

    Raises:
        UnsupportedModelError: an architecture that transformers does not have, or settings that it cannot use.
    """
    with validated_files(source) as directory:
        gguf = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
        model_class = _model_class(source, directory, gguf)
        options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
        from transformers import AutoConfig, PreTrainedModel

        try:
            config = AutoConfig.from_pretrained(directory, **gguf, **options)
            model: PreTrainedModel
            with torch.device("meta"):
                if issubclass(model_class, PreTrainedModel):
                    model = build(model_class, config)
                else:
                    model = model_class.from_config(config, trust_remote_code=source.trust_remote_code)
        except Exception as error:  # a foreign config can provoke any error in there
            raise UnsupportedModelError(f"transformers could not build {source.name}: {one_line(error)}") from error
    return model.eval()  # type: ignore[no-any-return, no-untyped-call]


def source_files(source: Source) -> list[Path]:
    """Return every file that belongs to a model; of a packed checkpoint, those that transformers reads.

    Raises:
        CorruptFileError: one of them is a link that leaves the checkpoint.
    """
    if source.kind == "gguf":
        return [source.path]
    if source.kind == "packed":
        return [source.path / CONFIG, *companions(source.path, code=source.trust_remote_code)]
    index = [] if source.index is None else [source.index]
    others = companions(source.path, code=source.trust_remote_code)
    return [source.path / CONFIG, *source.shards, *source.carried, *others, *index]


def has_tokenizer(source: Source) -> bool:
    """Whether a model comes with a tokenizer."""
    return source.kind == "gguf" or any(path.name.startswith(_TOKENIZER_FILES) for path in source_files(source))


def _is_clearly_a_path(name: str) -> bool:
    """Whether a name is for the disk alone: no model on the hub is called so, or the folder it would be in is here."""
    return not _HUB_ID.fullmatch(name) or name.endswith(".gguf") or ("/" in name and Path(name).parent.is_dir())


def _validate_directory(directory: Path, *, code: bool, weights: bool) -> dict[str, Any]:
    """Return what a `Source` says of the weight files of a directory."""
    refuse_packed(directory)
    refuse_unfinished(directory)
    check_config(directory, code=code)
    companions(directory, code=code)
    if not weights:
        return {}
    found = read_weights(directory)
    return {
        "shards": tuple(shard.path for shard in found.shards),
        "carried": tuple(shard.path for shard in found.carried),
        "copies": found.copies,
        "index": directory / INDEX if found.index else None,
    }


def _resolve_gguf(path: Path, name: str) -> Source:
    if path.suffix != ".gguf":
        raise InputError(f"{name} is a file: give the directory that holds the model, or a .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CorruptFileError(f"{path} does not begin with the GGUF signature: fetch it again")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise UnsupportedModelError(f"{path} is one part of a split GGUF model: merge the parts with gguf-split first")
    if find_spec("gguf") is None:
        raise InputError(f"{path} is a GGUF file and the gguf package is not installed: pip install 'halve[gguf]'")
    return Source("gguf", path, name)


@contextmanager
def validated_files(source: Source) -> Iterator[Path]:
    """Show the validated files that transformers is to read, and nothing else, in a directory of links."""
    with tempfile.TemporaryDirectory(prefix="halve-") as name:
        for path in source_files(source):
            if path in source.carried:
                continue
            link = Path(name) / (path.name if source.kind == "gguf" else path.relative_to(source.path))
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        yield Path(name)


def _load_weights(
    source: Source,
    directory: Path,
    dtype: torch.dtype | None,
    gguf: Any,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    attention: str | None = None,
) -> tuple["PreTrainedModel", str]:
    """Return the model, and what the user should know of the attention that it runs with; mostly nothing."""
    options: dict[str, Any] = {**gguf, "local_files_only": True, "trust_remote_code": source.trust_remote_code}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if gguf:
        options |= {"dtype": dtype or torch.float32, **dequantising()}
    else:
        options |= {"dtype": dtype or "auto", "use_safetensors": True}
    model_class = _model_class(source, directory, gguf)
    kinds, note = choices(attention, {} if gguf else read_json(directory / CONFIG))
    for kind in kinds:
        chosen = options if kind is None else {**options, "attn_implementation": kind}
        try:
            if tensors is None:
                model, info = model_class.from_pretrained(directory, **chosen)
            else:
                without_files, settings = _without_files(directory, model_class, code=source.trust_remote_code)
                model, info = without_files.from_pretrained(None, state_dict=dict(tensors), **settings, **chosen)
            break
        except Exception as error:  # a foreign config can provoke any error in there
            if kind is kinds[-1] or "attention" not in str(error).lower():
                raise UnsupportedModelError(f"transformers could not load {source.name}: {one_line(error)}") from error
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    random = sorted({*info["missing_keys"], *mismatched})
    if random:
        raise UnsupportedModelError(
            f"{source.name} does not hold {len(random)} of the model's tensors in the right shape, and they would be "
            f"random: {first_few(random)}"
        )
    if gguf:
        forget_quantisation(model)
    model.config.name_or_path = source.name  # else the name of a temporary directory
    return model.eval(), note


def _without_files(directory: Path, model_class: Any, *, code: bool) -> tuple[Any, dict[str, Any]]:
    """Return the class itself, and the settings that it would have read from files had it been given a directory."""
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel

    from halve.transformers_internals import get_class_from_dynamic_module

    if issubclass(model_class, PreTrainedModel):
        config = model_class.config_class.from_pretrained(directory, local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=code)
        model_class = get_class_from_dynamic_module(config.auto_map[model_class.__name__], directory)
    generation = None
    if model_class.can_generate():
        absent = not (directory / "generation_config.json").exists()
        named: dict[str, Any] = {"config_file_name": CONFIG, "_from_model_config": True} if absent else {}
        generation = GenerationConfig.from_pretrained(directory, local_files_only=True, **named)
    return model_class, {"config": config, "generation_config": generation}


def _model_class(source: Source, directory: Path, gguf: dict[str, str]) -> Any:
    import transformers

    if gguf:
        return transformers.AutoModelForCausalLM
    architectures = read_json(directory / CONFIG).get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise UnsupportedModelError(f"{source.path / CONFIG} must name one class under 'architectures'")
    if source.trust_remote_code and (auto := _auto_class(read_json(directory / CONFIG), architectures[0])):
        return getattr(transformers, auto, None)
    found = getattr(transformers, architectures[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{source.name} is a {architectures[0]}, which transformers {transformers.__version__} does not have"
        )
    return found


def _auto_class(config: Mapping[str, Any], architecture: str) -> str:
    """Return the name of the automatic class that finds ``architecture`` in the checkpoint's code, or nothing."""
    auto_map = config.get("auto_map")
    entries = auto_map.items() if isinstance(auto_map, dict) else ()
    return next((key for key, path in entries if str(path).endswith(f".{architecture}") and key.startswith("Auto")), "")


def _load_tokenizer(source: Source, directory: Path, gguf: dict[str, str]) -> Any | None:
    if not has_tokenizer(source):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, **gguf, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # a foreign config can provoke any error in there
        raise InputError(f"the tokenizer of {source.name} could not be loaded: {one_line(error)}") from error
    tokenizer.name_or_path = source.name
    return tokenizer
