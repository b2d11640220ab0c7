import pytest
import torch
from torch import nn

from halve.errors import InputError, UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model.classify import NOT_CALLED, ROUTER, UNSEEN, make_plan
from halve.model.plan import Observed, place_of, set_matrix
from models import DECODERS, MIXTURES, bert, decoder, encoder_decoder, llava, vit

PATTERN = Pattern("2:4")


class Everything(dict):
    """Counts as many tokens for every weight."""

    def __contains__(self, name):
        return True

    def get(self, name, default=None):
        return super().get(name, 20)


def seen(layouts=None, called=None):
    """As if all inputs had been seen, unless said otherwise, and these fused parameters."""
    return Observed(layouts=layouts or {}, called=Everything() if called is None else called)


def fused(model, layout="out_in"):
    return seen({name: layout for name, parameter in model.named_parameters() if parameter.ndim == 3})


@pytest.mark.parametrize("family", DECODERS)
def test_every_matrix_parameter_is_planned_or_excluded_with_a_reason(family):
    model = decoder(family)
    plan = make_plan(model, PATTERN, fused(model))
    accounted = {matrix.parameter for matrix in plan.matrices} | {entry.name for entry in plan.excluded}
    assert accounted == {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    planned = sum(matrix.d_out * matrix.d_in for matrix in plan.matrices)
    dense = sum(torch.Size(entry.shape).numel() for entry in plan.excluded)
    assert planned + dense == sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert all(entry.reason for entry in plan.excluded)
    assert len(plan.blocks) == 3
    assert {matrix.block for matrix in plan.matrices} == {0, 1, 2}


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_are_one_matrix_each_and_routers_stay_dense(family):
    model = decoder(family)
    plan = make_plan(model, PATTERN, fused(model))
    experts = [matrix for matrix in plan.matrices if matrix.expert is not None]
    assert len(experts) == 3 * 2 * 4  # blocks, gate_up and down, experts
    assert all(matrix.routed for matrix in experts)
    assert any("Router" in entry.reason for entry in plan.excluded)


def test_a_fused_parameter_nobody_saw_in_use_is_refused_unless_skipped():
    model = decoder("mixtral")
    with pytest.raises(
        UnsupportedModelError, match=r"only 11% of the matrix weights in model\.layers\.0 of Mixtral.*gate_up_proj"
    ):
        make_plan(model, PATTERN, seen())
    kept = make_plan(model, PATTERN, seen(), least=0.1)
    assert {entry.reason for entry in kept.excluded if "experts" in entry.name} == {UNSEEN}
    plan = make_plan(model, PATTERN, seen(), skip=["*experts*"])
    assert {entry.reason for entry in plan.excluded if "experts" in entry.name} == {"skipped on request"}


def test_fused_parameters_are_left_dense_where_no_layouts_are_to_be_had():
    plan = make_plan(decoder("mixtral"), PATTERN)
    reasons = {entry.reason for entry in plan.excluded if "experts" in entry.name}
    assert reasons == {"experts in one parameter, which the model's own code multiplies"}
    assert {place_of(matrix.name)[1] for matrix in plan.matrices} == {f"self_attn.{name}_proj" for name in "qkvo"}


def test_a_matrix_is_left_dense_for_the_reason_given():
    model = decoder("mixtral")

    def why(matrix):
        return f"{matrix.d_out} outputs" if matrix.d_out in (16, 64) else ""  # of k, v and up, gate together: 128

    plan = make_plan(model, PATTERN, fused(model), ["*v_proj*"], why)
    reasons = {entry.name.split(".", 3)[-1]: entry.reason for entry in plan.excluded}
    assert reasons["self_attn.k_proj.weight"] == "16 outputs"
    assert reasons["self_attn.v_proj.weight"] == "skipped on request"
    assert {matrix.d_out for matrix in plan.matrices} == {32, 128}
    with pytest.raises(InputError, match=r"nothing to prune: .*slow"):
        make_plan(model, PATTERN, fused(model), (), lambda matrix: "slow")


def test_conv1d_is_seen_as_out_by_in():
    model = decoder("gpt2")
    matrix = next(m for m in make_plan(model, PATTERN, seen()).matrices if m.name.endswith("mlp.c_fc.weight"))
    parameter = model.get_parameter(matrix.parameter)
    assert parameter.shape == (32, 128)
    assert (matrix.d_out, matrix.d_in, matrix.layout) == (128, 32, "in_out")
    weight = torch.randn(128, 32)
    set_matrix(parameter, matrix, weight)
    assert torch.equal(parameter.data, weight.T)
    assert torch.equal(matrix.view(parameter.data), weight)


def test_encoders_and_vision_transformers_are_found():
    for model in (bert(), vit()):
        plan = make_plan(model, PATTERN, seen())
        assert len(plan.blocks) == 3
        assert len(plan.matrices) == 18


def test_a_dimension_that_does_not_divide_is_excluded_with_its_size():
    model = decoder("llama", intermediate_size=66)
    reasons = {e.name: e.reason for e in make_plan(model, PATTERN, seen()).excluded}
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "d_in = 66 is not divisible by 4"


def test_nothing_left_to_prune_and_unmatched_skips_are_refused():
    model = decoder("llama")
    with pytest.raises(InputError, match="nothing to prune"):
        make_plan(model, PATTERN, seen(), skip=["*"])
    with pytest.raises(InputError, match="'\\*q_porj\\*' matches no parameter"):
        make_plan(model, PATTERN, seen(), skip=["*q_porj*"])


def test_quantised_weights_are_refused_and_shared_ones_left_alone():
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight = layer.v_proj.weight
    reasons = {e.name: e.reason for e in make_plan(model, PATTERN, seen()).excluded}
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == "shared with another module"
    layer.q_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight is torch\.int8"):
        make_plan(model, PATTERN, seen())


def test_convolutions_gates_and_nested_expert_lists():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 4)
            self.gate = nn.Linear(8, 1)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
            self.table = nn.Parameter(torch.zeros(4, 4))

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    plan = make_plan(model, PATTERN)
    assert [m.name for m in plan.of_block(1)] == ["layers.1.experts.0.weight", "layers.1.experts.1.weight"]
    assert all(m.routed for m in plan.matrices)
    reasons = {e.name.removeprefix("layers.0."): e.reason for e in plan.excluded}
    assert reasons["conv.weight"] == "not a convolution in 2D (Conv1d)"
    assert reasons["gate.weight"] == "one output: a gate"
    assert reasons["table"] == "not the weight of a linear layer (Block.table)"


def test_a_linear_router_beside_its_experts_stays_dense():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 3)
            self.up = nn.Linear(8, 8)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    model = nn.Module()
    model.layers = nn.ModuleList([Mixture(), Mixture()])
    reasons = {e.name: e.reason for e in make_plan(model, PATTERN, seen()).excluded}
    assert reasons == {
        "layers.0.router.weight": "as many outputs as experts beside it: a router",
        "layers.1.router.weight": "as many outputs as experts beside it: a router",
    }


class Deep(nn.Module):
    """A block whose router stands a level below its experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 12))
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.zeros(12, 16, 16))
        self.up = nn.Linear(16, 16)
        self.coefficients = nn.Linear(4, 16)
        self.few = nn.Linear(16, 4)


def test_routers_stay_dense_wherever_they_stand_and_so_does_what_is_too_small():
    model = nn.Module()
    model.layers = nn.ModuleList([Deep(), Deep()])
    plan = make_plan(model, PATTERN, seen({f"layers.{i}.experts.gate_up": "out_in" for i in range(2)}))
    reasons = {e.name.removeprefix("layers.1."): e.reason for e in plan.excluded if e.name.startswith("layers.1.")}
    assert reasons == {
        "router.1.weight": ROUTER,
        "coefficients.weight": "16 x 4 is too small ever to gain",
        "few.weight": "4 x 16 is too small ever to gain",
    }


def test_a_list_in_a_block_is_one_of_experts_where_its_members_see_different_tokens():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    names = [f"layers.{i}.parts.{j}.weight" for i in range(2) for j in range(3)]
    alike = make_plan(model, PATTERN, seen(called=dict.fromkeys(names, 20)))
    assert not any(matrix.routed for matrix in alike.matrices)
    routed = make_plan(model, PATTERN, seen(called={**dict.fromkeys(names, 20), names[1]: 12}))
    assert [matrix.routed for matrix in routed.matrices] == [True] * 3 + [False] * 3
    absent = make_plan(model, PATTERN, seen(called=dict.fromkeys(names[:-1], 20)))
    assert [matrix.routed for matrix in absent.matrices] == [False] * 3 + [True] * 3


class InOneTensor(nn.Module):
    """Parameters that a checkpoint holds as rows of one tensor, one of them small."""

    def __init__(self):
        super().__init__()
        self.z, self.b = nn.Linear(16, 16), nn.Linear(16, 4)


def test_what_another_tower_has_is_told_from_what_stands_outside_of_all():
    reasons = {e.name: e.reason for e in make_plan(llava(), PATTERN, seen()).excluded}
    vision = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    assert reasons[vision] == "in blocks of the vision part that are not pruned"
    assert reasons["model.multi_modal_projector.linear_1.weight"] == "outside the blocks"


def test_what_is_stored_in_one_tensor_is_pruned_whole_or_not_at_all():
    model = nn.Module()
    model.layers = nn.ModuleList([InOneTensor(), InOneTensor()])
    together = [(f"layers.{i}.z.weight", f"layers.{i}.b.weight") for i in range(2)]
    alone, whole = (make_plan(model, PATTERN, seen(), together=each) for each in ((), together))
    assert [matrix.parameter for matrix in alone.matrices] == ["layers.0.z.weight", "layers.1.z.weight"]
    assert sorted(matrix.parameter for matrix in whole.matrices) == sorted(sum(together, ()))
    with pytest.raises(
        InputError, match=r"layers\.1\.b\.weight stays dense \(skipped on request\) and is stored together with"
    ):
        make_plan(model, PATTERN, seen(), skip=["layers.1.b.*"], together=together)
    assert make_plan(model, PATTERN, seen(), skip=["layers.1.*"], together=together).matrices


def test_the_plan_of_an_encoder_decoder_has_both_stacks():
    plan = make_plan(encoder_decoder("t5"), PATTERN, seen())
    assert plan.stacks == (2, 2)
    assert plan.blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert plan.weights + plan.dense_weights == sum(p.numel() for p in encoder_decoder("t5").parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn.weight", (11, "attn.c_attn")),
        ("model.layers.2.mlp.experts.gate_up_proj[5]", (2, "mlp.experts.gate_up_proj")),
        ("model.layers.2.mlp.experts.7.down_proj.weight", (2, "mlp.experts.down_proj")),
        ("0.fc.weight", (0, "fc")),
        ("head.weight", (None, "head.weight")),
        ("model.layers.3.self_attn.indexer.weights_proj.weight", (3, "self_attn.indexer.weights_proj")),
        ("model.layers.1.mlp.weight[3]", (1, "mlp")),
    ],
)
def test_block_and_kind_are_read_off_the_name(name, place):
    assert place_of(name) == place


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_convolutions_are_matrices_and_grouped_ones_several():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Conv2d(8, 16, 3)
            self.pointwise = nn.Conv2d(8, 16, 1)
            self.grouped = nn.Conv2d(16, 32, 3, groups=2)
            self.depthwise = nn.Conv2d(16, 16, 7, groups=16)
            self.narrow = nn.Conv2d(16, 16, 3, groups=8)
            self.fours = nn.Conv2d(8, 8, 3, groups=2)
            self.grey = nn.Conv2d(1, 16, 3)
            self.coloured = nn.Conv2d(3, 16, 3)
            self.thin = nn.Conv2d(8, 4, 3)
            self.own = Standardised(8, 8, 3)

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    plan = make_plan(model, PATTERN)
    found = {m.name: (m.d_out, m.d_in, m.taps, m.layout, m.expert) for m in plan.of_block(1)}
    assert found == {
        "layers.1.plain.weight": (16, 72, 9, "conv", None),
        "layers.1.pointwise.weight": (16, 8, 1, "conv", None),
        "layers.1.grouped.weight[0]": (16, 72, 9, "conv", 0),
        "layers.1.grouped.weight[1]": (16, 72, 9, "conv", 1),
        "layers.1.fours.weight[0]": (4, 36, 9, "conv", 0),
        "layers.1.fours.weight[1]": (4, 36, 9, "conv", 1),
    }
    reasons = {e.name.removeprefix("layers.0."): e.reason for e in plan.excluded}
    assert reasons["depthwise.weight"] == "every output sees one channel: a depthwise convolution"
    assert reasons["grey.weight"] == "every output sees one channel"
    assert reasons["narrow.weight"] == "the number of input channels that an output sees = 2 is not divisible by 4"
    assert reasons["coloured.weight"] == "the number of input channels that an output sees = 3 is not divisible by 4"
    assert reasons["thin.weight"] == "4 x 72 is too small ever to gain"
    assert reasons["own.weight"] == "convolution with code of its own (Standardised)"


def test_groups_of_a_pattern_do_not_cross_from_one_tap_to_the_next():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Conv2d(6, 16, 2), "b": nn.Conv2d(8, 16, 2)})])
    assert [matrix.name for matrix in make_plan(model, PATTERN).matrices] == ["layers.0.b.weight"]  # though 24 fits


def test_a_convolution_whose_inputs_are_not_seen_stays_dense():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Conv2d(8, 16, 2), "b": nn.Linear(8, 16)})])
    plan = make_plan(model, PATTERN, Observed(layouts={}, called={"layers.0.b.weight": 4}), least=0.0)
    assert {e.name: e.reason for e in plan.excluded} == {"layers.0.a.weight": NOT_CALLED}
