import pytest
import torch

from halve.maths.pattern import Pattern
from halve.model.blocks import run_model
from halve.model.reconstruct import Reconstruction
from halve.model.stacks import find_stack
from halve.model.stream import HiddenStates
from halve.model.survey import plan_model
from halve.run import executor
from halve.run import loop as run_module
from halve.run.loop import prune_blocks
from halve.solve.matrix import prune_weight
from halve.solve.methods import METHODS
from halve.solve.objective import Objective
from halve.solve.outcome import Status
from models import DECODERS, MIXTURES, bert, decoder, vit
from pruned_blocks import CPU, assert_pruned, batches, settings


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", ["wanda", "prox-gradient"])
def test_every_family_is_pruned_and_nothing_else_is_touched(family, method):
    model = decoder(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options = {"beta": 1.3} if method == "prox-gradient" else {}
    report = prune_blocks(model, batches(), settings(method, "cg", options=options, min_expert_tokens=1), device=CPU)
    reported = assert_pruned(model, report)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in reported), name
    assert report.blocks == 3
    assert all(0 <= m.facts["relative_loss"] < 1 for m in report.matrices if m.status is Status.OK)


@pytest.mark.parametrize(
    ("model", "data"),
    [(bert(), batches()), (vit(), [{"pixel_values": torch.randn(4, 3, 16, 16)}])],
)
def test_encoders_and_vision_transformers(model, data):
    report = prune_blocks(model, data, settings("sparsegpt", "cg"), device=CPU)
    assert_pruned(model, report)
    assert len(report.matrices) == 18


def test_later_blocks_see_what_the_pruned_earlier_ones_give():
    """The oracle prunes the second block by hand, from the inputs that a model with a pruned first block feeds it."""
    model, reference = decoder("llama"), decoder("llama")
    report = prune_blocks(model, batches(), settings("sparsegpt"), device=CPU)
    stack = list(find_stack(reference)[1])
    for matrix in report.matrices:
        if ".layers.0." in matrix.parameter:
            reference.get_parameter(matrix.parameter).data.copy_(model.get_parameter(matrix.parameter))
    seen = []
    hook = stack[1].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    for batch in batches():
        run_model(reference, batch)
    hook.remove()
    x = torch.cat(seen).double()
    gram = (x.T @ x / len(x)).float()
    expected = prune_weight(stack[1].self_attn.o_proj.weight.data, gram, "2:4", "sparsegpt", "none")
    got = model.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(got == 0, expected.weight == 0)
    torch.testing.assert_close(got.data, expected.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["sparsegpt", "wanda++"])
def test_a_gpu_solves_from_statistics_that_are_kept_in_memory(method, monkeypatch):
    here, there = decoder("mixtral"), decoder("mixtral")
    cuda = torch.device("cuda")
    prune_blocks(here, batches(), settings(method, min_expert_tokens=1), device=cuda)
    monkeypatch.setattr(executor, "home_of_sums", lambda _size, _device: CPU)
    assert_pruned(there, prune_blocks(there, batches(), settings(method, min_expert_tokens=1), device=cuda))
    for name, parameter in here.named_parameters():
        torch.testing.assert_close(there.get_parameter(name), parameter, rtol=1e-2, atol=1e-3)


def test_where_statistics_are_kept_is_asked_with_their_size(monkeypatch):
    asked = []
    monkeypatch.setattr(executor, "home_of_sums", lambda size, device: asked.append(size) or device)
    prune_blocks(decoder("mixtral"), batches(), settings("wanda", min_expert_tokens=1), device=CPU)
    model = decoder("mixtral").config
    experts = model.num_local_experts * (model.hidden_size**2 + model.intermediate_size**2)
    heads = model.num_attention_heads * (model.hidden_size // model.num_attention_heads)
    assert set(asked) == {4 * (experts + model.hidden_size**2 + heads**2)}


def test_two_runs_give_the_same_bytes_in_memory_or_on_disk(tmp_path):
    models = [decoder("gemma3") for _ in range(3)]
    for model, folder in zip(models, (None, None, tmp_path), strict=True):
        prune_blocks(model, batches(), settings("sparsegpt", "cg"), device=CPU, offload=folder)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name))
        assert torch.equal(parameter, models[2].get_parameter(name))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bytes_twice(method):
    options = {"beta": 1.3} if method == "prox-gradient" else {}
    asked = settings(method, "cg", options=options, reconstruction=Reconstruction(epochs=1))
    first, second = decoder("llama"), decoder("llama")
    for model in (first, second):
        prune_blocks(model, batches(4), asked, device=CPU)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_bfloat16_models_keep_their_dtype_and_products_may_run_in_bfloat16():
    model = decoder("llama").to(torch.bfloat16)
    report = prune_blocks(model, batches(), settings("wanda", "cg"), device=CPU, precision=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_pruned(model, report)


def test_progress_counts_every_matrix_once():
    steps = []
    report = prune_blocks(decoder("llama"), batches(), settings(), device=CPU, listen=steps.append)
    solved = [step.matrix.name for step in steps if step.matrix is not None]
    assert solved == [matrix.name for matrix in report.matrices]
    assert steps[0].phase == "plan"
    assert len(steps[0].plan.matrices) == len(solved)
    assert steps[-1].phase == "done"
    assert steps[-1].finished == steps[-1].matrices == len(solved)


@pytest.mark.parametrize(
    ("sequences", "objective", "warned"), [(1, None, True), (4, None, False), (1, Objective(shrinkage=0.2), False)]
)
def test_few_tokens_are_told_once_and_before_the_first_matrix(sequences, objective, warned):
    steps = []
    few = [{"input_ids": torch.randint(0, 64, (sequences, 24))}]
    asked = settings("sparsegpt", **({} if objective is None else {"objective": objective}))
    prune_blocks(decoder("llama"), few, asked, device=CPU, listen=steps.append)
    told = [place for place, step in enumerate(steps) if step.caution]
    assert len(told) == warned
    if warned:
        assert told[0] < next(place for place, step in enumerate(steps) if step.matrix is not None)
        assert "mlp.down_proj.weight has 64 inputs and saw 24 calibration tokens: " in steps[told[0]].caution


@pytest.mark.parametrize("family", MIXTURES)
def test_the_plan_of_a_mixture_has_both_kinds_of_experts(family):
    plan, _ = plan_model(decoder(family), batches(), Pattern("2:4"))
    assert {m.parameter.rpartition(".")[2] for m in plan.matrices if m.expert} == {"gate_up_proj", "down_proj"}


def test_hidden_states_come_back_from_disk_unchanged(tmp_path):
    states = HiddenStates(tmp_path)
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    states.append(first)
    assert torch.equal(states[0], first)
    states[0] = second
    assert torch.equal(states[0], second)


def test_settings_know_all_their_options():
    assert settings("prox-gradient", "cg", options={"beta": 1.2}).all_options["lambda0"] == 0.01
    assert settings("prox-gradient", "cg", options={"beta": 1.2}).all_options["beta"] == 1.2
    assert "refit_tolerance" in settings("wanda", "cg").all_options
    assert settings("magnitude", "cg").needs_calibration
    assert settings("wanda").needs_calibration
    assert not settings("magnitude").needs_calibration


@pytest.mark.parametrize("method", ["auto", "sparsegpt", "alps"])
def test_solving_together_changes_next_to_nothing(monkeypatch, method):
    together, alone = decoder("llama"), decoder("llama")
    report = prune_blocks(together, batches(), settings(method, "cg"), device=CPU)
    monkeypatch.setattr(run_module, "bundles", lambda matrices, statistics: ([each] for each in matrices))
    other = prune_blocks(alone, batches(), settings(method, "cg"), device=CPU)
    assert [each.name for each in report.matrices] == [each.name for each in other.matrices]
    for one, two in zip(report.matrices, other.matrices, strict=True):
        assert one.facts["relative_loss"] == pytest.approx(two.facts["relative_loss"], rel=0.05)
    for name, parameter in together.model.layers[0].named_parameters():  # later blocks see rounding
        twin = alone.model.layers[0].get_parameter(name)
        assert torch.equal(parameter != 0, twin != 0), name
        assert float((parameter.data - twin.data).norm() / twin.data.norm()) < 5e-3, name


@pytest.mark.parametrize("changes", [{}, {"reconstruction": Reconstruction(epochs=1, learning_rate=1e-3)}])
def test_nothing_is_run_beyond_the_last_pruned_block(changes):
    steps = []
    asked = settings(skip=("model.layers.1.*", "model.layers.2.*"), **changes)
    model = decoder("llama")
    report = prune_blocks(model, batches(), asked, device=CPU, listen=steps.append)
    assert {matrix.name.split(".")[2] for matrix in report.matrices} == {"0"}
    assert {step.block for step in steps if step.phase in {"collect", "replay", "reconstruct"}} == {0}
    assert report.blocks == 3
