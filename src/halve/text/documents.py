"""Where text comes from: local files, directories of them, and two named corpora on the Hugging Face hub."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from halve.errors import InputError

Document = str | Path
"""One text: the text itself, or the path of a ``.txt`` file, which is read piece by piece when its turn comes."""


class Pair(NamedTuple):
    """Two texts that belong together, of two fields of one line or row.

    Attributes:
        first: what is read, or the path of what is heard.
        second: what is to be said of it.
        where: both stand, for messages.
        folder: of the file, that a path in it is relative to.
    """

    first: str
    second: str
    where: str
    folder: Path


Entry = TypeVar("Entry", Document, Pair)

_PIECE = 2**20  # characters of a .txt read at once
_ARTICLE = re.compile(r" = [^=].* = \n?")  # a WikiText line that starts an article
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _HubText(NamedTuple):
    repository: str
    config: str
    splits: dict[str, str]


_HUB = {
    "c4": _HubText("allenai/c4", "en", {"calibration": "train", "evaluation": "validation"}),
    "wikitext2": _HubText("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "evaluation": "test"}),
}


@dataclass(frozen=True)
class Corpus:
    """A checked source of documents, nothing of it read yet.

    Attributes:
        name: what the user named.
        documents: starts reading from the beginning; raises InputError at a document that cannot be used.
        joined: whether the documents are parts of a whole, and so are joined by blank lines for evaluation.
        local: whether it lies on this machine.
        revision: the hub's commit, empty for local text.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    joined: bool
    local: bool
    revision: str = ""


def is_on_hub(source: str) -> bool:
    """Whether a source is the name of a corpus on the Hugging Face hub."""
    return source in _HUB


def open_corpus(source: str | Path, *, use: Literal["calibration", "evaluation"], text_field: str = "text") -> Corpus:
    """Find the text a user named.

    Args:
        source: a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file (one document a line or row); a directory
            of those, searched recursively and read in the order of their paths; or ``"c4"`` or ``"wikitext2"``, which
            are streamed from the Hugging Face hub. The two names win over files so called: write ``./c4`` for those.
        use: the split to take of a corpus on the hub: train for calibration; validation (C4) or test (WikiText-2)
            for evaluation.
        text_field: the key or column that holds the text, for ``.jsonl`` and ``.parquet``.

    Raises:
        InputError: there is no such file or name, the suffix is unknown, the directory has no text, a package to read
            it is missing, or the hub does not answer.
    """
    if isinstance(source, str) and is_on_hub(source):
        return _hub_corpus(source, use)
    path = Path(source)
    if path.is_dir():
        files = sorted(_texts(path))
        if not files:
            seen = ", or pictures for a model that sees" if use == "calibration" else ""
            raise InputError(f"directory {path} holds no text: expected {', '.join(_READERS)} files in it{seen}")
    elif path.is_file():
        if path.suffix.lower() not in _READERS:
            raise InputError(f"{path} has an unknown suffix: expected {', '.join(_READERS)}, or a directory of those")
        files = [path]
    else:
        raise InputError(
            f"text source {str(source)!r} does not exist: give a file, a directory, or one of {', '.join(_HUB)}"
        )
    joined = len(files) > 1 or path.suffix.lower() != ".txt"
    return Corpus(str(source), partial(_read_files, files, text_field), joined=joined, local=True)


def has_text(source: str | Path) -> bool:
    """Whether a source is a directory with text in it, or in one below."""
    path = Path(source)
    return path.is_dir() and next(_texts(path), None) is not None


def _texts(directory: Path) -> Iterator[Path]:
    return (file for file in directory.rglob("*") if file.suffix.lower() in _READERS and file.is_file())


def read_pairs(source: str | Path, fields: tuple[str, str]) -> Iterator[Pair]:
    """Yield the pairs of a ``.jsonl`` or ``.parquet`` file, or of a directory of those, in order.

    Args:
        source: the file or directory.
        fields: names of the key or column of the first and of the second text.

    Raises:
        InputError: there is no such file, it is of another kind, or a field is missing or empty: file, line and field
            are named.
    """
    for file in _pair_files(source):
        if file.suffix.lower() == ".parquet":
            rows = _parquet_rows(file, fields)
        else:
            records = _jsonl_records(file, fields[0])
            rows = ((where, tuple(_field(record, field, where) for field in fields)) for where, record in records)
        for where, texts in rows:
            for field, text in zip(fields, texts, strict=True):
                if not text.strip():
                    raise InputError(f"{where} has an empty field {field!r}: remove it from the file, or fill it in")
            yield Pair(texts[0], texts[1], where, file.parent)


def _pair_files(source: str | Path) -> list[Path]:
    path = Path(source)
    if not path.exists():
        raise InputError(f"text source {str(source)!r} does not exist: give a file of pairs, .jsonl or .parquet")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [file for file in files if file.suffix.lower() in _PAIR_SUFFIXES and file.is_file()]
    if not found:
        raise InputError(f"{path} holds no pairs: pair_fields needs {' or '.join(_PAIR_SUFFIXES)}, or a directory")
    return found


def open_records(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a ``.jsonl`` file, the rows of a ``.parquet``, or those of a directory of them, in order.

    Args:
        source: the file or directory; text without records, such as a ``.txt``, has none.

    Yields:
        tuple[str, dict[str, Any]]: where it stands, and the object.

    Raises:
        InputError: a file cannot be read, or a line is no object.
    """
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in _PAIR_SUFFIXES or not file.is_file():
            continue
        for where, record in _parquet_records(file) if suffix == ".parquet" else _jsonl_records(file, "text"):
            if not isinstance(record, dict):
                raise InputError(f"{where} is no object: expected one a line, like {{'text': ...}}")
            yield where, record


def pieces(document: Document) -> Iterator[str]:
    """Yield the text of a document, in pieces if it is a file; line ends stay as they are.

    Raises:
        InputError: the file is not UTF-8 or cannot be read.
    """
    if isinstance(document, str):
        yield document
        return
    try:
        with document.open(encoding="utf-8-sig", newline="") as file:
            while piece := file.read(_PIECE):
                yield piece
    except UnicodeDecodeError as error:
        raise InputError(f"{document} is not UTF-8 text: convert it first") from error
    except OSError as error:
        raise InputError(f"{document} cannot be read: {error}") from error


def shuffled(
    documents: Iterable[Entry], seed: int, *, max_documents: int, max_characters: int = 2**28
) -> Iterator[Entry]:
    """Yield documents, or pairs of texts, in a random order that depends only on their order and the seed.

    At most ``max_documents`` documents and about ``max_characters`` characters are held. A source within both limits is
    shuffled as a whole; of a longer one, every document yielded is drawn from a buffer of that size.
    """
    rng = random.Random(seed)  # noqa: S311 - a reproducible order, not a secret
    buffer: list[Entry] = []
    held = 0
    for document in documents:
        buffer.append(document)
        held += _characters(document)
        while len(buffer) > max_documents or held > max_characters:
            chosen = rng.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            drawn = buffer.pop()
            held -= _characters(drawn)
            yield drawn
    rng.shuffle(buffer)
    yield from buffer


def _characters(entry: "Document | Pair") -> int:
    """Return how many characters of text are held with an entry."""
    if isinstance(entry, Pair):
        return len(entry.first) + len(entry.second)
    return len(entry) if isinstance(entry, str) else 0


def _read_files(files: list[Path], field: str) -> Iterator[Document]:
    for file in files:
        yield from _READERS[file.suffix.lower()](file, field)


def _read_txt(file: Path, _field: str) -> Iterator[Document]:
    yield file


def _read_jsonl(file: Path, field: str) -> Iterator[Document]:
    for where, record in _jsonl_records(file, field):
        yield _field(record, field, where)


def _jsonl_records(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield what every line of a file holds, and where that is; ``field`` is one that a line should have."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number},"
                    yield where, _jsonl_record(line, field, where)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _jsonl_record(line: bytes, field: str, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: convert the file first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: expected one object a line, like {{{field!r}: ...}}") from error


def _field(record: Any, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where} has no text in a field {field!r}: name the field that holds it")
    if _SURROGATE.search(text):
        raise InputError(f"{where} holds half of a surrogate pair, which is not text: remove it")
    return text


def _read_parquet(file: Path, field: str) -> Iterator[Document]:
    for _, (text,) in _parquet_rows(file, [field]):
        yield text


def _parquet_rows(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the texts of some columns of every row, and where that is."""
    for where, record in _parquet_records(file, fields):
        texts = tuple(record[field] for field in fields)
        for field, text in zip(fields, texts, strict=True):
            if not isinstance(text, str):
                raise InputError(f"{where} has no text in column {field!r}: remove the row")
        yield where, texts


def _parquet_records(file: Path, fields: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield some columns of every row, all where none are named, and where that is."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {file} needs pyarrow: pip install 'halve[data]', or give .jsonl") from error
    try:
        with parquet.ParquetFile(file) as table:
            if absent := next((field for field in fields if field not in table.schema_arrow.names), None):
                names = ", ".join(table.schema_arrow.names)
                raise InputError(f"{file} has no column {absent!r}: name the one that holds the text, of {names}")
            batches = table.iter_batches(batch_size=256, columns=list(fields) or None)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(rows, start=1):
                yield f"{file}, row {number},", record
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file: {error}") from error


_PAIR_SUFFIXES = (".jsonl", ".parquet")
_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _hub_corpus(name: str, use: Literal["calibration", "evaluation"]) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"source {name!r} needs datasets: pip install 'halve[data]', or give a local file") from error
    from huggingface_hub import HfApi

    hub = _HUB[name]
    try:
        # Asking for the commit pins what is read, and finds out at once that there is no network: datasets retries.
        revision = str(HfApi().dataset_info(hub.repository, timeout=30).sha)
        rows = datasets.load_dataset(
            hub.repository, hub.config, split=hub.splits[use], streaming=True, revision=revision
        )
    except Exception as error:  # the hub's client raises some twenty unrelated classes
        raise _unreachable(name, hub, error) from error

    def texts() -> Iterator[Document]:
        try:
            for row in rows:
                yield row["text"]
        except Exception as error:
            raise _unreachable(name, hub, error) from error

    whole_articles = name == "wikitext2" and use == "calibration"
    documents = (lambda: _articles(texts())) if whole_articles else texts
    return Corpus(name, documents, joined=True, local=False, revision=revision)


def _unreachable(name: str, hub: _HubText, error: Exception) -> InputError:
    return InputError(
        f"source {name!r} could not be read from the hub ({hub.repository}): {type(error).__name__}: {error}; "
        "check the network, or give a local file"
    )


def _articles(lines: Iterable[Document]) -> Iterator[Document]:
    """Put together the articles of WikiText, whose rows are single lines."""
    article: list[str] = []
    for line in map(str, lines):
        if _ARTICLE.fullmatch(line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)
