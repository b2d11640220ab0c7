import json

import pytest

from halve.checkpoint.directory import HOME
from halve.pruning import prune
from halve.run.events import Progress
from halve.run.log import LOG, RunLog
from models import decoder, tokens
from reported import matrix_report


def test_a_line_a_step_with_time_and_memory(tmp_path):
    matrix = matrix_report("a", {"relative_loss": 0.25})
    RunLog(tmp_path)(Progress(0, 2, "collect", 0, 3))
    RunLog(tmp_path)(Progress(1, 2, "solve", 1, 3, matrix))
    first, second = (json.loads(line) for line in (tmp_path / LOG).read_text().splitlines())
    assert (first["phase"], first["block"], first["matrix"]) == ("collect", 0, None)
    assert (second["phase"], second["block"], second["matrix"], second["relative_loss"]) == ("solve", 1, "a", 0.25)
    assert second["peak_memory_gb"] >= first["peak_memory_gb"] > 0.01
    assert second["time"].endswith("Z")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    RunLog(tmp_path / "absent")(Progress(0, 2, "collect", 0, 3))
    assert not (tmp_path / "absent").exists()


def test_a_stopped_run_says_where_it_was_and_a_finished_one_leaves_no_log(tmp_path):
    def stop(step):
        if step.matrix is not None and step.matrix.name.endswith("layers.1.self_attn.o_proj.weight"):
            raise KeyboardInterrupt

    arguments = {"calibration": tokens(4), "method": "wanda"}
    with pytest.raises(KeyboardInterrupt):
        prune(decoder("llama"), tmp_path / "out", listen=stop, **arguments)
    last = json.loads((tmp_path / "out" / HOME / LOG).read_text().splitlines()[-1])
    assert (last["phase"], last["matrix"]) == ("solve", "model.layers.1.self_attn.o_proj.weight")
    prune(decoder("llama"), tmp_path / "out", **arguments)
    assert not list((tmp_path / "out").rglob(LOG))
