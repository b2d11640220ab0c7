"""One process of a distributed training with kept masks: ``python kept_processes.py SCENARIO RANK WORLD STORE OUT``.

The processes find each other by a file, so that no port is needed. Each scenario trains small models and writes what
became of them, whole, to OUT; what must raise is looked at here.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lion_pytorch import Lion
from torch import nn

import halve
from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.model.masked import whole
from kept_models import loss_of, pruned_decoder, zeros
from models import tokens

WORLD = 2
STEPS = 3
OPTIMISERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "lion": lambda model: Lion(model.parameters(), lr=1e-3, weight_decay=0.1),
    "muon": lambda model: torch.optim.Muon([p for n, p in model.named_parameters() if "_proj" in n], lr=0.02),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
}
ELEMENTWISE = ("adamw", "sgd", "lion")
SHARDED = (*ELEMENTWISE, "muon")
"""torch's Adafactor has no way with shards: ``aten.pow_`` of a norm that is not yet summed up."""


def alone(name):
    """What one process makes of both processes' batches, two of them accumulated before each step."""
    model = pruned_decoder()
    halve.keep_masks(model)
    optimiser = OPTIMISERS[name](model)
    for step in range(STEPS):
        optimiser.zero_grad()
        for part in range(WORLD):
            (loss_of(model, seed=WORLD * step + part) / WORLD).backward()
        optimiser.step()
    return dict(model.named_parameters())


def together(model, optimiser, rank, accelerator=None):
    for step in range(STEPS):
        optimiser.zero_grad()
        loss = loss_of(model, seed=WORLD * step + rank)
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimiser.step()


def state(model):
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def data_parallel(rank, out):
    """DDP through accelerate, masks kept before and after the model is prepared, and DDP under the Trainer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    found = {}
    for name, make in OPTIMISERS.items():
        for when in ("before", "after"):
            model = pruned_decoder()
            if when == "before":
                halve.keep_masks(model)
            wrapped, optimiser = accelerator.prepare(model, make(model))
            assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
            kept = halve.keep_masks(wrapped)
            together(wrapped, optimiser, rank, accelerator)
            kept.check()
            found[f"{name} {when}"] = state(model)
    found["trainer"] = under_the_trainer(out)
    return found


def under_the_trainer(out):
    from test_callback import trainer

    model = pruned_decoder()
    trainer(model, out / "trainer", max_steps=2).train()
    return state(model)


def fully_sharded(rank, out):
    """FSDP2 by torch's own fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))

    def shard(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found = {}
    for name in SHARDED:
        for when in ("before", "after"):
            model = pruned_decoder()
            kept = halve.keep_masks(model) if when == "before" else None
            shard(model)
            kept = kept or halve.keep_masks(model)
            optimiser = OPTIMISERS[name](model)
            together(model, optimiser, rank)
            kept.check()
            found[f"{name} {when}"] = state(model)
    saved = kept.state_dict()  # of the last, sharded
    assert all(torch.equal(mask, saved[name]) for name, mask in halve.keep_masks(pruned_decoder()).state_dict().items())
    kept.load_state_dict(saved)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1.0)
    with pytest.raises(HalveError, match=r"up_proj\.weight are not zero"):
        kept.check()
    kept.hold()
    kept.check()
    uneven(mesh)
    flattened()
    return found


def uneven(mesh):
    """Rows that two processes cannot share alike: three and two of five, and one of one."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(8, 1))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(Pattern("2:4").project(layer.weight))
    pruned_at = {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim == 2}
    kept = halve.keep_masks(model)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    kept.check()
    for name, parameter in model.named_parameters():
        if name in pruned_at:
            assert torch.equal(whole(parameter.detach()) == 0, pruned_at[name]), name


def flattened():
    """FSDP of the first version."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        options = {"device_id": torch.device("cpu"), "use_orig_params": original}
        wrapped = FullyShardedDataParallel(pruned_decoder(), **options)
        with pytest.raises(InputError, match="the model is wrapped by FSDP of the first version"):
            halve.keep_masks(wrapped)
        model = pruned_decoder()
        halve.keep_masks(model)
        wrapped = FullyShardedDataParallel(model, **options)
        with pytest.raises(InputError, match="FSDP of the first version"):
            torch.optim.SGD(wrapped.parameters(), lr=0.1).step()


def accelerated(rank, out):
    """FSDP2 by accelerate, one accelerator a process; masks kept before and after the model is prepared."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    for name in ELEMENTWISE:
        for when in ("before", "after"):
            model = pruned_decoder()
            before = zeros(model)
            kept = halve.keep_masks(model) if when == "before" else None
            model, optimiser = accelerator.prepare(model, OPTIMISERS[name](model))
            kept = kept or halve.keep_masks(model)
            for step in range(STEPS):
                optimiser.zero_grad()
                ids = tokens(rows=4, length=12, seed=WORLD * step + rank).to(accelerator.device)
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                optimiser.step()
            kept.check()
            for key, parameter in model.named_parameters():
                weight = whole(parameter.detach()).cpu()
                if key in before:
                    assert torch.equal(weight == 0, before[key]), key
    return {}


SCENARIOS = {
    "data_parallel": data_parallel,
    "fully_sharded": fully_sharded,
    "accelerated": accelerated,
}


def main(scenario, rank, world, store, out):
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # asked for by accelerate, and not used
    torch.set_num_threads(1)
    if scenario == "accelerated":
        torch.accelerator.set_device_index(int(rank))
        del os.environ["ACCELERATE_USE_CPU"]
    backend = "cpu:gloo,cuda:nccl" if scenario == "accelerated" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, int(world)), rank=int(rank), world_size=int(world))
    try:
        found = SCENARIOS[scenario](int(rank), Path(out))
        torch.save(found, Path(out) / f"{scenario}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
