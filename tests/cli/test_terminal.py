import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from halve.cli import terminal
from halve.cli.terminal import (
    announce,
    progress,
    progress_bar,
    say,
    summary_table,
    warn_if_crowded,
    warn_of_overlap,
)
from halve.run.events import Progress
from halve.run.phases import Phase


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_keeps_count_and_remaining_time_readable(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = progress_bar(console)
    bar.add_task("prox-gradient+cg: block 30/30 collect", total=210, completed=150, last="self_attn.q_proj.weight " * 4)
    console.print(bar.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    for part in ("prox-gradient+cg: block 30/30 collect", "150/210", "-:--:--"):
        assert part in line
    assert ("self_attn" in line) == (width == 120)


def test_sentences_are_printed_as_they_are_and_stay_on_one_line():
    console = Console(file=io.StringIO(), width=20, color_system=None)
    say(console, "x[/y] [bold]not markup[/] " + "long " * 10, label="note")
    assert console.file.getvalue() == "note: x[/y] [bold]not markup[/] " + "long " * 10 + "\n"


def test_a_terminal_breaks_sentences_between_words():
    console = Console(file=io.StringIO(), width=20, color_system=None, force_terminal=True)
    say(console, "several words that fill two lines")
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == ["several words that", "fill two lines"]


def test_a_plan_names_the_parameters_that_stay_dense_if_they_are_few(capsys):
    excluded = [SimpleNamespace(name=f"norm{i}", reason="not a matrix") for i in range(4)]
    excluded += [SimpleNamespace(name="lm_head.weight", reason="outside the blocks")]
    plan = SimpleNamespace(matrices=[1, 2], blocks=["b"], excluded=excluded, weights=30, dense_weights=10)
    with progress() as show:
        show(Progress(0, 1, Phase.PLAN, 0, 2, plan=plan))
    plan_line = capsys.readouterr().err.splitlines()[-1]
    assert plan_line == (
        "plan: 75% of the model's weights are pruned, 2 matrices in 1 block; "
        "left dense: 4 × not a matrix; 1 × outside the blocks (lm_head.weight)"  # noqa: RUF001
    )


def test_what_a_run_is_going_to_suffer_from_is_said_before_its_first_block_is_solved(capsys):
    with progress() as show:
        show(Progress(0, 1, Phase.COLLECT, 0, 2, caution="b0.down_proj has 9 inputs and saw 3 calibration tokens"))
    warning = "warning: b0.down_proj has 9 inputs and saw 3 calibration tokens"
    assert capsys.readouterr().err.splitlines()[-1] == warning


def test_warnings_before_the_first_block_are_said_too(capsys):
    with progress() as show:
        show(Progress(0, 0, Phase.DAMAGE, 0, 0))
        show(Progress(0, 0, Phase.DAMAGE, 0, 0, caution="no token reached them"), "wanda")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["measuring which matrices cost most …", "wanda: warning: no token reached them"]


def test_text_that_is_calibrated_and_evaluated_on_is_warned_of(capsys):
    warn_of_overlap("a.txt", ["b.txt"])
    assert capsys.readouterr().err == ""
    warn_of_overlap("a.txt", ["b.txt", "a.txt"])
    assert "a.txt is both calibrated on and evaluated on: perplexities on it flatter" in capsys.readouterr().err
    warn_of_overlap("a", ["a"], figures="accuracies")
    assert "a is both calibrated on and evaluated on: accuracies on it flatter" in capsys.readouterr().err


def matrix(name, loss=None, status="ok"):
    return SimpleNamespace(name=name, facts={} if loss is None else {"relative_loss": loss}, status=status)


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_the_summary_names_the_worst_of_every_kind(width):
    matrices = [
        matrix("model.layers.0.mlp.down_proj.weight", 0.01),
        matrix("model.layers.1.mlp.down_proj.weight", 0.03),
        matrix("model.layers.2.mlp.down_proj.weight", status="fell_back"),
        matrix("model.layers.0.self_attn.q_proj.weight"),
    ]
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed(summary_table(SimpleNamespace(matrices=matrices)), width).splitlines()
    ]
    assert ["mlp.down_proj", "3", "0.0200", "0.0300", "layers.1", "1"] in rows
    assert ["self_attn.q_proj", "1", "", "", "", ""] in rows


@pytest.mark.parametrize(
    ("names", "worst"),
    [
        (["encoder.block.1.layer.0.wi.weight", "decoder.block.0.layer.0.wi.weight"], "encoder.block.1"),
        (["model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"], "encoder.layers.0"),
        (["model.layers.1.mlp.experts.5.up.weight", "model.layers.0.mlp.experts.7.up.weight"], "layers.1"),
        (["layers.1.up.weight", "layers.0.up.weight"], "layers.1"),
    ],
)
def test_the_worst_block_is_named_by_its_stack_where_there_are_several(names, worst):
    table = summary_table(SimpleNamespace(matrices=[matrix(names[0], 0.2), matrix(names[1], 0.1)]))
    (row,) = [line for line in printed(table, 120).splitlines() if "0.2000" in line]
    assert row.split("│")[5].strip() == worst


@pytest.mark.parametrize(("phase", "words"), [("generate", "writes its calibration text"), ("evaluate", "perplexity")])
def test_what_takes_long_outside_the_blocks_is_announced(capsys, phase, words):
    with progress() as show:
        show(Progress(0, 0, Phase(phase), 0, 0))
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("load", [90.0, 0.0])
def test_before_measuring_a_busy_machine_is_warned_of(capsys, monkeypatch, load):
    monkeypatch.setattr(terminal.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    announce("measure")
    said = capsys.readouterr().err
    assert "measuring which matrices are faster" in said
    assert ("warning: the load is 90.00 on" in said) is (load > 1)


def test_a_pipe_gets_whole_tables():
    code = "from rich.table import Table; from halve.cli.terminal import out; out.print(Table('a' * 120, 'b' * 120))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "a" * 120 in printed
    assert "b" * 120 in printed


def test_more_threads_than_processors_are_warned_of(capsys):
    warn_if_crowded(3, 2)
    assert "3 threads on 2 processors wait for one another" in capsys.readouterr().err
    for threads, processors in ((2, 2), (1, 2), (8, None)):
        warn_if_crowded(threads, processors)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds_left", "said"), [(150.0, "the rest takes 2 minutes or more; --calibration FILE"), (9.0, "")]
)
def test_text_that_takes_long_to_write_is_told_with_a_way_out(capsys, seconds_left, said):
    with progress() as show:
        show(Progress(0, 0, Phase.GENERATE, 100, 1000, seconds_left=seconds_left))
    printed = " ".join(capsys.readouterr().err.split())
    assert said in printed
    assert bool(said) is ("100 of 1000 tokens are written" in printed)


def test_what_is_counted_is_told_in_tenths_where_it_is_slow_and_shown_on_a_terminal(capsys, monkeypatch):
    with terminal.counting("packing", slow=True) as tell:
        for done in range(1, 26):
            tell(done, 25, "name")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 10
    assert (said[0], said[-1]) == ("packing: 3 of 25 matrices", "packing: 25 of 25 matrices")
    with terminal.counting("packing", slow=False) as tell:
        tell(1, 1, "name")
    assert capsys.readouterr().err == ""
    console = Console(force_terminal=True, width=150, file=io.StringIO())
    monkeypatch.setattr(terminal, "err", console)
    with terminal.counting("packing", slow=False) as tell:
        assert console.file.getvalue() == ""  # nothing moves before the first
        tell(3, 25, "up_proj")
    assert "3/25" in console.file.getvalue()
