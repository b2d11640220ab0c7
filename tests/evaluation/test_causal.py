import math

import pytest
import torch
from tokenizers import processors

from halve.errors import InputError
from halve.evaluation.harness import text_opening
from halve.evaluation.tasks import evaluate_tasks
from local_tasks import EXACT, QUESTIONS, llama, stay_offline, write_task
from tiny_tokenizers import byte_bpe, surrounding

WITH_BOS = byte_bpe(adds_bos=True)
LONG = "the quick brown fox " * 40
WHOLE = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None, "metric_list": [WHOLE]}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    stay_offline(tmp_path, monkeypatch)


def seen(tmp_path, tokenizer, rows=None, *, batch_size=1, **changes):
    """Return the results of a task, and every row of tokens that the model was given; padding is left of it."""
    model, rows_seen = llama(), []

    def record(_module, arguments, settings):
        rows_seen.extend(row.tolist() for row in (settings.get("input_ids") if not arguments else arguments[0]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    directory = write_task(tmp_path / "tasks", "task", rows, **changes)
    options = {"tokenizer": tokenizer, "tasks_path": directory, "batch_size": batch_size, "forward_dtype": "float32"}
    return evaluate_tasks(model, ["task"], **options), rows_seen, model


@pytest.mark.parametrize("question", ["{{question}}", "<s>{{question}}"])
def test_every_prompt_begins_with_the_tokenizers_own_bos_once(tmp_path, question):
    results, rows, _ = seen(tmp_path, WITH_BOS, doc_to_text=question)
    bos = WITH_BOS.bos_token_id
    assert results.bos == "<s>"
    assert len(rows) == 40
    assert all((row[0], row.count(bos)) == (bos, 1) for row in rows)


def test_nothing_is_put_before_prompts_where_the_tokenizer_puts_nothing(tmp_path):
    results, rows, _ = seen(tmp_path, byte_bpe())
    assert results.bos == ""
    assert not any(WITH_BOS.bos_token_id in row for row in rows)


def test_prompts_that_are_cut_keep_their_bos(tmp_path):
    rows = [{"question": f"{LONG} {text}", "choices": ["fox", "dog jumps"], "answer": 0} for text in QUESTIONS]
    results, given, _ = seen(tmp_path, WITH_BOS, rows)
    for row in given:
        assert len(row) == results.max_length == 128
        assert (row[0], row.count(WITH_BOS.bos_token_id)) == (WITH_BOS.bos_token_id, 1)
    whole = WITH_BOS(f"{LONG} {QUESTIONS[0]} fox")["input_ids"]
    assert [whole[0], *whole[-128:-1]] in given  # its last token is only predicted
    (note,) = results.notes
    assert note.startswith("Combined length of context")
    assert "exceeds model's maximum length (128)" in note


def test_prompts_to_be_continued_keep_their_bos_when_they_are_cut(tmp_path):
    rows = [{"question": text, "answer": "no"} for text in (LONG, "the quick")]
    generation = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    changes = {"doc_to_target": "{{answer}}", "doc_to_choice": None, "generation_kwargs": generation}
    changes.update(output_type="generate_until", metric_list=[EXACT])
    results, given, _ = seen(tmp_path, WITH_BOS, rows, **changes)
    prompts = [row for row in given if len(row) > 1]
    whole = WITH_BOS(LONG)["input_ids"]
    assert sorted(prompts, key=len) == [WITH_BOS("the quick")["input_ids"], [whole[0], *whole[-124:]]]
    assert any("truncation" in note for note in results.notes)


def test_prompts_of_one_batch_begin_with_one_bos_each(tmp_path):
    """lm-eval looks at the first of a batch alone."""
    texts = ("<s>the quick brown fox jumps", "a sparse matrix keeps")
    rows = [{"question": text, "answer": "no"} for text in texts]
    generation = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    changes = {"doc_to_target": "{{answer}}", "doc_to_choice": None, "generation_kwargs": generation}
    changes.update(output_type="generate_until", metric_list=[EXACT])
    _, given, _ = seen(tmp_path, WITH_BOS, rows, batch_size=2, **changes)
    expected = [WITH_BOS(text.removeprefix("<s>"))["input_ids"] for text in texts]
    assert [row[-len(ids) :] for row, ids in zip(given, expected, strict=False)] == expected


def test_whole_texts_begin_with_one_bos_which_is_not_scored(tmp_path):
    results, given, model = seen(tmp_path, WITH_BOS, doc_to_target="{{question}}", **ROLLING)
    bos = WITH_BOS.bos_token_id
    assert all((row[0], row.count(bos)) == (bos, 1) for row in given)
    total = 0.0
    for question in QUESTIONS:
        ids = torch.tensor([WITH_BOS(question)["input_ids"]])
        with torch.no_grad():
            steps = model(ids).logits[0, :-1].double().log_softmax(-1)
        total += steps.gather(1, ids[0, 1:, None]).sum().item()
    words = sum(len(text.split()) for text in QUESTIONS)
    assert results.scores[0].value == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_every_window_of_a_long_text_begins_with_bos(tmp_path):
    results, given, _ = seen(
        tmp_path, WITH_BOS, [{"question": LONG, "answer": 0}], doc_to_target="{{question}}", **ROLLING
    )
    ids = WITH_BOS(LONG)["input_ids"][1:]
    assert len(given) == math.ceil(len(ids) / 128) > 1
    assert all((len(row), row[0]) == (128, WITH_BOS.bos_token_id) for row in given)
    assert given[1][1:] == ids[128:255]
    assert results.notes == ()


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path):
    """Or the token would stand between question and answer, and the answer's first token would not be scored."""
    with pytest.raises(InputError, match=r"ends every text with </s>, which would stand between .* add_eos_token"):
        seen(tmp_path, surrounding(byte_bpe(), "$A </s>"))


def test_the_opening_may_be_several_tokens():
    tokenizer = byte_bpe()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    template = processors.TemplateProcessing(single="</s> <s> $A", special_tokens=list(ids.items()))
    tokenizer.backend_tokenizer.post_processor = template
    assert text_opening(tokenizer) == [ids["</s>"], ids["<s>"]]
