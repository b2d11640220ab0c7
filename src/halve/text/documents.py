"""Where text comes from: local files, directories of them, and two named corpora on the Hugging Face hub."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from halve.errors import InputError

Document = str | Path
"""One text: the text itself, or the path of a ``.txt`` file, which is read piece by piece when its turn comes."""

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
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise InputError(f"directory {path} holds no text: expected {', '.join(_READERS)} files in it")
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
    documents: Iterable[Document], seed: int, *, max_documents: int, max_characters: int = 2**28
) -> Iterator[Document]:
    """Yield the documents in a random order that depends only on their order and the seed.

    At most ``max_documents`` documents and about ``max_characters`` characters are held. A source within both limits is
    shuffled as a whole; of a longer one, every document yielded is drawn from a buffer of that size.
    """
    rng = random.Random(seed)  # noqa: S311 - a reproducible order, not a secret
    buffer: list[Document] = []
    held = 0
    for document in documents:
        buffer.append(document)
        held += len(document) if isinstance(document, str) else 0
        while len(buffer) > max_documents or held > max_characters:
            chosen = rng.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            drawn = buffer.pop()
            held -= len(drawn) if isinstance(drawn, str) else 0
            yield drawn
    rng.shuffle(buffer)
    yield from buffer


def _read_files(files: list[Path], field: str) -> Iterator[Document]:
    for file in files:
        yield from _READERS[file.suffix.lower()](file, field)


def _read_txt(file: Path, _field: str) -> Iterator[Document]:
    yield file


def _read_jsonl(file: Path, field: str) -> Iterator[Document]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _jsonl_text(line, field, f"{file}, line {number},")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _jsonl_text(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: convert the file first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: expected one object a line, like {{{field!r}: ...}}") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where} has no text in a field {field!r}: name the field that holds it")
    if _SURROGATE.search(text):
        raise InputError(f"{where} holds half of a surrogate pair, which is not text: remove it")
    return text


def _read_parquet(file: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {file} needs pyarrow: pip install 'halve[data]', or give .jsonl") from error
    try:
        with parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise InputError(f"{file} has no column {field!r}: name the one that holds the text, of {names}")
            batches = table.iter_batches(batch_size=256, columns=[field])
            rows = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, text in enumerate(rows, start=1):
                if not isinstance(text, str):
                    raise InputError(f"{file}, row {number}, has no text in column {field!r}: remove the row")
                yield text
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file: {error}") from error


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
