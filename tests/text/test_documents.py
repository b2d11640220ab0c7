import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

import halve.text.documents
from halve.errors import InputError
from halve.text.documents import open_corpus, pieces, shuffled


def read(source, use="calibration", **options):
    """The texts of a source, in order."""
    return ["".join(pieces(document)) for document in open_corpus(source, use=use, **options).documents()]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_txt_is_one_document_as_it_is(tmp_path, monkeypatch):
    text = "first\r\nsecond\n\n\u00fcber \U0001f600\r"
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(path) == [text]
    monkeypatch.setattr(halve.text.documents, "_PIECE", 3)
    assert "".join(pieces(path)) == text
    assert max(map(len, pieces(path))) == 3


def test_txt_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(halve.text.documents, "_PIECE", 4)
    path = tmp_path / "a.txt"
    path.write_bytes(b"good" * 10_000 + b"\xff")
    assert next(pieces(path)) == "good"  # the bad byte is 40 kB further on
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        list(pieces(path))


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one\\u00e9", "body": "x"}\n\n   \n{"body": "y", "text": "two\\nlines"}', encoding="utf-8"
    )
    assert read(path) == ["one\u00e9", "two\nlines"]
    assert read(str(path), text_field="body") == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "is not JSON"),
        (b'{"text": "cut', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["text"]', "no text in a field 'text'"),
        (b'{"body": "a"}', "no text in a field 'text'"),
        (b'{"text": null}', "no text in a field 'text'"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    documents = open_corpus(path, use="evaluation").documents()
    assert next(documents) == "fine"
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 3, .*{reason}"):
        next(documents)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"document {number}" for number in range(600)]
    parquet.write_table(pa.table({"other": range(600), "body": texts}), path, row_group_size=100)
    assert read(path, text_field="body") == texts
    with pytest.raises(InputError, match="no column 'text': name the one that holds the text, of other, body"):
        read(path)
    with pytest.raises(InputError, match="row 1, has no text in column 'other'"):
        read(path, text_field="other")


def test_bad_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a"] * 300 + [None]}), path)
    with pytest.raises(InputError, match=r"a\.parquet, row 301, has no text"):
        read(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file"):
        read(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'halve\[data\]'"):
        read(path)


def test_directory_is_recursive_and_sorted(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "b" / "deep" / "x.jsonl", [{"text": "2"}, {"text": "3"}])
    parquet.write_table(pa.table({"text": ["4"]}), tmp_path / "b" / "z.parquet")
    for name, text in (("a.txt", "1"), ("c.txt", "5"), ("README.md", "never")):
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == ["1", "2", "3", "4", "5"]
    assert open_corpus(tmp_path, use="evaluation").joined


@pytest.mark.parametrize(("name", "joined"), [("a.txt", False), ("a.jsonl", True)])
def test_only_a_single_txt_is_not_joined(tmp_path, name, joined):
    (tmp_path / name).touch()
    assert open_corpus(tmp_path / name, use="evaluation").joined is joined
    assert open_corpus(tmp_path, use="evaluation").joined


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"'no/such\.txt' does not exist: give a file, a directory, or one of c4, wik"):
        open_corpus("no/such.txt", use="calibration")
    with pytest.raises(InputError, match=r"holds no text: expected \.txt, \.jsonl, \.parquet"):
        open_corpus(tmp_path, use="calibration")
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"a\.csv has an unknown suffix: expected \.txt, \.jsonl, \.parquet"):
        open_corpus(tmp_path / "a.csv", use="calibration")


class FakeHub:
    """Stands in for datasets.load_dataset and HfApi, and records what they are asked."""

    def __init__(self, monkeypatch, rows):
        self.rows = rows
        self.asked = None
        monkeypatch.setattr("datasets.load_dataset", self.load)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.info)

    def info(self, repository, **_options):
        return SimpleNamespace(sha=f"commit of {repository}")

    def load(self, *arguments, **options):
        self.asked = (*arguments, options.pop("split"), options)
        return self.rows


@pytest.mark.parametrize(
    ("name", "use", "expected"),
    [
        ("c4", "calibration", ("allenai/c4", "en", "train")),
        ("c4", "evaluation", ("allenai/c4", "en", "validation")),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
    ],
)
def test_hub(monkeypatch, name, use, expected):
    hub = FakeHub(monkeypatch, [{"text": "a"}, {"text": ""}, {"text": "b"}])
    corpus = open_corpus(name, use=use)
    assert list(corpus.documents()) == ["a", "", "b"]
    assert corpus.revision == f"commit of {expected[0]}"
    assert hub.asked == (*expected, {"streaming": True, "revision": corpus.revision})
    assert not corpus.local
    assert corpus.joined


def test_wikitext_calibrates_on_articles(monkeypatch):
    lines = ["", " = One = \n", "", " text \n", " = = Section = = \n", " x = y = z \n", " = Two = \n", " more \n"]
    hub = FakeHub(monkeypatch, [{"text": line} for line in lines])
    texts = list(open_corpus("wikitext2", use="calibration").documents())
    assert texts == ["", "".join(lines[1:6]), "".join(lines[6:])]
    assert hub.asked[:3] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")


def test_hub_failures(monkeypatch):
    def broken():
        yield {"text": "a"}
        raise ConnectionError("lost")

    FakeHub(monkeypatch, broken())
    documents = open_corpus("c4", use="calibration").documents()
    assert next(documents) == "a"
    with pytest.raises(InputError, match=r"'c4' could not be read from the hub .*ConnectionError: lost"):
        next(documents)

    def unreachable(*_arguments, **_options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(InputError, match=r"OSError: no network; check the network, or give a local file"):
        open_corpus("c4", use="calibration")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets: pip install 'halve\[data\]'"):
        open_corpus("c4", use="calibration")


def test_a_path_is_never_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c4").mkdir()
    Path("c4/a.txt").write_text("mine")
    assert read("./c4") == ["mine"]
    assert read(Path("c4")) == ["mine"]


def test_shuffled_is_a_seeded_permutation():
    texts = [str(number) for number in range(100)]
    orders = [list(shuffled(texts, seed, max_documents=100)) for seed in range(20)]
    assert all(sorted(order) == sorted(texts) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    assert orders[3] == list(shuffled(iter(texts), 3, max_documents=200))
    firsts = sum(order.index("0") for order in orders) / 20
    assert 25 < firsts < 75  # the mean place of a document is 49.5 with a standard error of 6.5


@pytest.mark.parametrize("limits", [{"max_documents": 10}, {"max_documents": 1000, "max_characters": 105}])
def test_shuffled_holds_a_bounded_buffer(limits):
    taken = 0

    def source():
        nonlocal taken
        for number in range(300):
            taken += 1
            yield f"{number:010d}"

    order = []
    for text in shuffled(source(), 0, **limits):
        order.append(text)
        assert taken - len(order) <= 10
    assert sorted(order) == [f"{number:010d}" for number in range(300)]
    assert order != sorted(order)


def test_shuffling_leaves_the_global_generator_alone():
    before = random.getstate()
    list(shuffled("abc", 0, max_documents=2))
    assert random.getstate() == before
