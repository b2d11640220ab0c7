import logging
import math
import random
import sys
from importlib.metadata import version

import lm_eval
import pytest
import torch
import transformers
from torch import nn

from halve.errors import HalveError, InputError
from halve.evaluation.tasks import evaluate_tasks, measure_tasks, open_tasks
from local_tasks import (
    ACCURACY,
    EXACT,
    QUESTIONS,
    TOKENIZER,
    contrary,
    documents,
    llama,
    stay_offline,
    write_group,
    write_task,
)
from models import bert


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    stay_offline(tmp_path, monkeypatch)


@pytest.fixture
def defined(tmp_path):
    """A directory with the task ``mc``."""
    return write_task(tmp_path / "tasks", "mc")


def log_likelihood(model, context, continuation):
    """Sum of the log-probabilities of a continuation's tokens, from the model's logits alone."""
    start, end = TOKENIZER(context)["input_ids"], TOKENIZER(continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + end[:-1]])).logits[0].double()
    steps = logits.log_softmax(-1)[len(start) - 1 :]
    return steps.gather(1, torch.tensor(end)[:, None]).sum().item()


def correct(model, rows, *, normalised=False):
    """Which questions a model answers, its answer being the likeliest choice (by character, if normalised)."""
    judged = []
    for row in rows:
        scores = [
            log_likelihood(model, row["question"], f" {choice}") / (len(choice) if normalised else 1)
            for choice in row["choices"]
        ]
        judged.append(scores.index(max(scores)) == row["answer"])
    return judged


def greedy(model, text, count):
    """The likeliest tokens after a text, as text, up to the first line's end."""
    ids = TOKENIZER(text)["input_ids"]
    length = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[length:], skip_special_tokens=True).split("\n")[0]


def by_key(results):
    return {(score.task, score.metric): score for score in results.scores}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_accuracy_is_that_of_the_models_own_logits(defined, batch_size):
    model = llama()
    options = {"batch_size": batch_size, "forward_dtype": "float32"}  # as the oracle has it, on any processor
    results = evaluate_tasks(model, ["mc"], tokenizer=TOKENIZER, tasks_path=defined, **options)
    plain, normalised = (correct(model, documents(), normalised=flag) for flag in (False, True))
    assert 0 < sum(plain) < 10  # so that an error would show
    assert sum(plain) != sum(normalised)
    scores = by_key(results)
    assert scores["mc", "acc"].value == pytest.approx(sum(plain) / 10)
    assert scores["mc", "acc_norm"].value == pytest.approx(sum(normalised) / 10)
    mean = sum(plain) / 10
    assert scores["mc", "acc"].stderr == pytest.approx(math.sqrt(mean * (1 - mean) / 9))
    score = scores["mc", "acc"]
    assert (score.examples, score.num_fewshot, score.version, score.filter) == (10, 0, "3", "")
    assert (score.higher_is_better, score.is_group, len(score.sha256)) == (True, False, 64)
    assert (results.dtype, results.limit, results.notes) == ("float32", None, ())
    assert results.seconds > 0
    assert results.versions == {
        "lm-eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "halve": version("halve"),
    }
    assert (results.max_length, results.bos, results.groups) == (128, "", {})


def test_what_a_model_writes_is_compared_with_the_answer(tmp_path):
    model = llama()
    answers = [greedy(model, question, 3) if index % 3 else "no" for index, question in enumerate(QUESTIONS)]
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    generation = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    changes = {"doc_to_target": "{{answer}}", "doc_to_choice": None, "generation_kwargs": generation}
    write_task(tmp_path / "tasks", "gen", rows, output_type="generate_until", metric_list=[EXACT], **changes)
    results = evaluate_tasks(model, ["gen"], tokenizer=TOKENIZER, tasks_path=tmp_path / "tasks", batch_size=4)
    assert by_key(results)["gen", "exact_match"].value == pytest.approx(0.6)
    assert TOKENIZER.pad_token is None  # lm-eval sets one on its own copy


def test_rolling_log_likelihood(tmp_path):
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    changes = {"doc_to_text": "", "doc_to_target": "{{question}}", "doc_to_choice": None, "metric_list": [metric]}
    write_task(tmp_path / "tasks", "roll", output_type="loglikelihood_rolling", **changes)
    model = llama()
    options = {"num_fewshot": 2, "forward_dtype": "float32"}  # as the oracle has it, on any processor
    results = evaluate_tasks(model, ["roll"], tokenizer=TOKENIZER, tasks_path=tmp_path / "tasks", **options)
    total = sum(log_likelihood(model, "<s>", question) for question in QUESTIONS)
    (score,) = results.scores
    assert score.value == pytest.approx(math.exp(-total / sum(len(text.split()) for text in QUESTIONS)), rel=1e-4)
    assert (score.num_fewshot, score.stderr, score.higher_is_better) == (0, None, False)
    assert results.notes == ("roll is defined without solved examples, so its num_fewshot is 0",)


def test_a_group_comes_before_its_tasks(defined):
    write_task(defined, "short", documents()[:4], metric_list=[{"metric": "acc"}])
    write_group(defined, "both", ["mc", "short"])
    model = llama()
    results = evaluate_tasks(model, ["both"], tokenizer=TOKENIZER, tasks_path=defined)
    names = [(score.task, score.is_group, score.examples) for score in results.scores]
    assert names == [("both", True, 14), ("mc", False, 10), ("mc", False, 10), ("short", False, 4)]
    answered = correct(model, documents())
    assert results.scores[0].value == pytest.approx((sum(answered) + sum(answered[:4])) / 14)
    assert (results.scores[0].version, results.scores[0].sha256) == ("5", "")
    assert "[Task: short] metric acc is defined, but aggregation is not. using default aggregation=mean" in (
        results.notes
    )


def test_limit_takes_the_first_examples(defined):
    model = llama()
    results = evaluate_tasks(model, ["mc"], tokenizer=TOKENIZER, tasks_path=defined, limit=3)
    assert by_key(results)["mc", "acc"].value == pytest.approx(sum(correct(model, documents()[:3])) / 3)
    assert (results.scores[0].examples, results.limit) == (3, 3)


def test_solved_examples_change_the_prompts_and_their_hash(tmp_path, defined):
    write_task(defined, "zero", num_fewshot=0)
    asked = {"tokenizer": TOKENIZER, "tasks_path": defined}
    plain = evaluate_tasks(llama(), ["mc", "zero"], **asked)
    shown = evaluate_tasks(llama(), ["mc", "zero"], num_fewshot=2, **asked)
    again = evaluate_tasks(llama(), ["zero", "mc"], num_fewshot=2, **asked)
    assert [score.num_fewshot for score in shown.scores] == [2, 2, 0, 0]
    assert shown.scores[0].sha256 != plain.scores[0].sha256
    assert shown.scores[2:] == plain.scores[2:]
    assert again.scores[2:] == shown.scores[:2]  # which were chosen does not depend on the other tasks
    assert shown.notes[-1] == "zero is defined without solved examples, so its num_fewshot is 0"


def test_a_checkpoint_and_its_model_in_memory_score_the_same(model, defined):
    assert evaluate_tasks(model, ["mc"], tasks_path=defined).scores == (
        evaluate_tasks(llama(), ["mc"], tokenizer=TOKENIZER, tasks_path=defined).scores
    )


def test_products_are_made_in_the_dtype_asked_for(defined):
    seen = set()
    model = llama()
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        results = evaluate_tasks(model, ["mc"], tokenizer=TOKENIZER, tasks_path=defined, limit=2, forward_dtype=name)
        assert (results.dtype, seen) == (name, {dtype})
        seen.clear()
    evaluate_tasks(model.bfloat16(), ["mc"], tokenizer=TOKENIZER, tasks_path=defined, limit=2, forward_dtype="float32")
    assert seen == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_bfloat16_logits_are_normalised_in_float32(tmp_path):
    metric = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    changes = {"doc_to_target": "fox", "doc_to_choice": None, "metric_list": [metric]}
    write_task(tmp_path / "tasks", "ll", output_type="loglikelihood", **changes)
    model = llama().bfloat16()
    (score,) = evaluate_tasks(model, ["ll"], tokenizer=TOKENIZER, tasks_path=tmp_path / "tasks", batch_size=1).scores
    mean = sum(log_likelihood(model, question, "fox") for question in QUESTIONS) / 10
    assert score.value == pytest.approx(math.exp(-mean), rel=1e-3)  # normalised in bfloat16 it is 3 % off


def test_an_untied_head_is_not_tied(defined):
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn(320, 32, generator=torch.Generator().manual_seed(1)))
    results = evaluate_tasks(model, ["mc"], tokenizer=TOKENIZER, tasks_path=defined)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert results.scores[0].value == pytest.approx(sum(correct(model, documents())) / 10)
    assert "tie_weights" not in vars(model)


def test_nothing_of_the_callers_is_changed(defined, capsys):
    model = llama().train()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]

    def state():
        numbers = random.getstate(), torch.get_rng_state().tolist(), sys.stdout, sys.stderr
        return *numbers, [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]

    before = state()
    evaluate_tasks(model, ["mc"], tokenizer=TOKENIZER, tasks_path=defined)
    assert state() == before
    assert model.training
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_progress_counts_requests_and_may_print(defined, capsys):
    steps = []

    def progress(*step):
        steps.append(step)
        print(step[1], end=" ")  # noqa: T201

    evaluate_tasks(llama(), ["mc"], tokenizer=TOKENIZER, tasks_path=defined, progress=progress)
    assert steps == [("mc", done, 40) for done in range(1, 41)]
    assert capsys.readouterr().out == " ".join(map(str, range(1, 41))) + " "


def test_prompts_that_are_cut_are_noted(tmp_path):
    rows = [{**row, "question": "the quick brown fox " * 40} for row in documents()]
    write_task(tmp_path / "tasks", "long", rows)
    results = evaluate_tasks(llama(), ["long"], tokenizer=TOKENIZER, tasks_path=tmp_path / "tasks")
    (note,) = results.notes
    assert note.startswith("Combined length of context")
    assert "exceeds model's maximum length (128)" in note
    assert note.endswith(" times alike)")


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["arc_easi"], {}, "there is no task 'arc_easi' in lm-eval or .*/tasks: did you mean 'arc_easy'"),
        (["qqqqqqqq"], {"tasks_path": None}, "no task 'qqqqqqqq' in lm-eval: `lm-eval ls tasks` lists them"),
        (["arc_easy"], {}, "task 'arc_easy' could not be loaded: .*; check its definition, and the network"),
        (["mc", "mc"], {}, "'mc' is asked for twice"),
        (["mc", "all"], {}, "task 'mc' is asked for twice, in 'mc' and in 'all'"),
        (["mc", ""], {}, r"tasks \['mc', ''\] are not usable: give a list of names"),
        ([], {}, r"tasks \[\] are not usable"),
        ("mc", {}, "tasks 'mc' are not usable"),
        (["mc"], {"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        (["mc"], {"limit": 0.5}, r"limit must be a whole number of at least 1, got 0\.5"),
        (["mc"], {"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0, got -1"),
        (["mc"], {"tasks_path": "no/where"}, "tasks_path no/where is not a directory"),
        (["unsafe"], {}, "task 'unsafe' runs code that the model wrote, and Halve does not"),
        (["picture"], {}, "task 'picture' needs images or sound"),
        (["empty"], {}, "task 'empty' could not be loaded"),
    ],
)
def test_refused_before_a_model_is_loaded(defined, monkeypatch, names, settings, message):
    monkeypatch.setattr("halve.checkpoint.load.load_model", None)
    write_task(defined, "unsafe", unsafe_code=True)
    write_task(defined, "picture", doc_to_image="question")
    write_task(defined, "empty", [])
    write_group(defined, "all", ["mc"])
    with pytest.raises(InputError, match=message):
        evaluate_tasks("no/model", names, **{"tasks_path": defined, **settings})


@pytest.mark.parametrize("text", ["task: [mc", "include: nowhere.yaml\ntask: mc"])
def test_a_definition_that_cannot_be_read_is_refused(defined, text):
    """lm-eval leaves it out, and would then take its own task of that name."""
    (defined / "template.yaml").write_text("output_type: multiple_choice")
    open_tasks(["mc"], tasks_path=defined)
    (defined / "broken.yaml").write_text(text)
    with pytest.raises(InputError, match=r"task definition .*broken\.yaml cannot be read: .*; mend it"):
        open_tasks(["mc"], tasks_path=defined)


def test_lm_eval_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"^tasks need lm-eval: pip install 'halve\[tasks\]'$"):
        open_tasks(["arc_easy"])


def test_models_that_cannot_be_asked(defined):
    tasks = open_tasks(["mc"], tasks_path=defined)
    with pytest.raises(InputError, match="tasks need a tokenizer, and the model has none"):
        measure_tasks(llama(), None, tasks)
    with pytest.raises(InputError, match="causal language models of transformers, and BertForMaskedLM is none"):
        measure_tasks(bert(), TOKENIZER, tasks)
    with pytest.raises(InputError, match="not a int"):
        measure_tasks(llama(), 3, tasks)
    with pytest.raises(InputError, match="batch_size must be a whole number of at least 1, got 0"):
        measure_tasks(llama(), TOKENIZER, tasks, batch_size=0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise OSError('no [luck]')", r"task 'own' failed: OSError: no \[luck\]"),
        ("return {}", "task 'own', asked for as 'own', gave no result"),
        ("return {'acc': 1.0}\n\ndef mean(values):\n    return 'much'", "acc of task 'own' is no number, but 'much'"),
    ],
)
def test_a_task_that_fails_is_named(defined, body, message):
    (defined / "code.py").write_text(f"def judge(document, results):\n    {body}\n")
    write_task(defined, "own", metric_list=[ACCURACY])
    text = (defined / "own.yaml").read_text().replace("{", "{process_results: !function code.judge, ", 1)
    text = text.replace('"mean"', "!function code.mean") if "mean" in body else text
    (defined / "own.yaml").write_text(text)
    with pytest.raises(HalveError, match=message):
        evaluate_tasks(llama(), ["own"], tokenizer=TOKENIZER, tasks_path=defined)


def test_every_model_is_shown_the_same_solved_examples(tmp_path):
    directory = write_task(tmp_path / "tasks", "shots", num_fewshot=2, fewshot_split="test")
    tasks = open_tasks(["shots"], tasks_path=directory)
    first, second = (measure_tasks(model, TOKENIZER, tasks) for model in (llama(), contrary()))
    assert first.scores[0].sha256 == second.scores[0].sha256
