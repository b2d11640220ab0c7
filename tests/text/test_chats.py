"""Chats through a template like SmolLM2's: what the assistant says, and its end, is learned."""

import json

import pytest

from halve.errors import InputError
from halve.text.chats import chat_passage, holds_chats, read_chats
from tiny_tokenizers import CHAT, byte_bpe, chatting


@pytest.fixture(scope="module")
def tokenizer():
    return chatting()


def written(path, *records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def test_the_assistant_is_learned_to_the_end_of_its_turn(tokenizer):
    passage = chat_passage(CHAT, tokenizer, "here", assistant_only=True)
    assert tokenizer.decode(passage.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(passage.ids[passage.learned]) == "jumps over<|im_end|>\nthe lazy dog<|im_end|>\n"
    assert passage.whole


def test_all_is_learned_where_that_is_asked_for(tokenizer):
    passage = chat_passage(CHAT, tokenizer, "here", assistant_only=False)
    assert bool(passage.learned.all())
    assert (passage.labels[1:] == passage.ids[1:]).all()


def test_a_chat_that_the_assistant_begins(tokenizer):
    chat = [{"role": "system", "content": "talk"}, {"role": "assistant", "content": "the fox"}]
    passage = chat_passage(chat, tokenizer, "here", assistant_only=True)
    assert tokenizer.decode(passage.ids[passage.learned]) == "the fox<|im_end|>\n"


def test_both_kinds_of_records_are_read(tmp_path):
    path = written(
        tmp_path / "chats.jsonl",
        {"messages": CHAT[:2]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "system", "content": "s"}], "completion": [{"role": "assistant", "content": "c"}]},
    )
    assert holds_chats(path)
    chats = [chat for _, chat in read_chats(path)]
    assert chats[0] == CHAT[:2]
    assert [(message["role"], message["content"]) for message in chats[1]] == [("user", "a"), ("assistant", "b")]
    assert [message["role"] for message in chats[2]] == ["system", "assistant"]


def test_plain_text_is_no_chat(tmp_path):
    assert not holds_chats(written(tmp_path / "a.jsonl", {"text": "a"}))
    assert not holds_chats(written(tmp_path / "b.jsonl"))
    (tmp_path / "c.txt").write_text("messages")
    assert not holds_chats(tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "is no chat, and the first record of the file is one"),
        ({"messages": []}, "has no list of messages"),
        ({"messages": "hello"}, "has no list of messages"),
        ({"messages": [{"role": "user"}]}, "has a message without a text"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": 3}]}, "has a message without a text"),
    ],
)
def test_a_record_that_is_no_chat_is_named(tmp_path, record, message):
    path = written(tmp_path / "chats.jsonl", {"messages": CHAT}, record)
    with pytest.raises(InputError, match=message) as error:
        list(read_chats(path))
    assert "chats.jsonl" in str(error.value)
    assert "2" in str(error.value)


def test_templates_that_cannot_be_used_are_refused(tokenizer):
    with pytest.raises(InputError, match="has no chat template"):
        chat_passage(CHAT, byte_bpe(), "here", assistant_only=True)
    refusing = byte_bpe(chat_template="{{ raise_exception('no user') }}")
    with pytest.raises(InputError, match=r"refuses the chat in line 3 .*no user"):
        chat_passage(CHAT, refusing, "line 3", assistant_only=True)
    forgetful = byte_bpe(chat_template="{{ messages[-1]['content'] }}")
    with pytest.raises(InputError, match="otherwise once the chat goes on"):
        chat_passage(CHAT, forgetful, "here", assistant_only=True)
    assert len(chat_passage(CHAT, forgetful, "here", assistant_only=False))
