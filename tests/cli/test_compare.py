import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from halve.cli.app import app
from halve.cli.compare import comparison_table
from halve.cli.errors import EXIT_REFUSED
from halve.comparison import Row
from halve.evaluation.figure import Perplexity
from halve.evaluation.top_one import wilson
from seen import draw, processor, taught_vit

run = CliRunner().invoke


def test_the_table_marks_failures_and_fallbacks():
    of = {"source": "/a/text.txt", "windows": 2, "seq_len": 16, "dtype": "float32", "bos": "each", "seconds": 1.0}
    of |= {"tokens_sha256": "0", "nll": 2.5, "versions": {"halve": "1.2", "torch": "3.4"}}
    score = Perplexity(value=12.345, window_nll=(2.0, 3.0), **of)
    pruned = Perplexity(value=23.456, window_nll=(2.5, 3.75), **of)
    dense = Row(name="dense", perplexities=(score,))
    fell = Row(name="wanda", fallbacks=3, mean_relative_loss=0.01234, perplexities=(pruned,))
    failed = Row(name="sparsegpt", error="no")
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(comparison_table([dense, fell, failed], "2:4"))
    printed = console.file.getvalue()
    for part in ("perplexity text.txt", " 12.35 ", "wanda (3 fallbacks)", "0.0123", "failed", "2 windows of 16 tokens"):
        assert part in printed
    assert "23.46 (+0.6250 ± 0.1250)" in printed
    assert "16 tokens, BOS in each, float32; halve 1.2, torch 3.4;" in " ".join(printed.split())


@pytest.fixture
def pictures(tmp_path):
    """A classifier that knows its colours, and a folder of them."""
    taught_vit().save_pretrained(tmp_path / "vit")
    processor().save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit"), str(draw(tmp_path / "pictures"))


def test_image_classifiers_are_compared_by_their_accuracy(pictures):
    model, folder = pictures
    asked = [model, "--calibration", folder, "--samples", "4", "--methods", "magnitude,wanda", "--eval-images", folder]
    asked += ["--forward-dtype", "float32"]
    result = run(app, ["compare", *asked, "--json"])
    assert result.exit_code == 0, result.output
    assert f"{folder} is both calibrated on and evaluated on: accuracies on it flatter" in result.stderr
    assert "dense: pictures top-1 100.00 % (0 s of pruning)" in result.stderr
    dense, *pruned = json.loads(result.stdout)["rows"]
    assert (dense["top_one"]["top_one"], dense["top_one"]["interval"]) == (1.0, pytest.approx(wilson(12, 12)))
    assert all(row["top_one"]["lost"] + 12 * row["top_one"]["top_one"] == 12 for row in pruned)
    printed = " ".join(run(app, ["compare", *asked]).stdout.split())
    for part in ("top-1 pictures", "100.00 %, 75.75 to 100.00", "12 pictures, float32", "top-1 the higher the better"):
        assert part in printed
    assert "perplexity" not in printed


def test_a_comparison_without_anything_to_measure_on_is_refused(pictures):
    result = run(app, ["compare", pictures[0], "--calibration", pictures[1]])
    assert result.exit_code == EXIT_REFUSED
    assert "give --data for perplexity, or --eval-images for top-1" in result.output
