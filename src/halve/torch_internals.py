"""Everything private of PyTorch that Halve uses, in one place: `LEANINGS` says what for and what breaks without it."""

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import contains, is_
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.sparse import SparseSemiStructuredTensor

from halve.leaning import Leaning

T = TypeVar("T", bound=Tensor)
_LINEAR = "tests/runtime/test_linear.py"
_GPU = "tests/runtime/test_semi_structured.py"
_DECODING = "tests/runtime/decoding/test_next_token.py"

LEANINGS = (
    Leaning(
        path="torch.cpu.get_capabilities",
        use="which numbers the processor multiplies natively",
        breaks="the older queries below are asked, and without them float32 is multiplied everywhere",
        test="tests/test_device.py",
        optional=True,
    ),
    Leaning(
        path="torch.cpu._is_amx_tile_supported",
        use="the same, before torch has get_capabilities",
        breaks="processors with AMX multiply float32 under an old torch",
        test="tests/test_device.py",
        optional=True,
    ),
    Leaning(
        path="torch.cpu._is_amx_fp16_supported",
        use="the same, before torch has get_capabilities",
        breaks="packed products choose as if there were no AMX for float16 under an old torch",
        test="tests/runtime/test_native.py",
        optional=True,
    ),
    Leaning(
        path="torch.cpu._is_avx512_bf16_supported",
        use="the same, before torch has get_capabilities",
        breaks="processors with AVX512-BF16 multiply float32 under an old torch",
        test="tests/test_device.py",
        optional=True,
    ),
    Leaning(
        path="torch.ops.mkldnn._is_mkldnn_bf16_supported",
        use="whether dense products of bfloat16 are native",
        breaks="packed products of many rows cannot choose between 16 bits and float32",
        test="tests/runtime/test_native.py",
    ),
    Leaning(
        path="torch.ops.mkldnn._is_mkldnn_fp16_supported",
        use="whether dense products of float16 are native",
        breaks="packed products of many rows cannot choose between 16 bits and float32",
        test="tests/runtime/test_native.py",
    ),
    Leaning(
        path="torch._C._get_tracing_state",
        use="whether torch.jit traces",
        breaks="a traced SparseLinear would be recorded as a constant",
        test=_LINEAR,
    ),
    Leaning(
        path="torch._C._len_torch_dispatch_stack",
        use="whether a dispatch mode watches",
        breaks="counters of operations and fake tensors would miss the products of a SparseLinear",
        test=_LINEAR,
    ),
    Leaning(
        path="torch._C._functorch.peek_interpreter_stack",
        use="whether torch.func transforms",
        breaks="vmap and grad over a SparseLinear would give wrong results",
        test=_LINEAR,
    ),
    Leaning(
        path="torch.autograd.forward_ad._current_level",
        use="whether forward-mode derivatives are asked for",
        breaks="a SparseLinear would drop them without a word",
        test=_LINEAR,
    ),
    Leaning(
        path="torch.Tensor._version",
        use="whether a tensor was written in place",
        breaks="blocks that change their own input would be pruned on wrong statistics",
        test="tests/model/test_replay.py",
    ),
    Leaning(
        path="torch.Tensor._make_wrapper_subclass",
        use="tensors that are packed and look plain",
        breaks="vLLM could not load packed checkpoints",
        test="tests/engines/test_packed_tensor.py",
    ),
    Leaning(
        path="torch._ops.OpOverload._schema",
        use="which arguments of an operation it writes to, so that packed tensors refuse to be written to",
        breaks="vLLM could not load packed checkpoints",
        test="tests/engines/test_packed_tensor.py",
        on_instances=True,
    ),
    Leaning(
        path="torch.nn.Module._forward_hooks",
        use="whether hooks are on a layer",
        breaks="a layer would be replaced by a sparse one that does not call its hooks",
        test="tests/runtime/test_accelerate.py",
        on_instances=True,
    ),
    Leaning(
        path="torch.nn.Module._forward_pre_hooks",
        use="whether hooks are on a layer",
        breaks="a layer would be replaced by a sparse one that does not call its hooks",
        test="tests/runtime/test_accelerate.py",
        on_instances=True,
    ),
    Leaning(
        path="torch.nn.Module._modules",
        use="all places of one module",
        breaks="a layer that stands in two places would be replaced in one of them",
        test="tests/runtime/test_accelerate.py",
        on_instances=True,
    ),
    Leaning(
        path="torch.nn.modules.module._global_forward_hooks",
        use="whether somebody listens to every module",
        breaks="next tokens would be computed in one call where somebody wants to see the modules' calls",
        test=_DECODING,
    ),
    Leaning(
        path="torch.nn.modules.module._global_forward_pre_hooks",
        use="whether somebody listens to every module",
        breaks="next tokens would be computed in one call where somebody wants to see the modules' calls",
        test=_DECODING,
    ),
    Leaning(
        path="torch.nn.Module._parameters",
        use="whether modules still hold the same",
        breaks="next tokens would be computed with weights that a model has no more",
        test=_DECODING,
        on_instances=True,
    ),
    Leaning(
        path="torch.nn.Module._buffers",
        use="whether modules still hold the same",
        breaks="next tokens would be computed with weights that a model has no more",
        test=_DECODING,
        on_instances=True,
    ),
    Leaning(
        path="torch.nn.modules.conv._ConvNd",
        use="what all convolutions have in common",
        breaks="convolutions could not be told from unknown layers",
        test="tests/model/test_classify.py",
    ),
    Leaning(
        path="torch.nn.Conv2d._conv_forward",
        use="whether a convolution multiplies by its weight as it is",
        breaks="classes that change the weight there would be pruned as if they did not",
        test="tests/model/test_layers.py",
    ),
    Leaning(
        path="torch.cuda._sleep",
        use="keeping a GPU busy until Python is ahead of it",
        breaks="measured times would hold what launches cost",
        test="tests/runtime/test_timing.py",
        parameters=("cycles",),
    ),
    Leaning(
        path="torch._cslt_sparse_mm_search",
        use="trying all algorithms of cuSPARSELt",
        breaks="products on sparse tensor cores would take the default algorithm, which is rarely the fastest",
        test=_GPU,
    ),
    Leaning(
        path="torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS",
        use="which shapes sparse tensor cores take",
        breaks="matrices of other shapes would be refused only when they are compressed",
        test=_GPU,
    ),
    Leaning(
        path="torch.sparse.SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS",
        use="which shapes sparse tensor cores take, without cuSPARSELt",
        breaks="matrices of other shapes would be refused only when they are compressed",
        test=_GPU,
    ),
    Leaning(
        path="torch.sparse.SparseSemiStructuredTensor._DEFAULT_ALG_ID",
        use="the algorithm for numbers of rows that were not searched",
        breaks="a searched algorithm would be used for other numbers of rows",
        test=_GPU,
    ),
)


_OLDER_QUERIES = {
    "amx_bf16": "_is_amx_tile_supported",
    "amx_fp16": "_is_amx_fp16_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
}


def processor_has(capability: Literal["amx_bf16", "amx_fp16", "avx512_bf16"]) -> bool:
    """Whether this processor has the instructions for products of such numbers."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is not None:
        return bool(query().get(capability))
    return bool(getattr(torch.cpu, _OLDER_QUERIES[capability], lambda: False)())


def has_dense_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 or float16 natively on this processor."""
    onednn = torch.ops.mkldnn
    supported = onednn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported  # noqa: SLF001
    return bool(supported())


def is_recorded() -> bool:
    """Whether something traces, dispatches or transforms what is computed now."""
    return (
        torch._C._get_tracing_state() is not None  # noqa: SLF001
        or torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001
        or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    )


def writes_to(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; 0 for one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def has_tangent(x: Tensor) -> bool:
    """Whether a forward-mode derivative goes with ``x``."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]  # noqa: SLF001


def has_hooks(layer: nn.Module) -> bool:
    """Whether forward hooks are on a layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)  # noqa: SLF001


def hooks_of(layer: nn.Module) -> list[Any]:
    """Return the forward hooks on a layer."""
    return [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]  # noqa: SLF001


def has_global_hooks() -> bool:
    """Whether somebody listens to every module there is."""
    from torch.nn.modules import module

    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)  # noqa: SLF001


class Holdings:
    """What modules hold at one moment: to be asked later, in microseconds, whether they still do.

    Args:
        modules: those that matter.
        settings: objects and names of their attributes that matter too, numbers for instance.
        heard: whether there is anything on a module that wants to see its calls; asked only where it has hooks.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        settings: Iterable[tuple[Any, str]],
        heard: Callable[[nn.Module], bool],
    ) -> None:
        self._modules, self._heard = list(modules), heard
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._tensors: list[Tensor] = []
        self._aliases: list[Tensor] = []
        self._hooks: list[Any] = []
        for module in self._modules:
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]  # noqa: SLF001
            for held in (module._modules, module._parameters, module._buffers):  # noqa: SLF001
                self._hold(held, held)
            for parameter in module.parameters(recurse=False):
                self._tensors.append(parameter)
                self._aliases.append(parameter.detach())  # which keeps its memory, whatever becomes of `data`
        for owner, name in settings:
            self._hold(vars(owner), [name])
        self._addresses = [alias.data_ptr() for alias in self._aliases]
        self._types = [type(module) for module in self._modules]
        self._attributes = [vars(module) for module in self._modules]

    def _hold(self, held: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            self._owners.append(held)
            self._names.append(name)
            self._values.append(held.get(name))

    def still_hold(self) -> bool:
        """Return whether modules, their classes, tensors and settings are the same, and no hook listens to them."""
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(type, self._modules)) == self._types
            and not any(map(contains, self._attributes, repeat("forward")))
            and not (any(self._hooks) and any(map(self._heard, self._modules)))
        )


def children_with_repeats(parent: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """Return the children of a module by name; ``named_children`` names one of several alike."""
    return list(parent._modules.items())  # noqa: SLF001


def keep_gpu_busy(cycles: int) -> None:
    """Let the current GPU wait for so many cycles of its clock, without touching memory."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # noqa: SLF001


def shape_multiples(layout: type[SparseSemiStructuredTensor], dtype: torch.dtype) -> tuple[int, int]:
    """Return the multiples that rows and columns of a matrix for sparse tensor cores must be."""
    limits = layout._DTYPE_SHAPE_CONSTRAINTS[dtype]  # noqa: SLF001
    return limits.sparse_min_rows, limits.sparse_min_cols


def default_algorithm(compressed: SparseSemiStructuredTensor) -> int:
    """Return the number of cuSPARSELt's default algorithm."""
    return compressed._DEFAULT_ALG_ID  # noqa: SLF001


def fastest_algorithm(packed: Tensor, inputs: Tensor) -> int:
    """Try all algorithms of cuSPARSELt on a product with ``inputs`` (d_in, rows), and return the fastest."""
    return torch._cslt_sparse_mm_search(packed, inputs, transpose_result=True)  # noqa: SLF001


def tensor_without_storage(kind: type[T], shape: tuple[int, ...], dtype: torch.dtype) -> T:
    """Return a tensor of a class of ours, on the CPU, whose elements are nowhere: the class answers every operation."""
    return kind._make_wrapper_subclass(kind, shape, dtype=dtype, device=torch.device("cpu"))  # noqa: SLF001


def written_arguments(operation: Any) -> list[tuple[int, str]]:
    """Return the arguments that an operation writes to, of those that a ``__torch_dispatch__`` sees: places, names."""
    arguments = enumerate(operation._schema.arguments)  # noqa: SLF001
    return [(at, each.name) for at, each in arguments if each.alias_info is not None and each.alias_info.is_write]
