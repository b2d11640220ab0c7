"""What a run feeds to a model's blocks, seen from outside: hooks on a block are copied with it."""

import copy

import torch


def watch(model, names):
    """Record the hidden state of every call of copies of these blocks, which a run works with, by name."""
    return _watch(model, names, copies=True)


def _watch(model, names, *, copies):
    seen = {name: [] for name in names}

    def hook(module, args, kwargs, calls, original):
        if (module is not original[0]) == copies:
            calls.append((args[0] if args else kwargs["hidden_states"]).detach().float().cpu().clone())

    for name, calls in seen.items():
        block = model.get_submodule(name)
        block.register_forward_pre_hook(
            lambda *given, calls=calls, original=(block,): hook(*given, calls, original), with_kwargs=True
        )
    return seen


def inputs(model, names, batches):
    """Return what each block is fed in the model's own forward passes, without a cache: by name, one a batch."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    seen = _watch(model, names, copies=False)
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return seen


def is_close(a, b):
    return a.shape == b.shape and float((a - b).norm() / b.norm()) < 1e-4


def assert_fed(seen, dense, pruned, *, paired):
    """Every batch that a block was fed was a hidden state of one of the two models, and each of these was fed.

    Args:
        seen: by `watch`, during the run.
        dense: by `inputs`, of the dense model.
        pruned: of the finished model.
        paired: whether the dense model's states are needed too.
    """
    for name, calls in seen.items():
        wanted = [*pruned[name], *(dense[name] if paired else [])]
        for call in calls:
            assert any(is_close(call, state) for state in wanted), name
        for state in wanted:
            assert any(is_close(call, state) for call in calls), name
