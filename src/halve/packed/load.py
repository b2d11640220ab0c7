"""Loading a checkpoint to run it: a packed one without ever holding the dense weights of its packed matrices.

transformers loads the model, as it would a plain checkpoint; for every packed matrix it is given a stand-in of the
right shape and dtype, some kilobytes of zeros. Where a stand-in has become the weight of a linear layer untouched, its
matrix belongs, and a `SparseLinear` takes that layer's place. A stand-in that was merged with others, permuted, cast or
shared is not found again; then the matrices concerned are unpacked, and the model is loaded once more with them. What
can have no stand-in, in a dtype that is not packed or as a tensor of several matrices, is unpacked from the beginning.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from halve.checkpoint.directory import is_packed
from halve.checkpoint.load import LoadedModel, assemble, freeze, load_model
from halve.checkpoint.precision import dtype_in_config
from halve.checkpoint.shards import TensorEntry
from halve.errors import InputError, UnsupportedModelError, first_few
from halve.maths.linalg import is_finite
from halve.model.layers import is_conv1d, is_plain_linear
from halve.packed.read import PackedCheckpoint, open_packed
from halve.runtime.compiled import instruction_sets
from halve.runtime.decoding.next_token import decode_in_one_call
from halve.runtime.linear import SparseLinear
from halve.runtime.native import AnyPacked, describe
from halve.runtime.packed_matrix import DTYPES, OVERREAD, PackedMatrix
from halve.runtime.quantised_matrix import QuantisedMatrix

_NO_PLACE = "the model has no plain linear layer for each of them alone"


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    one_call: bool = True,
) -> LoadedModel:
    """Load a model and its tokenizer on the CPU, from a plain checkpoint or a packed one.

    The linear layers of a packed one are `SparseLinear`: they take no more memory than the file does, and the model's
    ``state_dict()`` and ``save_pretrained`` give the plain checkpoint's tensors, bit for bit if ``dtype`` is not given.
    Where it is of Llama's kind, each next token is computed in one call (`halve.runtime.decoding.next_token`).

    Args:
        directory: of a packed checkpoint; anything else is loaded by `halve.checkpoint.load.load_model`.
        dtype: of the parameters in memory; None takes the checkpoint's own.
        trust_remote_code: whether to accept a model that comes with Python code of its own, and to run it.
        one_call: whether a packed model of Llama's kind computes each next token in one call, where it can be.

    Returns:
        LoadedModel: in evaluation mode, without gradients; ``notes`` name what had to be unpacked, and
            ``decoding`` says why the next token of a packed model is not computed in one call, where it is not.

    Raises:
        InputError: NaN or infinity in a tensor, or as `load_model`.
        UnsupportedModelError: as `load_model`; a packed checkpoint of a newer version.
        CorruptFileError: as `halve.packed.read.open_packed`; a mask is wrong.
        HalveError: a next token computed in one call is not what the modules compute: give ``one_call=False``.
    """
    if not is_packed(Path(directory).expanduser()):
        return load_model(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    checkpoint = open_packed(directory, trust_remote_code=trust_remote_code)
    entries = {entry.name: entry for shard in checkpoint.plain for entry in shard.tensors}
    tensors, stand_ins, dense = _read(checkpoint, entries, dtype)
    loaded = assemble(checkpoint.source, tensors, dtype=dtype)
    places = _places(loaded.model, stand_ins)
    if lost := [name for name in stand_ins if name not in places]:
        del loaded
        dense |= dict.fromkeys(lost, _NO_PLACE)
        tensors |= {name: checkpoint.tensor(entries[name]) for name in lost}
        stand_ins = {name: stand_in for name, stand_in in stand_ins.items() if name in places}
        loaded = assemble(checkpoint.source, tensors, dtype=dtype)
        places = _places(loaded.model, stand_ins)
        if places.keys() != stand_ins.keys():
            raise UnsupportedModelError(
                f"{checkpoint.source.name} is put together differently at each loading: use the plain checkpoint, "
                "which `halve unpack` restores"
            )
    for name, place in places.items():
        _swap(loaded.model, place, in_dtype(checkpoint.matrix(name), stand_ins[name].tensor.dtype, name))
    freeze(loaded.model, checkpoint.source.name)
    decoding = decode_in_one_call(loaded.model) if one_call else "one call was not asked for"
    return replace(loaded, notes=tuple(_notes(checkpoint, dense)), decoding=decoding)


@dataclass(frozen=True)
class _StandIn:
    """What transformers is given for a packed matrix, and whether the layer has it transposed."""

    tensor: Tensor
    transposed: bool


def _read(
    checkpoint: PackedCheckpoint, entries: Mapping[str, TensorEntry], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, _StandIn], dict[str, str]]:
    """Return every tensor on disk by name, the packed ones as stand-ins where they can be.

    Returns:
        tuple: the tensors; the stand-ins among them; why each of the other packed ones is none.
    """
    own = dtype_in_config(checkpoint.source) if dtype is None else dtype
    tensors: dict[str, Tensor] = {}
    stand_ins: dict[str, _StandIn] = {}
    dense: dict[str, str] = {}
    for name, entry in entries.items():
        packed = checkpoint.manifest.matrices.get(name)
        wanted = entry.dtype if own is None else own
        if packed is None:
            tensors[name] = checkpoint.tensor(entry)
        elif reason := _why_dense(entry, wanted):
            tensors[name], dense[name] = checkpoint.tensor(entry), reason
        else:
            stand_ins[name] = _StandIn(_stand_in(entry.shape, wanted), packed.layout == "in_out")
            tensors[name] = stand_ins[name].tensor
    return tensors, stand_ins, dense


def _why_dense(entry: TensorEntry, dtype: torch.dtype) -> str:
    """Return why a packed tensor can have no stand-in in a dtype; empty if it can."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not packed"
    return "" if len(entry.shape) == 2 else "each is several matrices in one tensor"


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros of (rows, columns) that lie on each other: rows + 2 columns of them are in memory.

    The strides, 1 and 2, tell it from its transpose, and from anything computed from it.
    """
    rows, columns = shape
    return torch.zeros(rows + 2 * columns, dtype=dtype).as_strided((rows, columns), (1, 2))


def _places(model: nn.Module, stand_ins: Mapping[str, _StandIn]) -> dict[str, str]:
    """Return, for each stand-in that is the weight of one plain layer and nothing else, the name of that layer."""
    names = {stand_in.tensor.data_ptr(): name for name, stand_in in stand_ins.items()}
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        if (name := names.get(parameter.data_ptr())) is not None:
            owners[name].append(parameter_name)
    found = {}
    for name, parameters in owners.items():
        place, _, leaf = parameters[0].rpartition(".")
        module = model.get_submodule(place)
        if len(parameters) == 1 and leaf == "weight" and _is_plain(module, stand_ins[name]):
            found[name] = place
    return found


def _is_plain(module: nn.Module, stand_in: _StandIn) -> bool:
    """Whether this is a linear layer as it is, not one derived from it, with the stand-in for its weight."""
    if not is_plain_linear(module):
        return False
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)  # noqa: S101 - of these two it always is
    return (
        (weight.shape, weight.stride(), weight.dtype) == (stand_in.tensor.shape, (1, 2), stand_in.tensor.dtype)
        and is_conv1d(module) == stand_in.transposed
        and (not isinstance(bias, Tensor) or bias.dtype == weight.dtype)
    )


def in_dtype(matrix: AnyPacked, dtype: torch.dtype, name: str) -> AnyPacked:
    """Return a packed matrix in another dtype, refused if that makes it infinite.

    Args:
        matrix: it.
        dtype: of the products, one of `halve.runtime.packed_matrix.DTYPES`.
        name: of the tensor, for the error.

    Raises:
        InputError: a weight is not finite in the dtype.
    """
    if isinstance(matrix, QuantisedMatrix):
        matrix = replace(matrix, dtype=dtype)
        finite = matrix.fits(dtype)
    else:
        if matrix.dtype != dtype:
            matrix = PackedMatrix(matrix.mask, matrix.values.to(dtype), matrix.shape, matrix.pattern)
        finite = is_finite(matrix.values[:-OVERREAD])
    if not finite:
        raise InputError(f"tensor {name!r} holds NaN or infinity in {dtype}: mend the checkpoint")
    return matrix


def _swap(model: nn.Module, place: str, matrix: AnyPacked) -> None:
    layer = model.get_submodule(place)
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    sparse = SparseLinear(matrix, bias, "in_out" if is_conv1d(layer) else "out_in")
    model.set_submodule(place, sparse.eval())


def _notes(checkpoint: PackedCheckpoint, dense: Mapping[str, str]) -> list[str]:
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in dense.items():
        by_reason[reason].append(name)
    found = [
        f"{len(names)} of {len(checkpoint.manifest.matrices)} packed matrices are dense in memory, because {reason}: "
        f"{first_few(names)}"
        for reason, names in by_reason.items()
    ]
    if not instruction_sets():
        found.append(describe())
    return found
