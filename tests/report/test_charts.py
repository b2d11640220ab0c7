from dataclasses import replace

import pytest
from plotly import graph_objects

from halve.report import charts
from halve.report.facts import BlockFacts, read_run
from reported import fallen_back, training_entry, write_record


@pytest.fixture
def run(tmp_path):
    return read_run(write_record(tmp_path))


def assert_sound(figure):
    """Plotly's own schema accepts the figure."""
    graph_objects.Figure(figure)


def test_every_kind_is_a_series_of_its_own_colour_and_marker(run):
    figure = charts.loss_by_layer(run)
    assert_sound(figure)
    one, other = figure["data"]
    assert (one["name"], other["name"]) == ("self_attn.q_proj", "mlp.down_proj")
    assert one["x"] == other["x"] == [0, 1, 2]
    assert other["y"] == pytest.approx([0.11, 0.21, 0.31])
    assert one["marker"]["symbol"] != other["marker"]["symbol"]
    assert one["marker"]["color"] != other["marker"]["color"]
    assert "relative loss 0.10000<br>before the refit 0.12000" in one["text"][0]
    assert "64 tokens" in one["text"][0]


def test_names_cannot_bring_markup(run):
    nasty = replace(run.matrices[0], name="<a href='x'>", kind="<b>k</b>", method="<i>")
    figure = charts.loss_by_layer(replace(run, matrices=(nasty,)))
    assert "<a" not in figure["data"][0]["text"][0]
    assert "<i" not in figure["data"][0]["text"][0]
    assert figure["data"][0]["name"] == "&lt;b&gt;k&lt;/b&gt;"


def test_fallbacks_are_crosses_on_top(run, tmp_path):
    fallen = read_run(write_record(tmp_path, **fallen_back(run.directory)))
    figure = charts.loss_by_layer(fallen)
    assert_sound(figure)
    last = figure["data"][-1]
    assert (last["name"], last["x"], last["marker"]["symbol"]) == ("fell back", [1], "x")
    assert last["y"] == pytest.approx([0.21])
    assert "it &lt;b&gt;failed" in last["text"][0]


def test_the_experts_of_a_block_are_one_point(run):
    experts = [replace(run.matrices[0], name=f"e[{i}]", kind="experts", loss=0.1 * (i + 1)) for i in range(3)]
    (series,) = charts.loss_by_layer(replace(run, matrices=tuple(experts)))["data"]
    assert series["y"] == pytest.approx([0.2])
    assert "measured on 3 of 3 matrices" in series["text"][0]
    assert "0.10000 to 0.30000 (e[2])" in series["text"][0]


def test_an_expert_that_was_not_measured_is_told(run):
    experts = [replace(run.matrices[0], name=f"e[{i}]", kind="experts", loss=0.1 if i else None) for i in range(3)]
    (series,) = charts.loss_by_layer(replace(run, matrices=tuple(experts)))["data"]
    assert "measured on 2 of 3 matrices" in series["text"][0]


def test_without_losses_there_is_no_chart(run):
    none = replace(run, matrices=tuple(replace(matrix, loss=None) for matrix in run.matrices))
    assert charts.loss_by_layer(none) is None
    assert charts.losses_of_runs({"a": none}) is None
    assert charts.bars({}, "s") is None
    assert charts.reconstruction(run) is None


def test_a_block_index_is_never_a_fraction(run):
    many = [replace(run.matrices[0], block=block) for block in range(100)]
    axis = charts.loss_by_layer(replace(run, matrices=tuple(many)))["layout"]["xaxis"]
    assert axis["dtick"] == 8
    assert charts.loss_by_layer(run)["layout"]["xaxis"]["dtick"] == 1


def test_reconstruction_before_and_after(run):
    figure = charts.reconstruction(replace(run, blocks=(BlockFacts(name="b0", before=0.2, after=0.1, undone=False),)))
    assert_sound(figure)
    assert [(series["name"], series["y"]) for series in figure["data"]] == [("before", [0.2]), ("after", [0.1])]


def test_bars_keep_their_order_from_the_top():
    figure = charts.bars({"load": 1.0, "solve": 3.0}, "seconds")
    assert_sound(figure)
    assert figure["layout"]["yaxis"]["autorange"] == "reversed"
    assert figure["data"][0]["y"] == ["load", "solve"]


def test_runs_are_compared_by_their_mean(run):
    half = replace(run, matrices=tuple(replace(matrix, loss=matrix.loss / 2) for matrix in run.matrices))
    figure = charts.losses_of_runs({"a": run, "b": half})
    assert_sound(figure)
    assert [series["name"] for series in figure["data"]] == ["a", "b"]
    assert figure["data"][0]["y"] == pytest.approx([0.105, 0.205, 0.305])
    assert figure["data"][1]["y"] == pytest.approx([0.0525, 0.1025, 0.1525])


def test_trainings_follow_each_other_over_tokens(tmp_path):
    trainings = read_run(write_record(tmp_path, trainings=[training_entry(), training_entry(best_step=4)])).trainings
    figure = charts.training(trainings, "loss", most=20)
    assert_sound(figure)
    first, second = figure["data"]
    assert (first["x"], first["y"]) == ([64, 128, 256], [1.25, 1.0, 0.5])
    assert (second["x"], second["y"]) == ([320, 384, 512], [1.25, 1.0, 0.5])  # from where the first ended
    assert first["marker"]["symbol"] != second["marker"]["symbol"]
    assert first["text"] == ["step 1", "step 2", "step 4"]


@pytest.mark.parametrize(("quantity", "values"), [("kl", [1.5, 0.75, 0.875]), ("perplexity", [40.0, 30.0, 31.0])])
def test_the_weights_that_stayed_have_a_star(tmp_path, quantity, values):
    trainings = read_run(write_record(tmp_path, trainings=[training_entry(), training_entry(best_step=4)])).trainings
    figure = charts.training(trainings, quantity, most=20)
    assert_sound(figure)
    first, second, star = figure["data"]
    assert (first["x"], first["y"], second["x"]) == ([0, 128, 256], values, [256, 384, 512])
    assert (star["x"], star["y"], star["marker"]["symbol"]) == ([128, 512], [values[1], values[2]], "star")


def test_the_last_trainings_are_drawn_where_they_belong(tmp_path):
    trainings = read_run(write_record(tmp_path, trainings=[training_entry(tokens=1000)] * 3)).trainings
    (last,) = charts.training(trainings, "loss", most=1)["data"]
    assert (last["name"], last["x"]) == ("training 3", [2064, 2128, 2256])


def test_what_was_not_measured_is_not_drawn(tmp_path):
    curve = [{"step": 1, "tokens": 64, "loss": None}, {"step": 1, "tokens": 64, "perplexity": 9.0, "kl": None}]
    trainings = read_run(write_record(tmp_path, trainings=[training_entry(curve=curve)])).trainings
    assert charts.training(trainings, "loss", most=20) is None
    assert charts.training(trainings, "kl", most=20) is None
    assert charts.training(trainings, "perplexity", most=20)["data"][0]["y"] == [9.0]
    assert charts.training((), "loss", most=20) is None
