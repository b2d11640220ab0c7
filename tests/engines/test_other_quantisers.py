"""Whether the weight quantisers of torchao and llm-compressor leave the zeros of a pruned model alone.

They run where the packages are installed, docs/other-quantisers.md has the command, and are skipped elsewhere.
"""

from importlib.util import find_spec

import pytest
import torch

from halve.maths.pattern import Pattern
from halve.pruning import prune
from models import decoder, save
from tiny_tokenizers import byte_bpe

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours
with_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
with_llm_compressor = pytest.mark.skipif(find_spec("llmcompressor") is None, reason="llmcompressor is not installed")
PATTERN = Pattern("2:4")
GROUP = 32


def two_of_four(d_out=64, d_in=128):
    """A matrix at 2:4 whose kept weights are not centred, as an asymmetric grid would like them to be, and its mask."""
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)) + 0.3
    mask = PATTERN.keep_mask(weight.abs())
    return weight * mask, mask


def torchao_configs():
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    grids = {"symmetric": MappingType.SYMMETRIC, "asymmetric": MappingType.ASYMMETRIC}
    found = {"int8": Int8WeightOnlyConfig(), "int8 by groups": Int8WeightOnlyConfig(granularity=PerGroup(GROUP))}
    for name, grid in grids.items():
        found[f"int8, activations {name}"] = Int8DynamicActivationInt8WeightConfig(act_mapping_type=grid)
        found[f"int4 {name}"] = IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP), grid)
        found[f"int4 by rows {name}"] = IntxWeightOnlyConfig(torch.int4, PerAxis(0), grid)
        found[f"int8 {name}"] = IntxWeightOnlyConfig(torch.int8, PerGroup(GROUP), grid)
    grouped = {"weight_dtype": torch.int4, "weight_granularity": PerGroup(GROUP)}
    return found | {"int4, activations int8": Int8DynamicActivationIntxWeightConfig(**grouped)}


OF_TORCHAO = (
    "int8",
    "int8 by groups",
    *(
        f"{kind} {grid}"
        for kind in ("int8, activations", "int4", "int4 by rows", "int8")
        for grid in ("symmetric", "asymmetric")
    ),
    "int4, activations int8",
)


@with_torchao
@pytest.mark.parametrize("name", OF_TORCHAO)
def test_torchao_keeps_zeros_on_grids_that_have_one(name):
    from torchao.quantization import quantize_

    weight, mask = two_of_four()
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    quantize_(torch.nn.Sequential(layer), torchao_configs()[name])
    got = layer.weight.dequantize()
    assert type(layer.weight) is not torch.nn.Parameter
    assert not torch.equal(got, weight)
    assert (got - weight).norm() < 0.15 * weight.norm()
    assert not got[~mask].any()
    assert PATTERN.satisfied_by(got)


@with_torchao
@pytest.mark.parametrize("name", ["tinygemm", "hqq"])
def test_torchao_fills_zeros_on_the_grids_of_its_int4_for_gpus(name):
    """``Int4WeightOnlyConfig`` itself needs a GPU, or the package mslk: it quantises by these functions."""
    from torchao.quantization import quant_primitives as q

    weight, mask = two_of_four()
    if name == "tinygemm":
        block, bounds = (1, GROUP), (torch.int32, 0, 15)
        scale, zero = q._choose_qparams_affine_tinygemm(weight, q.MappingType.ASYMMETRIC, block, *bounds, 1e-6)
        codes = q._quantize_affine_tinygemm(weight, block, scale, zero, *bounds)
        got = q._dequantize_affine_tinygemm(codes, block, scale, zero, *bounds, output_dtype=torch.float32)
    else:
        codes, scale, zero, _ = q._choose_qparams_and_quantize_affine_hqq(
            weight, nbits=4, group_size=GROUP, device="cpu", compute_dtype=torch.float32, raw_output=True
        )
        got = ((codes.float().view(-1, GROUP) - zero.view(-1, 1)) * scale.view(-1, 1)).view_as(weight)
    assert (got - weight).norm() < 0.15 * weight.norm()
    assert got[~mask].count_nonzero() > 0.9 * (~mask).sum()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny Llama at 2:4 whose matrices are wide enough for groups of 128."""
    place = tmp_path_factory.mktemp("quantisers")
    dense = save(decoder("llama", vocab_size=320, hidden_size=128, intermediate_size=256), place / "dense")
    byte_bpe().save_pretrained(dense)
    prune(dense, place / "pruned", method="magnitude", refit="none")
    return place / "pruned"


def quantised_by_llmcompressor(directory, modifier, scheme):
    """Return every pruned matrix as it was and as it is quantised."""
    import datasets
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers import quantization
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters() if value.ndim == 2}
    ids = torch.randint(0, 320, (16, 32), generator=torch.Generator().manual_seed(0))
    text = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = getattr(quantization, modifier)(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, dataset=text, recipe=[recipe], num_calibration_samples=16, max_seq_length=32)
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None and isinstance(module, torch.nn.Linear):
            zero = getattr(module, "weight_zero_point", None)
            weights = module.quantization_scheme.weights
            got = fake_quantize(module.weight.data, module.weight_scale, zero, weights)
            found[name] = (before[f"{name}.weight"], got)
    return found


@with_llm_compressor
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "W4A16_ASYM"])
def test_llm_compressors_rounding_keeps_zeros(scheme, pruned):
    found = quantised_by_llmcompressor(pruned, "QuantizationModifier", scheme)
    assert len(found) == 21
    for before, got in found.values():
        assert not torch.equal(before, got)
        assert (got - before).norm() < 0.2 * before.norm()
        assert not got[before == 0].any()
        assert PATTERN.satisfied_by(got)


@with_llm_compressor
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_llm_compressors_gptq_fills_zeros(scheme, pruned):
    found = quantised_by_llmcompressor(pruned, "GPTQModifier", scheme)
    assert len(found) == 21
    filled = sum(int(got[before == 0].count_nonzero()) for before, got in found.values())
    assert filled > 0.01 * sum(int((before == 0).sum()) for before, _ in found.values())
