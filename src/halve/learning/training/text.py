"""From the texts that a user names to rows: those that are trained on, in their order, and those that are held out."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from msgspec import ValidationError, convert
from torch import Tensor, nn

from halve.checkpoint.directory import RECORD
from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.load import LoadedModel
from halve.checkpoint.shards import file_of, parse_object, read_json, read_shard, read_tensor
from halve.device import evaluation_mode, model_device
from halve.errors import CorruptFileError, InputError
from halve.learning.options import LOSS_ON, TrainingText, WeightedText
from halve.learning.training.state import TEXT
from halve.text.chats import chat_passage, holds_chats, read_chats
from halve.text.documents import Corpus, Document, is_on_hub, open_corpus
from halve.text.generation import Listen
from halve.text.limits import check_length, check_vocabulary
from halve.text.packing import encode_documents, shuffled_corpus
from halve.text.rows import Passage, Rows, rows_of
from halve.text.special_tokens import begin_sequences
from halve.text.tokens import SELF, calibration_tokens, hash_ids

_MOST_HELD_OUT = 10
"""At most one token in so many of a text is held out."""
_LONGEST_TXT = 2**31
"""Tokens to read of a document that is a file of its own: all of it."""
_TENSORS = ("ids", "positions", "labels")
"""Of rows."""
_SMALL = 0.1
"""Part of what another document changes that is rounding: of bfloat16, at most."""


@dataclass(frozen=True)
class TrainingRows:
    """What a model is trained on, and what judges it.

    Attributes:
        rows: all that there are.
        order: (sequences,) int64, which row each sequence of the training is, in order; a text that is shorter than
            what was asked for is in it several times.
        held_out: other rows.
        notes: sentences on how the text was used.
        sources: of the texts, with the tokens that were taken of each.
        apart: whether each row holds one passage alone, because the model would not keep several apart.
    """

    rows: Rows
    order: Tensor
    held_out: Rows
    notes: tuple[str, ...]
    sources: dict[str, int]
    apart: bool

    @property
    def sha256(self) -> str:
        """One hash of all that decides what the model sees."""
        parts = [getattr(part, name) for part in (self.rows, self.held_out) for name in _TENSORS]
        return hash_ids(torch.cat([*(part.flatten() for part in parts), self.order])[None])


def write_rows(directory: Path, rows: TrainingRows, asked: Mapping[str, Any]) -> None:
    """Keep rows for a training that goes on.

    Args:
        directory: of the training.
        rows: to be kept.
        asked: how they were asked for, as plain JSON values.
    """
    parts = (("rows", rows.rows), ("held_out", rows.held_out))
    tensors = {f"{part}.{name}": getattr(held, name) for part, held in parts for name in _TENSORS}
    facts = {
        "notes": rows.notes,
        "sources": rows.sources,
        "apart": rows.apart,
        "asked": asked,
        "sha256": rows.sha256,
    }
    tensors |= {
        "order": rows.order,
        "facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8),
    }

    with writing(directory):
        write_file(directory / TEXT, file_of(tensors), "text")


def read_rows(directory: Path, asked: Mapping[str, Any]) -> TrainingRows | None:
    """Return the rows that a training has kept; None where there are none that were asked for in the same way.

    Raises:
        CorruptFileError: they were damaged.
    """
    path = directory / TEXT
    if not path.exists():
        return None
    held = {entry.name: read_tensor(entry) for entry in read_shard(path).tensors}
    facts = parse_object(bytes(held["facts"].tolist()), path)
    if facts["asked"] != json.loads(json.dumps(asked)):
        return None
    parts = [Rows(**{name: held[f"{part}.{name}"] for name in _TENSORS}) for part in ("rows", "held_out")]  # type: ignore[arg-type]
    rows = TrainingRows(
        parts[0], held["order"], parts[1], tuple(facts["notes"]), dict(facts["sources"]), bool(facts["apart"])
    )
    if rows.sha256 != facts["sha256"]:
        raise CorruptFileError(f"{path} was changed since it was written: remove it, and the text is read anew")
    return rows


@dataclass(frozen=True)
class Calibrated:
    """What a model was calibrated on, as its record says.

    Attributes:
        source: what the user named.
        seed: of the choice among documents.
        documents: how many were read, from the beginning of each.
        samples: sequences that they filled.
        tokens: in those.
    """

    source: str
    seed: int
    documents: int
    samples: int
    tokens: int

    def documents_of(self, corpus: Corpus) -> set[Document]:
        """Return the documents of a corpus that were read, none if it is another one."""
        same = self.source == corpus.name or (corpus.local and _is_same_place(self.source, corpus.name))
        return set(islice(shuffled_corpus(corpus, self.seed), self.documents)) if same else set()


def _is_same_place(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def calibrated_on(student: LoadedModel) -> Calibrated | None:
    """Return what a pruned checkpoint was calibrated on; None where its record names no text, or there is none."""
    path = None if student.source is None else student.source.path / RECORD
    if path is None or not path.is_file():
        return None
    found = read_json(path).get("calibration")
    try:
        return convert(found, Calibrated)
    except ValidationError:  # calibrated on data in memory, or on none
        return None


def training_rows(
    text: TrainingText,
    student: LoadedModel,
    teacher: LoadedModel | None,
    sequences: int,
    listen: Listen | None = None,
) -> TrainingRows:
    """Read the texts.

    Args:
        text: what was asked for.
        student: the model that is trained, on its device.
        teacher: the model that writes ``self``, on its device.
        sequences: how many the training takes.
        listen: told how long writing takes, as by `halve.text.generation.sample_text`.

    Raises:
        InputError: a text, the tokenizer or a length is not usable, or there is too little text.
        CalibrationError: the teacher's logits are not finite.
    """
    check_length(text.seq_len, student.model)
    tokenizer = student.tokenizer
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so it cannot be trained on text: put its tokenizer beside it")
    known = student.model.get_input_embeddings()
    vocabulary = known.num_embeddings if isinstance(known, nn.Embedding) else len(tokenizer)
    models = [student.model, *([] if teacher is None else [teacher.model])]
    apart = not all(keeps_documents_apart(model, min(len(tokenizer), vocabulary)) for model in models)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    total = sum(each.weight for each in text.texts)
    parts: list[tuple[Rows, Rows, int]] = []
    sources: dict[str, int] = {}
    notes: list[str] = []
    for each in text.texts:
        share = each.weight / total
        wanted, spared = round(sequences * share), round(text.spared * share)
        passages = list(_passages(each, text, student, teacher, wanted * text.seq_len, spared, listen))
        held, trained = spare(passages, spared)
        if any(passage.seen for passage in held):
            notes.append(
                f"the model was calibrated on all of {each.source}, so the held-out text is known to it, and flatters "
                "it: give more text"
            )
        found = rows_of(trained, text.seq_len, padding or 0, apart=apart)
        judged = rows_of(held, text.seq_len, padding or 0, apart=apart)
        if not len(found) or not len(judged):
            raise InputError(
                f"the training text {each.source!r} is too short: it fills {len(found)} sequences of seq_len = "
                f"{text.seq_len} and {len(judged)} to hold out: give more text"
            )
        if found.cut + judged.cut:
            notes.append(f"{found.cut + judged.cut} chats of {each.source} are longer than seq_len and were cut")
        if len(found) < wanted:
            notes.append(
                f"{each.source} fills {len(found)} of the {wanted} sequences that are wanted, and is read "
                f"{wanted / len(found):.1f} times"
            )
        parts.append((found, judged, wanted))
        sources[each.source] = sum(map(len, trained))
    if apart:
        notes.append("the model does not keep packed documents apart, so every sequence holds one document, padded")
    rows, held_out = Rows.joined([part[0] for part in parts]), Rows.joined([part[1] for part in parts])
    for ids in (rows.ids, held_out.ids):
        check_vocabulary(ids, student.model, ", ".join(map(str, text.data)))
    order = _order([(len(found), wanted) for found, _, wanted in parts], sequences, text.seed)
    return TrainingRows(rows, order, held_out, tuple(notes), sources, apart)


def _passages(
    each: WeightedText,
    text: TrainingText,
    student: LoadedModel,
    teacher: LoadedModel | None,
    tokens: int,
    spared: int,
    listen: Listen | None,
) -> Iterator[Passage]:
    """Yield passages until there are ``tokens``, and ``spared`` that the model was not calibrated on, or no more."""
    tokenizer: Any = student.tokenizer
    known = calibrated_on(student)
    if each.source == SELF:
        if teacher is None:
            raise InputError("data = 'self' is the teacher's own text, and there is no teacher: give another text")
        seen = known.samples if known is not None and known.source == SELF and known.seed == text.seed else 0
        written = calibration_tokens(
            SELF,
            tokenizer,
            samples=-(-(tokens + spared) // text.seq_len),
            seq_len=text.seq_len,
            seed=text.seed,
            bos=text.bos,
            model=teacher.model,
            listen=listen,
        )
        found: Iterator[Passage] = (
            Passage(row.int(), lead=written.lead, seen=index < seen) for index, row in enumerate(written.ids)
        )
    elif not is_on_hub(each.source) and holds_chats(each.source):
        chats = shuffled_chats(each.source, text.seed)
        only = text.loss_on == LOSS_ON[0]
        found = (chat_passage(chat, tokenizer, where, assistant_only=only) for where, chat in chats)
    else:
        found = _documents(each.source, text, tokenizer, known)
    read = unseen = 0
    for passage in found:
        if len(passage) > passage.lead + 1:
            yield passage
            read += len(passage)
            unseen += 0 if passage.seen else len(passage)
        if read >= tokens + spared and unseen >= spared:
            return


def shuffled_chats(source: str, seed: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the chats of a source in a random order that depends on their order and the seed alone."""
    chats = list(read_chats(source))
    order = torch.randperm(len(chats), generator=torch.Generator().manual_seed(seed))
    return (chats[index] for index in order.tolist())


def _documents(source: str, text: TrainingText, tokenizer: Any, known: Calibrated | None) -> Iterator[Passage]:
    """Yield every document with what the tokenizer puts before text, and with EOS after it."""
    corpus = open_corpus(source, use="calibration", text_field=text.text_field)
    lead = begin_sequences(tokenizer, text.bos).of_each
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    calibrated = set() if known is None else known.documents_of(corpus)
    seen: deque[bool] = deque()

    def noted() -> Iterator[Document]:
        for document in shuffled_corpus(corpus, text.seed):
            seen.append(document in calibrated)
            yield document

    for ids in encode_documents(noted(), tokenizer, _LONGEST_TXT):
        was_seen = seen.popleft() and known is not None and len(ids) <= known.tokens  # else the beginning alone
        if ids:
            own = ids[len(lead) :] if tuple(ids[: len(lead)]) == lead else ids
            yield Passage(torch.tensor([*lead, *own, *end], dtype=torch.int32), lead=len(lead), seen=was_seen)


def spare(passages: Sequence[Passage], spared: int) -> tuple[list[Passage], list[Passage]]:
    """Hold out the first passages that the model was not calibrated on, and train on the others.

    A model that was pruned to fit a text says little of other text by how it does on that one. Where it was calibrated
    on all passages, the last ones are held out: of a long text it may have seen the beginning alone. A document that is
    longer than two times what is wanted, such as a ``.txt``, is cut in two.

    Args:
        passages: in the order in which they are trained on.
        spared: tokens to hold out; a tenth of the text if that is less, and at least one passage or part.

    Returns:
        tuple[list[Passage], list[Passage]]: those held out, and the others.
    """
    most = min(spared, sum(map(len, passages)) // _MOST_HELD_OUT)
    unseen = [index for index, passage in enumerate(passages) if not passage.seen]
    chosen: set[int] = set()
    held = 0
    for index in unseen or reversed(range(len(passages))):
        passage = passages[index]
        if not chosen and most and len(passage) > 2 * most and not passage.whole:
            first, last = _cut(passage, len(passage) - most)
            return [last], [*passages[:index], first, *passages[index + 1 :]]
        chosen.add(index)
        held += len(passage)
        if held >= most:
            break
    return (
        [passage for index, passage in enumerate(passages) if index in chosen],
        [passage for index, passage in enumerate(passages) if index not in chosen],
    )


def _cut(passage: Passage, place: int) -> tuple[Passage, Passage]:
    """Cut a passage in two; the second part has no lead."""
    learned = (None, None) if passage.learned is None else (passage.learned[:place], passage.learned[place:])
    return (
        Passage(passage.ids[:place], learned[0], passage.lead, seen=passage.seen),
        Passage(passage.ids[place:], learned[1], seen=passage.seen),
    )


def _order(parts: Sequence[tuple[int, int]], sequences: int, seed: int) -> Tensor:
    """Return which row every sequence is: each text evenly spread over the training, anew shuffled at each reading.

    Args:
        parts: for each text its rows, and the sequences that it is to give.
        sequences: in all.
        seed: of the shuffling.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    places: list[Tensor] = []
    first = 0
    for count, wanted in parts:
        readings = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
        chosen = torch.cat(readings)[:wanted] if readings else torch.zeros(0, dtype=torch.int64)
        rows.append(chosen + first)
        places.append((torch.arange(wanted) + torch.rand(wanted, generator=generator)) / max(1, wanted))
        first += count
    order = torch.cat(rows)[torch.cat(places).argsort()]
    missing = sequences - len(order)  # shares were rounded
    return torch.cat((order, order[:missing])) if missing > 0 else order[:sequences]


def keeps_documents_apart(model: nn.Module, vocabulary: int) -> bool:
    """Whether a model lets packed documents attend to nothing of each other, given positions that begin anew.

    Two short made-up documents are run together, with positions that begin anew and with positions that go on, and the
    second one is run alone. A model that heeds positions says of the second document what it says of it alone, up to
    rounding: a small part of what it changes by where positions go on.
    """
    if "position_ids" not in signature(model.forward).parameters:
        return False
    device = model_device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(vocabulary, 1000), (1, 24), generator=generator).to(device)
    anew, on = torch.cat((torch.arange(11), torch.arange(13)))[None].to(device), torch.arange(24)[None].to(device)

    def said(first: int, positions: Tensor) -> Tensor:
        """Return the logits of the second document, (13, vocabulary) float64."""
        output = model(input_ids=ids[:, first:], position_ids=positions[:, first:], use_cache=False)
        return cast("Tensor", output.logits[0, -13:]).double()

    with evaluation_mode(model):
        alone, packed, joined = said(11, anew), said(0, anew), said(0, on)
    return bool((packed - alone).norm() <= _SMALL * (joined - alone).norm())
