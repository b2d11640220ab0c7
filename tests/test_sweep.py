"""A seeded part of the sweep over all classes of transformers, the rest of it marked slow; and its judge judged."""

import copy
import json
import random
from dataclasses import asdict

import pytest
import torch

import halve
import sweep
import sweep_masks as masks
import sweep_oracle as oracle
import tiny_inputs
import tiny_models
from models import decoder, tokens
from sweep_judge import Result, judge

RIGHT = (
    "causal:qwen3_moe:Qwen3MoeForCausalLM",
    "causal:olmo_hybrid:OlmoHybridForCausalLM",
    "causal:gpt2:GPT2LMHeadModel",
    "image-text:deepseek_vl:DeepseekVLForConditionalGeneration",
    "masked:roberta:RobertaForMaskedLM",
    "vision:deit:DeiTForImageClassification",
)
"""One of each sort that people prune: these have to work, not only to be refused."""
SAMPLED = 6
CASES = {case.name: case for case in tiny_models.cases()}
OTHERS = sorted(CASES.keys() - set(RIGHT))
DRAWN = set(random.Random(17).sample(OTHERS, SAMPLED))


@pytest.mark.parametrize("name", RIGHT)
def test_a_class_that_has_to_work_is_right(name):
    result = judge(CASES[name])
    assert (result.verdict, result.reason) == ("right", "")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DRAWN else pytest.mark.slow) for name in OTHERS]
)
def test_no_class_is_wrong_or_crashes(name):
    result = judge(CASES[name])
    if result.verdict == "not built":
        pytest.skip(result.reason)
    assert result.verdict in {"right", "refused"}, result.reason


@pytest.fixture(scope="module")
def run():
    """A tiny Llama before and after wanda, what its blocks were fed meanwhile, and the batches."""
    dense = decoder("llama")
    batches = [{"input_ids": tokens(1, 17)}, {"input_ids": tokens(3, 24, seed=1)}]
    pruned = copy.deepcopy(dense)
    listening = oracle.Listening(pruned)
    done = halve.prune(pruned, calibration=batches, method="wanda", refit="none", forward_dtype="float32")
    listening.close()
    matrices = [masks.Matrix(m.parameter, m.expert, m.layout == "in_out") for m in done.report.matrices]
    return dense, pruned, listening, matrices, batches


def reference_of(run):
    dense, pruned, _, matrices, batches = run
    return oracle.Reference(dense, pruned, {matrix.parameter for matrix in matrices}, batches)


def test_the_judge_passes_a_right_run(run):
    reference = reference_of(run)
    assert oracle.judge_streams(run[2], reference, dense_too=False).wrong == []
    found = masks.judge_masks(run[3], reference, run[2].blocks)
    assert found.wrong == []
    assert found.facts["groups"] == sum(p.numel() for n, p in run[0].named_parameters() if "proj" in n) // 4
    assert found.facts["matrices_unseen"] == 0


def test_the_judge_sees_a_hidden_state_that_is_off(run):
    listening = copy.deepcopy(run[2])
    call = next(call for call in listening.calls["model.layers.1"] if call.on_its_own)
    name = next(name for name, tensor in call.inputs.items() if tensor.is_floating_point())
    call.inputs[name][0, 3] *= 1.01
    assert (
        "model.layers.1: its hidden state"
        in oracle.judge_streams(listening, reference_of(run), dense_too=False).wrong[0]
    )


def test_the_judge_sees_an_output_that_is_off_on_a_right_hidden_state(run):
    listening = copy.deepcopy(run[2])
    next(call for call in listening.calls["model.layers.2"] if call.on_its_own).output[0, 3] *= 1.01
    assert "model.layers.2: its output" in oracle.judge_streams(listening, reference_of(run), dense_too=False).wrong[0]


def test_the_judge_misses_a_stream_that_was_not_fed(run):
    wrong = oracle.judge_streams(run[2], reference_of(run), dense_too=True).wrong
    assert "model.layers.1 was not fed the dense model's hidden states of batch 0" in wrong


def test_the_judge_misses_a_batch_that_was_not_fed(run):
    listening = copy.deepcopy(run[2])
    calls = listening.calls["model.layers.0"]
    calls[:] = [call for call in calls if not call.on_its_own or next(iter(call.inputs.values())).shape[0] == 1]
    wrong = oracle.judge_streams(listening, reference_of(run), dense_too=False).wrong
    assert wrong == ["model.layers.0 was not fed the pruned model's hidden states of batch 1"]


def test_the_judge_sees_masks_by_another_score(run):
    dense, _, listening, matrices, batches = run
    pruned = copy.deepcopy(dense)
    halve.prune(pruned, calibration=batches, method="magnitude", refit="none", forward_dtype="float32")
    reference = oracle.Reference(dense, pruned, {matrix.parameter for matrix in matrices}, batches)
    assert "of wanda's groups differ" in masks.judge_masks(matrices, reference, listening.blocks).wrong[0]


def test_the_judge_sees_a_kept_weight_that_changed(run):
    dense, pruned, listening, matrices, batches = run
    pruned = copy.deepcopy(pruned)
    weight = pruned.get_parameter(matrices[0].parameter).data
    weight[weight != 0] += 1e-6
    reference = oracle.Reference(dense, pruned, {matrix.parameter for matrix in matrices}, batches)
    assert (
        f"{matrices[0].parameter}: a weight that was kept has changed"
        in masks.judge_masks(matrices, reference, listening.blocks).wrong
    )


def test_the_judge_sees_a_router_that_was_pruned(run):
    pruned = run[1]
    assert masks.judge_routers(run[3], pruned, experts=6).wrong == []
    outputs = pruned.get_parameter(run[3][0].parameter).shape[0]
    assert "chooses among experts, and was pruned" in masks.judge_routers(run[3], pruned, experts=outputs).wrong[0]


def test_the_judge_sees_a_bit_that_changed_in_what_was_not_pruned(run):
    dense, pruned, _, matrices, _ = run
    changed = {matrix.parameter for matrix in matrices}
    assert masks.judge_untouched(dense, pruned, pruned, changed).wrong == []
    found = copy.deepcopy(pruned)
    norm = found.model.norm.weight.data
    norm[0] = torch.nextafter(norm[0], torch.tensor(2.0))
    assert masks.judge_untouched(dense, found, pruned, changed).wrong == [
        "model.norm.weight was not pruned, and has changed"
    ]


def test_the_judge_leaves_the_finished_model_as_it_was(run):
    before = {name: tensor.clone() for name, tensor in run[1].state_dict().items()}
    masks.judge_masks(run[3], reference_of(run), run[2].blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run[1].state_dict().items())


def test_no_tiny_model_is_the_identity_or_constant():
    model = tiny_models.tiny_model(CASES["vision:deit:DeiTForImageClassification"])
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, name


def test_every_input_is_as_long_as_it_says():
    case = CASES["causal:llama:LlamaForCausalLM"]
    batches = tiny_inputs.batches(case, tiny_models.tiny_model(case))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == list(tiny_inputs.SHAPES)


def test_a_process_that_ends_or_takes_too_long_is_a_crash(monkeypatch):
    def slow_or_gone(case):
        if case.family == "gpt2":
            raise SystemExit(3)
        torch.zeros(1)
        import time

        time.sleep(60)

    monkeypatch.setattr(sweep, "judge", slow_or_gone)
    cases = [CASES["causal:gpt2:GPT2LMHeadModel"], CASES["causal:llama:LlamaForCausalLM"]]
    found = {result.family: result for result in sweep.judge_all(cases, workers=2, seconds=1.5)}
    assert found["gpt2"].reason == "the process ended with 3"
    assert found["llama"].reason == "it took more than 2 seconds"
    assert {result.verdict for result in found.values()} == {"crash"}


def results():
    return [
        Result("causal:a:A", "causal", "a", "A", "right"),
        Result("masked:a:AM", "masked", "a", "AM", "refused", "wanda", "InputError: it is | so"),
        Result("causal:b:B", "causal", "b", "B", "not built", "build", "TypeError: no (x.py:3)"),
        Result("causal:c:C", "causal", "c", "C", "wrong", "wanda", "wanda: off"),
    ]


def test_results_are_read_back_and_the_later_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    first, *others = results()
    later = Result(first.name, "causal", "a", "A", "crash")
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in (first, *others, later)))
    assert sweep.read_results(path) == {first.name: later, **{result.name: result for result in others}}


def test_a_table_has_one_row_a_family_and_leaves_the_page_around_it(tmp_path):
    page = tmp_path / "models.md"
    page.write_text("# Models\n\nbefore\n\n<!-- sweep: begin -->\nold\n<!-- sweep: end -->\n\nafter\n")
    sweep.write_table(page, results())
    text = page.read_text()
    assert text.startswith("# Models\n\nbefore\n\n<!-- sweep: begin -->\n")
    assert text.endswith("<!-- sweep: end -->\n\nafter\n")
    assert "old" not in text
    assert "| `a` | causal | masked: refused (it is \\| so) |\n" in text
    assert "| `b` |  | causal: not tried (no) |\n" in text
    assert "| `c` |  | causal: **wrong** (wanda: off) |\n" in text
    assert "| causal | 1 | 1 | 0 | 0 | 1 |\n" in text
