"""``bench/zero_shot.py``: its questions are sound, and lm-eval asks them."""

import zero_shot
from local_tasks import TOKENIZER, llama, stay_offline
from taught import words


def test_every_question_has_one_right_answer_among_four_different_ones():
    for asked in (list(zero_shot.capitals()), list(zero_shot.countries())):
        assert len(asked) == len(zero_shot.CAPITALS) == 40
        for each in asked:
            assert len(set(each["choices"])) == 4
            answer = each["choices"][each["answer"]]
            assert zero_shot.CAPITALS.get(each["asked"]) == answer or zero_shot.CAPITALS.get(answer) == each["asked"]
        assert {each["answer"] for each in asked} == {0, 1, 2, 3}


def test_continuations_go_on_where_the_beginning_ends():
    text = " ".join(f"w{number}" for number in range(1000))
    found = list(zero_shot.continuations(text, 20, 10))
    assert len(found) == 20
    for each in found:
        last = int(each["asked"].split()[-1][1:])
        assert each["choices"][each["answer"]].split()[0] == f"w{last + 1}"
        assert all(len(choice.split()) == 12 for choice in each["choices"])
        assert len(set(each["choices"])) == 4


def test_they_are_asked(tmp_path, monkeypatch, capfd):
    stay_offline(tmp_path, monkeypatch)
    model = tmp_path / "model"
    llama(max_position_embeddings=512).save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text(words(400, seed=1), encoding="utf-8")
    assert zero_shot.main([str(text), str(model), "--questions", "6", "--words", "8"]) == 0
    said = capfd.readouterr().out
    for task in ("capitals", "countries", "continuation"):
        assert task in said
