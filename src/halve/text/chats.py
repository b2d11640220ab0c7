"""Chats as training text: ``messages``, or ``prompt`` and ``completion``, through the model's own chat template."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halve.errors import InputError, one_line
from halve.option_groups import OptionError
from halve.text.documents import open_records
from halve.text.rows import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
_ASSISTANT = "assistant"

Message = dict[str, str]


def holds_chats(source: str | Path) -> bool:
    """Whether the first record of a ``.jsonl`` or ``.parquet`` source is a chat.

    Raises:
        InputError: the source is not there, or cannot be read.
    """
    first = next(open_records(source), None)
    return first is not None and (MESSAGES in first[1] or {PROMPT, COMPLETION} <= first[1].keys())


def read_chats(source: str | Path) -> Iterator[tuple[str, list[Message]]]:
    """Yield the chats of a source in order, each with where it stands, for messages.

    Raises:
        InputError: a record is no chat.
    """
    path = Path(source)
    plain = next((file for file in sorted(path.rglob("*.txt")) if file.is_file()), None) if path.is_dir() else None
    if plain is not None:
        raise InputError(f"{path} holds chats and also {plain.name}, which is none: name chats and plain text apart")
    for where, record in open_records(source):
        if MESSAGES in record:
            yield where, _checked(record[MESSAGES], where)
        elif {PROMPT, COMPLETION} <= record.keys():
            yield where, [*_side(record[PROMPT], "user", where), *_side(record[COMPLETION], _ASSISTANT, where)]
        else:
            raise InputError(
                f"{where} is no chat, and the first record of the file is one: give each a list of {MESSAGES!r}, or "
                f"{PROMPT!r} and {COMPLETION!r}"
            )


def chat_passage(
    chat: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", where: str, *, assistant_only: bool
) -> Passage:
    """Tokenise a chat through the tokenizer's chat template.

    Args:
        chat: its messages.
        tokenizer: of the model.
        where: the chat stands, for messages.
        assistant_only: learn what the assistant says, up to the end of its turn, and nothing else; not what it says
            before anybody else has spoken.

    Raises:
        InputError: the tokenizer has no chat template, or it refuses the chat; or it writes the beginning of a chat
            otherwise once the chat goes on, so that it cannot be told what the assistant says.
    """
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template, so chats cannot be used: give it one, or plain text")
    ids = _rendered(chat, tokenizer, where)
    learned = torch.zeros(len(ids), dtype=torch.bool)
    if not assistant_only:
        learned[:] = True
    for index, message in enumerate(chat if assistant_only else ()):
        if message["role"] != _ASSISTANT or not index:  # where it begins, what the template puts before is not its own
            continue
        before = _rendered(chat[:index], tokenizer, where, prompt=True)
        through = _rendered(chat[: index + 1], tokenizer, where)
        if ids[: len(through)] != through or through[: len(before)] != before:
            place = where.replace("{", "{{").replace("}", "}}")
            raise OptionError(
                f"the chat template writes the beginning of the chat in {place} otherwise once the chat goes on, so "
                "it cannot be told what the assistant says: give {} all",
                "loss_on",
            )
        learned[len(before) : len(through)] = True
    return Passage(torch.tensor(ids, dtype=torch.int32), learned, whole=True)


def _rendered(
    chat: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", where: str, *, prompt: bool = False
) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a foreign program
        raise InputError(f"the chat template refuses the chat in {where} ({one_line(error)}): mend the chat") from error
    # The template writes special tokens itself.
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _checked(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} has no list of messages in its field {MESSAGES!r}: mend it, or remove it")
    for message in value:
        good = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not good:
            raise InputError(f"{where} has a message without a text for 'role' and 'content': mend it, or remove it")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _side(value: Any, role: str, where: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value, where)
