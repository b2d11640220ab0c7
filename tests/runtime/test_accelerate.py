import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import halve
import models
from halve import memory
from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.model.layers import EXPERTS_IN_ONE, is_linear, layer_matrix
from halve.runtime import accelerate as module
from halve.runtime import kernels, native, probe, product_check, semi_structured, speed
from halve.runtime.accelerate import Acceleration, accelerate, restore
from halve.runtime.kernels.gpu_linear import GpuLinear
from halve.runtime.linear import SparseLinear
from halve.runtime.quantised_matrix import bits_of, quantised_bytes
from halve.runtime.semi_structured import SemiStructuredLinear
from halve.runtime.speed import Speed
from packed_matrices import same_bits
from packed_models import prune_layers

needs_sparse_cores = pytest.mark.skipif(
    bool(semi_structured.unusable()), reason=f"needs sparse tensor cores: {semi_structured.unusable()}"
)
needs_packed_products = pytest.mark.skipif(
    bool(kernels.unusable()), reason=f"needs a GPU for packed products: {kernels.unusable()}"
)
IDS = models.tokens(2, 12)


def pruned(family="llama", dtype=torch.float32, pattern="2:4", **changes):
    model = models.decoder(family, **changes).to(dtype)
    prune_layers(model, pattern)
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(same_bits(value, other[name]) for name, value in one.items())


@pytest.fixture
def ratios(monkeypatch):
    """What measuring finds, by shape; 2 where nothing is said."""
    found = {}

    def measure(d_out, d_in, batches, **_):
        ratio = found.get((d_out, d_in), 2.0)
        return [
            Speed(
                d_out=d_out,
                d_in=d_in,
                batch=batch,
                dense_seconds=ratio,
                sparse_seconds=1.0,
                dense_call_seconds=found.get("call", ratio),
                sparse_call_seconds=1.0,
                product=found.get("product", "packed"),
            )
            for batch in batches
        ]

    monkeypatch.setattr(speed, "measure", measure)
    return found


@pytest.mark.usefixtures("ratios")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "opt", "gemma2", "phi3", "bloom", "gpt_neox"])
def test_a_model_runs_the_same_and_its_checkpoint_too(family, dtype, tmp_path):
    model = pruned(family, dtype)
    before = state_of(model)
    linears = [name for name, layer in model.named_modules() if is_linear(layer)]
    with torch.no_grad():
        expected = model(IDS).logits
        text = model.generate(IDS, max_new_tokens=5, do_sample=False)
    done = accelerate(model)
    assert set(done.swapped) | set(done.left_dense) == set(linears)
    assert len(done.swapped) >= len(linears) - 1
    assert set(done.left_dense) <= {"lm_head", "embed_out"}
    assert done.bytes_after < 0.75 * done.bytes_before  # rows are short here
    with torch.no_grad():
        difference = (model(IDS).logits - expected).norm() / expected.norm()
    assert difference < {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape == text.shape
    if dtype == torch.float32:
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), text)
    assert same_state(model.state_dict(), before)
    model.save_pretrained(tmp_path)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict(), before)


@pytest.mark.usefixtures("ratios")
def test_says_what_it_did():
    model = pruned()
    done = halve.accelerate(model, batch=3)
    assert isinstance(done, Acceleration)
    assert done.left_dense == {"lm_head": "not at 2:4"}
    assert {(row.d_out, row.d_in, row.batch) for row in done.speeds} == {
        (32, 32, 3),
        (16, 32, 3),
        (64, 32, 3),
        (32, 64, 3),
    }
    assert done.bytes_before == 3 * 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert 0 <= done.difference < 1e-5
    assert done.kernel == speed.describe(torch.device("cpu"))
    assert str(done).startswith(f"{len(done.swapped)} layers run sparse, {len(done.left_dense)} stay dense; 0.1 MB of ")
    assert all(isinstance(model.get_submodule(name), SparseLinear) for name in done.swapped)


def test_layers_stay_dense_where_sparsity_is_not_faster(ratios):
    ratios[(64, 32)] = 1.04
    model = pruned()
    done = accelerate(model, only_where_faster=1.1)
    kept = {name for name in done.left_dense if name != "lm_head"}
    assert kept == {f"model.layers.{i}.mlp.{kind}_proj" for i in range(3) for kind in ("gate", "up")}
    assert {done.left_dense[name] for name in kept} == {"1.04 times as fast as dense at batch 1, less than 1.1"}
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, SparseLinear)


def test_nothing_faster_is_refused_unless_only_memory_is_asked_for(ratios):
    ratios |= dict.fromkeys([(32, 32), (16, 32), (64, 32), (32, 64)], 0.9)
    model = pruned()
    with pytest.raises(InputError, match=r"no layer is faster sparse at batch 1 here, the best 0.90 times as fast"):
        accelerate(model)
    assert not any(isinstance(layer, SparseLinear) for layer in model.modules())
    done = accelerate(model, only_where_faster=None)
    assert done.speeds == ()
    assert len(done.swapped) == 21


def test_what_is_measured_is_this_machine(monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)
    done = accelerate(pruned(), only_where_faster=1e-6)
    assert all(row.dense_seconds > 0 and row.sparse_seconds > 0 for row in done.speeds)


@pytest.mark.usefixtures("ratios")
def test_layers_that_only_their_own_code_can_run_stay_dense():
    class Special(nn.Linear):
        pass

    shared = nn.Linear(16, 16)
    layers = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 16),
            "special": Special(16, 16),
            "hooked": nn.Linear(16, 16),
            "tied": nn.Linear(16, 16),
            "tied_too": nn.Linear(16, 16),
            "odd": nn.Linear(18, 16),
            "wide": nn.Linear(16, 16).double(),
            "shared": shared,
            "shared_again": shared,
        }
    )
    layers.tied.weight = layers.tied_too.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers
            self.experts = nn.Parameter(torch.zeros(2, 16, 16))

        def forward(self, x):
            return self.layers["shared_again"](self.layers["shared"](self.layers["plain"](x)))

    model = Model()
    with torch.no_grad():
        for name, layer in layers.items():
            if name != "odd":
                layer.weight.copy_(Pattern("2:4").project(layer.weight))
    layers.hooked.register_forward_hook(lambda *_: None)
    done = accelerate(model, probe=torch.randn(3, 16))
    assert done.swapped == ("layers.plain", "layers.shared")
    assert model.layers["shared"] is model.layers["shared_again"]
    assert isinstance(model.layers["shared"], SparseLinear)
    assert done.left_dense == {
        "layers.special": "a Special, which may use its weight in its own way",
        "layers.hooked": "hooks are on it, which another layer would not have",
        "layers.tied": "its weight is shared with another module",
        "layers.tied_too": "its weight is shared with another module",
        "layers.odd": "d_in = 18 is not divisible by 4",
        "layers.wide": "packed products are bfloat16, float16 or float32, not torch.float64",
        "experts": EXPERTS_IN_ONE,
    }


@pytest.mark.usefixtures("ratios")
def test_a_dense_model_and_bad_arguments_are_refused():
    with pytest.raises(
        InputError, match=r"no linear layer of this LlamaForCausalLM can run sparse at 2:4 \(not at 2:4\)"
    ):
        accelerate(models.decoder("llama"))
    with pytest.raises(InputError, match=r"it has no linear layers"):
        accelerate(nn.ReLU())
    for batch in (0, 1.5, "1", True):
        with pytest.raises(InputError, match=r"batch must be a whole number of at least 1"):
            accelerate(pruned(), batch=batch)
    for factor in (-1, 0, float("nan"), "2"):
        with pytest.raises(InputError, match="only_where_faster must be a finite number above 0, got "):
            accelerate(pruned(), only_where_faster=factor)
    model = pruned()
    accelerate(model)
    with pytest.raises(InputError, match=r"21 layers of this LlamaForCausalLM are sparse already: load it anew"):
        accelerate(model)
    with pytest.raises(InputError, match=r"says of no vocabulary: give a probe"):
        accelerate(prune_layers(nn.Sequential(nn.Linear(8, 8))))
    model = pruned()
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be called with the probe"):
        accelerate(model, probe={"nonsense": 1, "input_ids": torch.ones(3)})
    assert not any(isinstance(layer, SparseLinear) for layer in model.modules())


@pytest.mark.usefixtures("ratios")
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_product_is_noticed_and_everything_is_put_back(monkeypatch, rows, dtype):
    model = pruned(dtype=dtype)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    before, made = state_of(model), []

    class Wrong(SparseLinear):
        def forward(self, x):
            y = super().forward(x)
            if len(made) == 9 and len(x) == rows:
                y[:, -1] = 0.0  # one wrong row of the weight
            return y

        @classmethod
        def of(cls, layer, pattern, bits=None):
            made.append(layer)
            return super().of(layer, pattern)

    monkeypatch.setattr(module, "SparseLinear", Wrong)
    with pytest.raises(HalveError, match=r"layers.1.self_attn.k_proj with \d rows is wrong in \d of \d+ elements"):
        accelerate(model, batch=7)
    assert model.model.layers[0].self_attn.q_proj.weight.requires_grad
    assert not model.model.layers[0].self_attn.k_proj.weight.requires_grad
    assert {type(layer) for layer in model.modules() if "Linear" in type(layer).__name__} == {nn.Linear}
    assert same_state(model.state_dict(), before)


@pytest.mark.usefixtures("ratios")
def test_a_wrong_output_is_noticed_and_everything_is_put_back(monkeypatch):
    model = pruned("gpt2")
    before = state_of(model)
    outputs = iter([torch.ones(4), torch.ones(4), torch.ones(4) * 1.01])
    monkeypatch.setattr(probe, "_first_tensor", lambda _: next(outputs))
    with pytest.raises(HalveError, match=r"output differs from the dense one's by 0.01 of its norm"):
        accelerate(model)
    assert sum(type(layer) is Conv1D for layer in model.modules()) == 12
    assert same_state(model.state_dict(), before)


@pytest.mark.usefixtures("ratios")
def test_dense_weights_are_let_go():
    model = pruned()
    weights = [weakref.ref(layer.weight) for name, layer in model.named_modules() if "proj" in name]
    accelerate(model)
    gc.collect()
    assert all(reference() is None for reference in weights)


@pytest.mark.usefixtures("ratios")
def test_layers_are_restored_by_name():
    model = pruned()
    before = state_of(model)
    for name in accelerate(model).swapped:
        restore(model, name)
    assert not any(isinstance(layer, SparseLinear) for layer in model.modules())
    assert same_state(model.state_dict(), before)
    with pytest.raises(InputError, match=r"lm_head is no sparse layer"):
        restore(model, "lm_head")


@pytest.mark.usefixtures("ratios")
def test_compiles_and_keeps_gradients_of_the_inputs():
    model = pruned()
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad.norm() > 0


@needs_sparse_cores
@pytest.mark.parametrize("batch", [1, 64])
def test_on_a_gpu_sparse_tensor_cores_multiply_where_nothing_is_measured(batch):
    model = pruned(hidden_size=128, intermediate_size=256, dtype=torch.bfloat16).cuda()
    before = state_of(model)
    done = accelerate(model, only_where_faster=None, probe=IDS.cuda(), batch=batch)
    assert len(done.swapped) == 21
    assert {type(model.get_submodule(name)) for name in done.swapped} == {SemiStructuredLinear}
    assert done.difference < 8e-2
    assert same_state(model.state_dict(), before)
    model.generate(IDS.cuda(), max_new_tokens=3)


@needs_packed_products
def test_on_a_gpu_what_is_measured_to_be_faster_packed_is_packed(ratios):
    assert not ratios  # measuring finds packed products
    model = pruned(hidden_size=128, intermediate_size=256, dtype=torch.bfloat16).cuda()
    before = state_of(model)
    done = accelerate(model, probe=IDS.cuda())
    assert {type(model.get_submodule(name)) for name in done.swapped} == {GpuLinear}
    assert done.difference < 8e-2
    assert same_state(model.state_dict(), before)
    model.generate(IDS.cuda(), max_new_tokens=3)


@pytest.mark.parametrize(
    ("values", "usable", "expected"),
    [
        ("own", "", "tensor cores"),
        ("own", "too old", "packed"),
        ("int8", "", "packed"),
        ("int4", "", "packed"),
    ],
)
def test_on_a_gpu_sparse_tensor_cores_are_the_product_where_nothing_is_measured(monkeypatch, values, usable, expected):
    monkeypatch.setattr(kernels, "unusable", lambda _device: "")
    monkeypatch.setattr(semi_structured, "unusable", lambda _device: usable)
    monkeypatch.setattr(semi_structured, "_searchable", lambda: True)
    how = module._How(Pattern("2:4"), 1, bits_of(values, Pattern("2:4")))
    key = torch.Size((64, 64)), torch.bfloat16, torch.device("cuda")
    assert module._product(key, how, {}) == expected


@needs_packed_products
@pytest.mark.parametrize("values", ["own", "int8", "int4"])
def test_on_a_gpu_odd_shapes_are_packed(values):
    model = pruned(hidden_size=128, intermediate_size=200, dtype=torch.bfloat16).cuda()
    done = accelerate(model, only_where_faster=None, probe=IDS.cuda(), values=values)
    assert len(done.swapped) == 21
    odd = [name for name in done.swapped if values != "own" or 200 in layer_matrix(model.get_submodule(name)).shape]
    assert {type(model.get_submodule(name)) for name in odd} == {GpuLinear}


@pytest.mark.parametrize("product", ["packed", "tensor cores"])
def test_on_a_gpu_the_measured_shapes_are_chosen(ratios, product, monkeypatch):
    # Everything but the products themselves, which need the hardware.
    class Stand(SparseLinear):
        @classmethod
        def of(cls, layer, rows):
            assert rows == (None if product == "packed" else 8)
            return SparseLinear.of(layer, "2:4")

    ratios[(32, 64)], ratios["product"] = 0.9, product
    monkeypatch.setattr(module, "_is_on_gpu", lambda _layer: True)
    monkeypatch.setattr(module, "GpuLinear" if product == "packed" else "SemiStructuredLinear", Stand)
    done = accelerate(pruned(), batch=8)
    assert len(done.swapped) == 18
    assert {name for name in done.left_dense if "down" in name} == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}


@pytest.mark.usefixtures("ratios")
def test_shapes_that_have_no_sparse_product_stay_dense(monkeypatch):
    monkeypatch.setattr(speed, "unfit", lambda d_out, d_in, *_: "odd" if (d_out, d_in) == (32, 64) else "")
    done = accelerate(pruned())
    assert len(done.swapped) == 18
    assert {name: reason for name, reason in done.left_dense.items() if "down" in name} == {
        f"model.layers.{i}.mlp.down_proj": "odd" for i in range(3)
    }


class Returns(nn.Module):
    """A model of one pruned layer, which returns what it is told to."""

    def __init__(self, make, use="call"):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self._make = make
        self._use = use
        prune_layers(self)

    def forward(self, x):
        return self._make(self.layer(x) if self._use == "call" else nn.functional.linear(x, self.layer.weight))


@pytest.mark.usefixtures("ratios")
@pytest.mark.parametrize(
    "make", [lambda y: {"first": None, "y": y}, lambda y: (None, y), lambda y: y.double(), lambda y: [y.long(), y]]
)
def test_whatever_a_model_returns_its_first_numbers_are_compared(make):
    done = accelerate(Returns(make), probe=torch.randn(2, 8))
    assert done.swapped == ("layer",)
    assert done.left_dense == {"unused": "the model does not call it on the probe"}


@pytest.mark.usefixtures("ratios")
def test_a_model_that_returns_no_numbers_or_calls_no_layer_is_refused():
    for model, says in (
        (Returns(lambda y: y.long()), r"Returns returns no tensor of numbers on the probe"),
        (Returns(lambda _y: None), r"Returns returns no tensor of numbers on the probe"),
        (Returns(lambda y: y, use="weight"), r"Returns calls none of its pruned layers on the probe"),
    ):
        with pytest.raises(InputError, match=says):
            accelerate(model, probe=torch.randn(2, 8))
        assert type(model.layer) is nn.Linear


@pytest.mark.usefixtures("ratios")
def test_a_weight_that_was_masked_keeps_its_values():
    model = pruned()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.mul_(torch.where(layer.weight == 0, -1.0, 1.0))  # zeros become -0.0
    before = state_of(model)
    accelerate(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # -0.0 equals +0.0


@pytest.mark.usefixtures("ratios")
def test_layers_whose_weight_the_model_reads_stay_dense():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
            prune_layers(self)

        def forward(self, x):
            return self.called(self.read(x.to(self.read.weight.dtype)))

    model = Reads()
    model.read.weight.requires_grad_(True)
    done = accelerate(model, probe=torch.randn(2, 8))
    assert done.swapped == ("called",)
    assert done.left_dense == {"read": "the model reads its weight, which would be expanded each time"}
    assert type(model.read) is nn.Linear
    assert model.read.weight.requires_grad
    assert done.bytes_before == 8 * 8 * 4
    model.called = prune_layers(nn.Sequential(nn.Linear(8, 8)))[0]
    del model.called
    model.called = nn.Identity()
    with pytest.raises(InputError, match=r"Reads reads the weights of all its pruned layers itself"):
        accelerate(model, probe=torch.randn(2, 8))
    assert type(model.read) is nn.Linear


def test_a_sparse_layer_that_fails_is_not_blamed_on_the_probe(ratios, monkeypatch):
    del ratios
    model = pruned()
    before = state_of(model)
    monkeypatch.setattr(module, "check_product", lambda *_: None)
    monkeypatch.setattr(SparseLinear, "_multiply", lambda *_: (_ for _ in ()).throw(RuntimeError("kernel failed")))
    with pytest.raises(HalveError, match=r"fails with sparse layers where it ran with dense ones: kernel failed"):
        accelerate(model)
    assert same_state(model.state_dict(), before)
    assert not any(isinstance(layer, SparseLinear) for layer in model.modules())


@pytest.mark.usefixtures("ratios")
def test_a_callers_autocast_is_not_taken_for_an_error():
    model = pruned()
    with torch.autocast("cpu", torch.bfloat16):
        done = accelerate(model)
        lowered = model(IDS).logits
    assert done.difference < 1e-5
    assert lowered.dtype == torch.bfloat16


def test_what_is_decided_by_is_what_is_said(ratios):
    ratios[(32, 64)] = 0.996  # 1.00 in messages
    assert len(accelerate(pruned()).swapped) == 21
    ratios[(32, 64)] = 0.994
    done = accelerate(pruned())
    assert set(done.slower) == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    assert {done.left_dense[name] for name in done.slower} == {"0.99 times as fast as dense at batch 1, less than 1"}


def test_what_launches_cost_counts_too(ratios):
    ratios["call"] = 0.5
    with pytest.raises(InputError, match=r"no layer is faster sparse at batch 1 here, the best 0\.50 times as fast"):
        accelerate(pruned())


def test_too_little_memory_to_measure_in_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1000)
    with pytest.raises(
        InputError, match=r"the matrices of \d+ x \d+ to measure at batch 1 need .* give only_where_faster=None"
    ):
        accelerate(pruned())


@pytest.mark.usefixtures("ratios")
def test_a_model_that_is_random_or_no_model_is_refused():
    model = Returns(lambda y: y + torch.rand(()))
    with pytest.raises(InputError, match=r"does not return the same twice on the probe"):
        accelerate(model, probe=torch.randn(2, 8))
    assert type(model.layer) is nn.Linear
    with pytest.raises(InputError, match=r"takes a model in memory, not 'somewhere': load it first, with halve.load"):
        accelerate("somewhere")


@pytest.mark.usefixtures("ratios")
def test_a_weight_that_is_not_finite_stays_dense():
    model = prune_layers(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}))
    model.b.weight.data[0, 0] = float("nan")
    found = module._candidates(model, Pattern("2:4"), "own")
    assert found == ({"a": model.a}, {"b": "its weight holds NaN or infinity"})


@pytest.mark.usefixtures("ratios")
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_quantised_model_runs_nearly_the_same_and_its_checkpoint_is_rounded(family, values):
    model = pruned(family, torch.bfloat16)
    before = state_of(model)
    done = accelerate(model, values=values)
    bits = int(values.removeprefix("int"))
    assert {model.get_submodule(name).bits for name in done.swapped} == {bits}
    assert done.kernel == speed.describe(torch.device("cpu"), bits)
    assert 0 < done.difference < {8: 0.1, 4: 0.5}[bits]
    shapes = [layer_matrix(model.get_submodule(name).plain()).shape for name in done.swapped]
    assert done.bytes_after == sum(quantised_bytes(d_out, d_in, bits) for d_out, d_in in shapes)
    after = model.state_dict()
    for name, value in before.items():
        if name.removesuffix(".weight") not in done.swapped:
            assert same_bits(after[name], value)
            continue
        assert not after[name][value == 0].any()
        assert 0 < (after[name].float() - value.float()).norm() < {8: 0.01, 4: 0.15}[bits] * value.float().norm()
    name = done.swapped[0]
    rounded = model.get_submodule(name).weight
    restore(model, name)
    assert same_bits(model.get_submodule(name).weight, rounded)


@pytest.mark.usefixtures("ratios")
def test_what_fails_leaves_the_weights_that_were_not_rounded(monkeypatch):
    model = pruned(dtype=torch.bfloat16)
    before = state_of(model)
    layers = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    monkeypatch.setattr(module, "_QUANTISED_OUTPUT", {8: 1e-9, 4: 1e-9})
    with pytest.raises(HalveError, match=r"output differs from the dense one's by"):
        accelerate(model, values="int8")
    assert same_state(model.state_dict(), before)
    assert {name: layer for name, layer in model.named_modules() if is_linear(layer)} == layers
    monkeypatch.setattr(product_check, "quantised_input", lambda x: 1.1 * x.float())
    with pytest.raises(HalveError, match=r"the sparse product of .* is wrong in"):
        accelerate(model, values="int4")
    assert same_state(model.state_dict(), before)


def test_quantised_values_that_cannot_be_had_are_refused():
    with pytest.raises(InputError, match=r"values is 'int3': give own, bf16, int8 or int4"):
        accelerate(pruned(), values="int3")
    with pytest.raises(InputError, match=r"no linear layer|weights are quantised at 2:4 alone, not at 50%"):
        accelerate(pruned(pattern="50%"), pattern="50%", values="int8")
    with pytest.raises(InputError, match=r"its weight is float32, not bfloat16"):
        accelerate(pruned(), values="bf16")


@pytest.mark.usefixtures("ratios")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_products_of_many_rows_are_held_to_the_weights_that_they_are_of(values, dtype):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(192, 192)) for _ in range(3)]).to(dtype)
    prune_layers(model)
    done = accelerate(model, values=values, batch=80, probe={"input": torch.randn(4, 192, dtype=dtype)})
    assert len(done.swapped) == 3


@pytest.mark.usefixtures("ratios")
def test_without_kernels_integers_are_multiplied_all_the_same(monkeypatch):
    for name in ("instruction_sets", "quantised_instruction_sets"):
        monkeypatch.setattr(native, name, tuple)
    native._best.cache_clear()
    with pytest.warns(RuntimeWarning):
        done = accelerate(pruned(dtype=torch.bfloat16), values="int4", only_where_faster=None)
    native._best.cache_clear()
    assert done.difference < 0.5
