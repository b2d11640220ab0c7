"""The tokenizer of a model, as a GGUF file has it: byte-level BPE, which is what the families that are written have.

llama.cpp splits a text into words by rules of its own, of which a file names one; which one it is, the steps of the
tokenizer tell, as transformers has loaded it and not as its file says, which some classes do not heed. One that splits
otherwise is refused, since llama.cpp would make other tokens of a text without a word.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halve.errors import InputError, UnsupportedModelError

_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_QWEN2 = _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITTING: tuple[tuple[str, tuple[dict[str, Any], ...]], ...] = (
    ("gpt-2", ({**_BYTES, "use_regex": True},)),
    ("smollm", (_DIGITS, {**_BYTES, "use_regex": True})),
    ("llama-bpe", ({"type": "Split", "pattern": {"Regex": _LLAMA3}}, {**_BYTES, "use_regex": False})),
    ("qwen2", ({"type": "Split", "pattern": {"Regex": _QWEN2}}, {**_BYTES, "use_regex": False})),
)
"""What llama.cpp calls a way to split, and the steps of ``tokenizer.json`` that do the same."""
_IGNORING_MERGES = "llama-bpe"
"""The one with which llama.cpp takes a word that is a token as it is, whatever its merges."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What a file has of a tokenizer.

    Attributes:
        splitting: what llama.cpp calls the way in which it splits a text.
        tokens: all of them, by number.
        types: what each is, as GGUF numbers it.
        merges: pairs of tokens, the first the first to be merged.
        special: numbers of special tokens by what they are for: ``bos``, ``eos``, ``unk``, ``pad``.
        adds_bos: whether a text begins with one.
        template: of chats; None where there is none.
    """

    splitting: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    adds_bos: bool
    template: str | None


def read_vocabulary(name: str, tokenizer: Any, size: int) -> Vocabulary:
    """Read the tokenizer of a model.

    Args:
        name: of the model, for messages.
        tokenizer: as transformers has loaded it.
        size: rows of the model's embedding: numbers that no token has are filled up.

    Raises:
        InputError: it has more tokens than the embedding has rows.
        UnsupportedModelError: llama.cpp would split texts otherwise, or it is no byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model, added = content.get("model") or {}, content.get("added_tokens") or []
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        raise UnsupportedModelError(
            f"the tokenizer of {name} is no byte-level BPE, the kind that is written to a GGUF file: convert the model "
            "with llama.cpp's own script, which reads the pruned checkpoint as it is"
        )
    rule = _splitting(content, name)
    if model.get("dropout") or (model.get("ignore_merges") and rule != _IGNORING_MERGES):
        raise UnsupportedModelError(
            f"the tokenizer of {name} leaves merges out, which llama.cpp would not: convert the model with llama.cpp's "
            "own script"
        )
    names = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(names, _NORMAL)
    for token in added:
        names[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    if (most := max(names)) >= size:
        raise InputError(
            f"the tokenizer of {name} has a token of number {most}, and the model's embedding {size} rows: mend one of "
            "them"
        )
    special = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    numbers = {kind: getattr(tokenizer, name, None) for kind, name in special.items()}
    found = {kind: number for kind, number in numbers.items() if number is not None}
    template = tokenizer.chat_template
    return Vocabulary(
        splitting=rule,
        tokens=tuple(names.get(number, f"[PAD{number}]") for number in range(size)),
        types=tuple(types.get(number, _UNUSED) for number in range(size)),
        merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
        special=found,
        adds_bos="bos" in found and tokenizer("a")["input_ids"][:1] == [found["bos"]],
        template=template if isinstance(template, str) else None,
    )


def _splitting(content: Mapping[str, Any], name: str) -> str:
    """Return what llama.cpp calls the way in which a tokenizer splits a text.

    Raises:
        UnsupportedModelError: it has none like it.
    """
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before]) if before.get("type") == "Sequence" else [before]
    for rule, expected in _SPLITTING:
        if len(steps) == len(expected) and all(map(_does, steps, expected)) and _plain(content.get("normalizer")):
            return rule
    raise UnsupportedModelError(
        f"the tokenizer of {name} splits texts in a way that is not known of llama.cpp ({json.dumps(before)[:200]}): "
        "convert the model with llama.cpp's own script, which reads the pruned checkpoint as it is"
    )


def _does(step: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    if step.get("type") == "Split" and (step.get("behavior") != "Isolated" or step.get("invert")):
        return False
    return all(step.get(name) == value for name, value in expected.items())


def _plain(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether a text is left as it is, or its characters composed, which llama.cpp leaves to whoever calls it."""
    return normalizer is None or normalizer.get("type") == "NFC"


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Put a tokenizer into a file.

    Args:
        writer: a ``gguf.GGUFWriter``.
        vocabulary: of the model.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for kind, number in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
