"""``bench/keep_dense.py`` and its picture: which matrices the uniform choices name, and what is drawn of them."""

import json

import matplotlib as mpl
import pytest

import keep_dense
import keep_dense_picture
from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from models import decoder

MATRICES = make_plan(decoder("llama", num_hidden_layers=10), Pattern("2:4")).matrices


def chosen(name):
    return [parameter.removeprefix("model.layers.") for parameter in keep_dense.CHOICES[name](MATRICES)]


def test_uniform_choices_are_what_their_names_say():
    assert chosen("nothing") == []
    assert chosen("all down_proj") == [f"{block}.mlp.down_proj.weight" for block in range(10)]
    assert len(chosen("all v_proj and k_proj")) == 20
    assert {name[0] for name in chosen("first blocks, 20 %")} == {"0", "1"}
    assert {name[0] for name in chosen("last blocks, 40 %")} == {"6", "7", "8", "9"}
    assert len(chosen("last blocks, 10 %")) == 7
    drawn = keep_dense.CHOICES["at random, 20 %"](MATRICES)
    assert 0.19 < keep_dense.weights_of(MATRICES, drawn) / keep_dense.weights_of(MATRICES) <= 0.2
    assert drawn == keep_dense.CHOICES["at random, 20 %"](MATRICES)


ENTRIES = [
    {"name": name, "method": method, "dense": dense, "perplexity": {"c4": value, "wiki": 2 * value}, "seconds": 3}
    for name, method, dense, value in [
        ("dense", "", 1.0, 10.0),
        ("nothing", "sparsegpt", 0.0, 40.0),
        ("measured, 10 %", "sparsegpt", 0.0987, 20.0),
        ("all down_proj", "sparsegpt", 0.25, 30.0),
        ("nothing", "auto", 0.0, 15.0),
    ]
]


def test_the_table_has_every_figure():
    rows = keep_dense.table(ENTRIES).splitlines()
    assert rows[0] == "| what stays dense | method | weights dense | c4 | wiki | seconds |"
    assert "| measured, 10 % | sparsegpt | 9.9% | 20.00 | 40.00 | 3 |" in rows
    assert len(rows) == 7


def test_the_picture_is_the_same_every_time_and_leaves_the_settings_alone(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in ENTRIES))
    before = dict(mpl.rcParams)
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        keep_dense_picture.main([str(tmp_path / "results.jsonl"), "--picture", str(picture)])
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    content = pictures[0].read_text()
    assert "perplexity of c4" in content
    assert "down_proj" in content
    assert content.count("<use ") > 4
    changed = {name for name, value in mpl.rcParams.items() if before[name] != value}
    assert changed <= {"backend", "backend_fallback"}


@pytest.mark.parametrize("method", ["auto", "sparsegpt"])
def test_only_one_method_is_drawn(tmp_path, monkeypatch, method):
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in ENTRIES))
    drawn = []
    monkeypatch.setattr(keep_dense_picture, "draw", lambda entries, text, _path: drawn.extend([*entries, text]))
    keep_dense_picture.main([str(tmp_path / "results.jsonl"), "--picture", "a", "--method", method, "--text", "wiki"])
    assert {entry["method"] for entry in drawn[:-1]} == {"", method}
    assert drawn[-1] == "wiki"
