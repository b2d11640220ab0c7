import json
from dataclasses import replace

import pytest
import torch
from msgspec import to_builtins

from halve.errors import CorruptFileError, HalveError
from halve.evaluation.figure import Perplexity
from halve.report.measured import add_perplexity, measured_json, read_measured, write_measured
from halve.run.events import RunReport, WorkerReport
from reported import matrix_report

SCORE = Perplexity(12.5, 3, 64, "float32", "a/text.txt", "00ff", 1.0, 2.5, "")


def on_disk(directory):
    return json.loads((directory / "halve-measured.json").read_text())


def report():
    facts = [{"seconds": 0.25, "relative_loss": 0.1}, {"relative_loss": 0.2}]
    matrices = [matrix_report(name, fact) for name, fact in zip("ab", facts, strict=True)]
    return RunReport(
        matrices=tuple(matrices),
        excluded=(),
        blocks=2,
        seconds={"solve": 1.5},
        resumed_blocks=1,
        peak_memory={"solve": 1000},
        workers=(WorkerReport(0, "node", (0, 1), {"collect": 2.5}, 0.5),),
    )


def test_what_is_written_is_read(tmp_path):
    content = measured_json(report())
    write_measured(tmp_path, content)
    assert on_disk(tmp_path) == content
    found = read_measured(tmp_path)
    assert to_builtins(found) == content | {
        "perplexity": (),
        "top_one": (),
        "workers": ({**content["workers"][0], "shards": (0, 1)},),
    }
    assert (found.seconds, found.matrix_seconds) == ({"solve": 1.5}, {"a": 0.25})
    assert content["seconds"] == {"solve": 1.5}
    assert content["peak_memory"] == {"solve": 1000}
    assert content["matrix_seconds"] == {"a": 0.25}
    assert content["resumed_blocks"] == 1


def test_a_checkpoint_without_the_file_has_measured_nothing(tmp_path):
    found = read_measured(tmp_path)
    assert (found.format, found.seconds, found.perplexity) == (1, {}, ())


def test_perplexities_of_the_same_windows_are_replaced_and_others_kept(tmp_path):
    write_measured(tmp_path, measured_json(report()))
    add_perplexity(tmp_path, (SCORE,), (replace(SCORE, value=20.0),))
    shorter = replace(SCORE, tokens_sha256="aa", windows=1, value=30.0)
    add_perplexity(tmp_path, (), (shorter,))
    add_perplexity(tmp_path, (SCORE,), (replace(SCORE, value=21.0),))
    found = on_disk(tmp_path)
    read_measured(tmp_path)
    assert [(entry["before"], entry["after"]) for entry in found["perplexity"]] == [(None, 30.0), (12.5, 21.0)]
    add_perplexity(tmp_path, (), (replace(SCORE, value=22.0),))
    last = on_disk(tmp_path)["perplexity"][-1]
    assert (last["before"], last["before_nll"], last["dtype_before"], last["after"]) == (12.5, 2.5, "float32", 22.0)
    assert found["seconds"] == {"solve": 1.5}
    assert {"source", "seq_len", "windows", "dtype", "tokens_sha256"} <= found["perplexity"][0].keys()


def test_a_perplexity_beyond_what_is_read_is_written_as_one_that_overflows(tmp_path):
    add_perplexity(tmp_path, (SCORE,), (replace(SCORE, value=1e300, nll=690.8),))
    (found,) = read_measured(tmp_path).perplexity
    assert (found.after, found.after_nll) == (None, 690.8)


def test_what_a_figure_needs_is_on_record(tmp_path):
    before = replace(SCORE, bos="each", window_nll=(2.0, 2.5, 3.0 + 1e-9), versions={"halve": "1", "torch": "2"})
    after = replace(before, window_nll=(2.25, 3.0, 3.25), versions={"halve": "1", "torch": "3"})
    add_perplexity(tmp_path, (before,), (after,))
    (entry,) = on_disk(tmp_path)["perplexity"]
    assert (entry["bos"], entry["before_windows"], entry["after_windows"]) == ("each", [2, 2.5, 3], [2.25, 3, 3.25])
    assert (entry["versions_before"], entry["versions"]) == (dict(before.versions), dict(after.versions))
    assert "window_nll" not in entry
    (found,) = read_measured(tmp_path).perplexity
    differences = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    expected = differences.mean().item(), differences.std().item() / 3**0.5
    assert found.log_difference == pytest.approx(expected)
    add_perplexity(tmp_path, (), (after,))
    assert read_measured(tmp_path).perplexity == (found,)  # what is known of the dense model stays
    add_perplexity(tmp_path, (), (replace(after, window_nll=(1.0,)),))
    assert read_measured(tmp_path).perplexity[0].log_difference is None


def test_a_record_of_before_has_no_difference(tmp_path):
    old = {"source": "x", "tokens_sha256": "0", "seq_len": 16, "windows": 2, "before": 3.0, "after": 4.0}
    write_measured(tmp_path, measured_json(report()) | {"perplexity": [old]})
    (found,) = read_measured(tmp_path).perplexity
    assert (found.bos, found.versions, found.log_difference) == ("", {}, None)


def test_a_perplexity_that_is_not_finite_is_null(tmp_path):
    add_perplexity(tmp_path, (), (replace(SCORE, value=float("inf")),))
    (entry,) = on_disk(tmp_path)["perplexity"]
    assert (entry["after"], entry["after_nll"]) == (None, 2.5)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"seconds": {"solve": "fast"}},
        {"seconds": [1.0]},
        {"peak_memory": {"solve": None}},
        {"matrix_seconds": {"a": float("nan")}},
        {"seconds": {"a": 10**400}},
        {"resumed_blocks": "many"},
        {"perplexity": None},
        {"perplexity": [{"source": "x"}]},
        {"perplexity": [{"source": "x", "tokens_sha256": "0", "seq_len": 1, "windows": 1, "after_windows": [1e30]}]},
        {"perplexity": [{"source": "x", "tokens_sha256": "0", "seq_len": 1, "windows": 1, "after": "low"}]},
    ],
)
def test_a_damaged_file_is_told(tmp_path, damage):
    (tmp_path / "halve-measured.json").write_text(json.dumps(measured_json(report()) | damage))
    with pytest.raises(CorruptFileError, match=r"halve-measured\.json is not as Halve writes it"):
        read_measured(tmp_path)


def test_a_volume_that_fails_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HalveError, match="check the volume"):
        write_measured(tmp_path / "file" / "beneath", {})
