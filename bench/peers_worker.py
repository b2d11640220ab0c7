"""Runs the peers' own solvers, in the peers' environment: the other half of ``peers.py``, which starts it.

    DIR/bin/python bench/peers_worker.py THREADS

Says in one JSON line which peers it has, in which versions, and why it lacks the others; then answers requests, one
JSON object a line, ``{"peer", "matrix", "result"}``, with ``{"seconds", "processor"}`` or ``{"error"}``. ``matrix`` is
a safetensors file with ``weight`` (d_out, d_in), ``gram`` (d_in, d_in, XᵀX / tokens) and ``scale``, tokens times
2 / samples: what both peers multiply that by. Only the call of the solver is timed. Nothing here imports halve.
"""

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Call = Callable[[], Tensor]
Solver = Callable[[Tensor, Tensor], Call]
"""From the weight and the peer's own statistics, both its to keep, to the call that gives the model's new weights."""


def _module(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def llmcompressor_sparsegpt() -> Solver:
    """Return what ``SparseGPTModifier.compress_modules`` calls, with that class's defaults."""
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    modifier = SparseGPTModifier(sparsity=0.5, mask_structure="2:4")

    def solve(weight: Tensor, gram: Tensor) -> Call:
        module = _module(weight)
        hessians = {module: gram}
        return lambda: sparsify_weight(
            module=module,
            hessians_dict=hessians,
            sparsity=0.5,
            prune_n=2,  # zeros, not what is kept: the same for 2:4
            prune_m=4,
            block_size=modifier.block_size,
            dampening_frac=modifier.dampening_frac,
            preserve_sparsity_mask=modifier.preserve_sparsity_mask,
        )[1]

    return solve


def llmcompressor_wanda() -> Solver:
    """Return what ``WandaPruningModifier.compress_modules`` calls."""
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

    def solve(weight: Tensor, gram: Tensor) -> Call:
        module = _module(weight)
        scalars = {module: gram.diagonal() / 2.0}
        return lambda: sparsify_weight(module=module, row_scalars_dict=scalars, sparsity=0.5, prune_n=2, prune_m=4)

    return solve


def modelopt_sparsegpt() -> Solver:
    """Return what ``SparseGPTSearcher`` calls: a mask, which its modules multiply their dense weights by."""
    from modelopt.torch.sparsity.weight_sparsity.sparsegpt import SparseGPTSearcher, create_sgpt_mask

    config = SparseGPTSearcher().default_search_config

    def solve(weight: Tensor, gram: Tensor) -> Call:
        return lambda: weight * create_sgpt_mask(weight, gram, config)

    return solve


PEERS: dict[str, tuple[str, Callable[[], Solver]]] = {
    "llm-compressor sparsegpt": ("llmcompressor", llmcompressor_sparsegpt),
    "llm-compressor wanda": ("llmcompressor", llmcompressor_wanda),
    "modelopt sparsegpt": ("nvidia-modelopt", modelopt_sparsegpt),
}


def answer(solvers: dict[str, Solver], request: dict[str, Any]) -> dict[str, Any]:
    """Run one peer on one matrix."""
    given = load_file(request["matrix"])
    gram = given["gram"] * given["scale"]
    call = solvers[request["peer"]](given["weight"], gram)
    with torch.no_grad():
        begin, begin_processor = time.perf_counter(), time.process_time()
        pruned = call()
        reply = {"seconds": time.perf_counter() - begin, "processor": time.process_time() - begin_processor}
    save_file({"weight": pruned.detach().contiguous()}, Path(request["result"]))
    return reply


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # the peers print
    torch.set_num_threads(int(sys.argv[1]))
    solvers: dict[str, Solver] = {}
    hello: dict[str, Any] = {"torch": torch.__version__, "versions": {}, "errors": {}}
    for name, (package, make) in PEERS.items():
        try:
            hello["versions"][package] = importlib.metadata.version(package)
            solvers[name] = make()
        except Exception as error:  # noqa: BLE001 - whatever a peer's import raises is for the table
            hello["errors"][name] = f"{type(error).__name__}: {error}"
    print(json.dumps(hello), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(solvers, json.loads(line))
        except Exception as error:  # noqa: BLE001 - likewise
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
