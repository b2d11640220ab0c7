import json
import re

import pytest

from halve.errors import CorruptFileError, HalveError, InputError
from halve.report.page import MOST_ROWS, MOST_TRAININGS, number, write_comparison, write_report
from reported import fallen_back, training_entry, write_record

SCORE = {"source": "wiki.txt", "seq_len": 16, "windows": 2, "dtype": "float32", "tokens_sha256": "ee"}


def page_of(directory, **options):
    return write_report(directory, **options).read_text(encoding="utf-8")


def own(page):
    """Return a page without Plotly's script."""
    return re.sub(r"<script>.{1000000,}?</script>", "", page, flags=re.DOTALL)


def test_a_page_holds_everything_and_forbids_requests(tmp_path):
    page = page_of(write_record(tmp_path))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert "plotly.js v" in page
    assert "Content-Security-Policy\" content=\"default-src 'none';" in page
    without = own(page)
    assert len(without) < 100_000
    assert not re.findall(r"(?:src|href)=\"(?!data:)", without)
    assert '<html lang="en">' in without
    assert "width=device-width" in without
    for words in ("2:4, wanda+cg", "Perplexity was not measured", "✓ Every matrix", "AutoModelForCausalLM"):
        assert words in without
    assert "cd" * 32 in without  # hash of a file
    assert "ab" * 32 in without  # hash of the calibration tokens


def test_every_chart_has_a_text_alternative_and_the_tables_its_numbers(tmp_path):
    page = own(
        page_of(write_record(tmp_path, measured={"seconds": {"solve": 1.25}, "peak_memory": {"solve": 3 * 10**9}}))
    )
    charts = re.findall(r'data-chart="(\w+)" role="img" aria-label="([^"]+)"', page)
    assert [name for name, _ in charts] == ["loss", "seconds", "memory"]
    for loss in ("0.1", "0.11", "0.2", "0.30000000000000004"):
        assert f'<data value="{loss}' in page
    assert '<data value="1.25">' in page
    assert '<data value="3000000000">3.00 GB' in page


def test_numbers_are_rounded_for_the_eye_and_exact_beneath():
    assert number(1 / 3, 2) == '<data value="0.3333333333333333">0.33</data>'
    assert "not measured" in number(None)
    assert number(float("inf")) == '<data value="Infinity">infinite</data>'


def test_perplexity_before_and_after_is_in_the_title_lines(tmp_path):
    page = own(page_of(write_record(tmp_path, measured={"perplexity": [SCORE | {"before": 10.5, "after": 12.25}]})))
    assert re.search(r'wiki\.txt: perplexity <data value="10\.5">10\.50</data>.*<data value="12\.25">12\.25', page)
    assert "2 windows of 16 tokens, float32" in page


def test_fallbacks_are_told_in_words_and_in_red(tmp_path):
    page = own(page_of(write_record(tmp_path, **fallen_back(write_record(tmp_path)))))
    assert "✕ 1 of 6 matrices fell back to another method" in page
    assert '<tr class="fallback">' in page
    assert "it &lt;b&gt;failed&lt;/b&gt;" in page
    assert "✓ Every matrix" not in page


def test_what_strangers_wrote_stays_text(tmp_path):
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    for matrix in matrices:
        matrix |= {"name": f"model.layers.0.{nasty}", "method": nasty, "reason": nasty, "status": "max_iter"}
    changes = {"source": {"kind": "hub", "name": nasty}, "warnings": [nasty], "environment": {nasty: nasty}}
    changes |= {"measured": {"seconds": {nasty: 1.0}, "finished": nasty}}
    page = own(page_of(write_record(tmp_path, matrices=matrices, pattern=nasty, method=nasty, **changes)))
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2  # the charts and the page's own


def test_of_very_many_matrices_the_worst_are_listed(tmp_path):
    one = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"][0]
    matrices = [one | {"name": f"e[{i}]", "facts": {"relative_loss": i / 10_000}} for i in range(MOST_ROWS + 5)]
    page = own(page_of(write_record(tmp_path, matrices=matrices)))
    assert f"The {MOST_ROWS} that lost most, of {MOST_ROWS + 5}" in page
    listed = page[page.index("<caption>Matrices</caption>") :]
    assert "e[5]<" in listed
    assert "e[4]<" not in listed


def test_a_page_can_be_written_elsewhere_and_only_as_a_file(tmp_path):
    record = write_record(tmp_path / "run")
    assert write_report(record, tmp_path / "page.html") == tmp_path / "page.html"
    assert not (record / "report.html").exists()
    with pytest.raises(InputError, match="is a directory"):
        write_report(record, tmp_path)
    with pytest.raises(HalveError, match="check the volume"):
        write_report(record, record / "halve.json" / "x.html")


def test_runs_are_compared_side_by_side(tmp_path):
    one = write_record(tmp_path / "x" / "a", measured={"perplexity": [SCORE | {"before": 10.0, "after": 12.0}]})
    two = write_record(
        tmp_path / "y" / "a",
        measured={
            "perplexity": [SCORE | {"before": 10.0, "after": 11.0}, SCORE | {"tokens_sha256": "other", "after": 7.0}]
        },
        pattern="1:4",
        calibration={"sha256": "different"},
        objective={"match_dense": 0.25},
    )
    written = write_comparison([one, two], tmp_path / "c.html")
    page = own(written.read_text(encoding="utf-8"))
    assert "2 runs compared" in page
    assert '<th scope="row">x/a</th>' in page  # as much of the path as tells them apart
    assert page.count('<th scope="col">wiki.txt') == 2  # other tokens, another column
    for caution in ("different patterns", "different data", "The losses of y/a are against"):
        assert caution in page
    assert "different models" not in page


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "./a"], ["a", "b", "a"], []])
def test_a_comparison_needs_two(tmp_path, names):
    write_record(tmp_path / "a")
    with pytest.raises(InputError, match="at least two different directories"):
        write_comparison([tmp_path / name for name in names], tmp_path / "c.html")


def test_every_point_of_the_charts_is_in_a_table(tmp_path):
    run = write_record(tmp_path / "a")
    page = own(page_of(run))
    table = page[page.index('<table class="by-block">') :]
    table = table[: table.index("</table>")]
    numbers = ["0.1", "0.11", "0.2", "0.21000000000000002", "0.30000000000000004", "0.31000000000000005"]
    assert re.findall(r'<data value="([^"]+)">', table) == numbers
    other = write_record(tmp_path / "b")
    page = own(write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8"))
    table = page[page.index('<table class="by-block">') :]
    assert table[: table.index("</table>")].count('<data value="0.105') == 2


def test_matrices_without_a_loss_are_told(tmp_path):
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    matrices[0]["facts"] = {}
    page = own(page_of(write_record(tmp_path, matrices=matrices)))
    assert "of the 5 that have one" in page
    assert "1 matrix without a loss is not in it" in page
    assert "of those that have a loss" in page


def test_half_a_character_costs_no_report(tmp_path):
    assert "?" in own(page_of(write_record(tmp_path, warnings=["half \ud800"])))


def test_names_with_spaces_are_quoted(tmp_path):
    page = own(page_of(write_record(tmp_path / "my model's")))
    assert "halve check &#39;my model&#39;&#34;&#39;&#34;&#39;s&#39;" in page
    assert "from_pretrained(&#34;my model&#39;s&#34;)" in page


def test_a_damaged_record_leaves_the_old_page(tmp_path):
    before = page_of(write_record(tmp_path))
    with pytest.raises(CorruptFileError):
        write_report(write_record(tmp_path, matrices="none"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


WIKI = SCORE | {"source": "texts/wiki.txt", "before": 30.5, "after": 45.0}


def test_a_training_has_a_section_of_its_own(tmp_path):
    run = write_record(tmp_path, trainings=[training_entry()], measured={"perplexity": [WIKI], "seconds": {"train": 9}})
    page = own(page_of(run))
    assert "<title>small.gguf at 2:4 by wanda+cg, fine-tuned</title>" in page
    assert page.count('<h2 id="training">Training</h2>') == 1
    assert "<h3>" not in page
    section = page[page.index('aria-labelledby="training"') : page.index('aria-labelledby="layers"')]
    for words in (
        "all <small>fixed mask</small>",
        "<dd>small</dd>",
        "small-2of4",
        "a.txt is short: it is read 2 times",
    ):
        assert words in section
    assert '<data value="256">256</data>' in section
    assert "texts/a.txt (200 tokens), self (56 tokens); 16 sequences of 16 tokens. 32 tokens were held out" in section
    assert re.search(r"weights are of step</dt><dd><data value=\"2\">2</data> <small>of 4</small>", section)
    rates = section[section.index('class="rates"') :]
    assert re.findall(r'<th scope="row">([\d.]+)</th><td>(.*?)</td>', rates[: rates.index("</table>")]) == [
        ("0.0001", '<data value="2.5">2.5000</data>'),
        ("0.0003", '<data value="2.25">2.2500</data>'),
        ("0.001", "diverged"),
    ]
    assert "training took" in page
    assert "These losses are of the pruning, before the training." in page


def test_the_trained_table_has_dense_before_and_after(tmp_path):
    page = own(page_of(write_record(tmp_path, trainings=[training_entry()], measured={"perplexity": [WIKI]})))
    table = page[page.index('id="trained-table"') :]
    table = table[: table.index("</table>")]
    assert re.findall(r'<data value="([\d.]+)">', table) == ["30.5", "60.0", "45.0"]
    assert "-0.2877 ± 0.0100" in table
    page = own(page_of(write_record(tmp_path / "b", trainings=[training_entry()])))
    table = page[page.index('id="trained-table"') :]
    assert "not measured" in table[: table.index("45.0")]  # the dense model was not


def test_every_point_of_a_training_is_in_a_table(tmp_path):
    page = own(page_of(write_record(tmp_path, trainings=[training_entry()])))
    charts = re.findall(r'data-chart="(\w+)" role="img" aria-label="([^"]+)"', page)
    assert [name for name, _ in charts] == ["training_loss", "training_kl", "training_perplexity", "loss"]
    for name, numbers in (
        ("held-out", ["1.5", "40.0", "0.75", "30.0", "0.875", "31.0"]),
        ("losses", ["1.25", "0.00015", "1.0", "0.0003", "0.5", "6e-06"]),
    ):
        table = page[page.index(f'<table class="{name}">') :]
        assert re.findall(r'<data value="([^"]+)">', table[: table.index("</table>")]) == numbers


def test_without_trainings_there_is_no_word_of_them(tmp_path):
    page = own(page_of(write_record(tmp_path / "a")))
    assert "raining" not in page
    assert "pruning took" in page


def test_learned_masks_have_no_losses(tmp_path):
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    none = {"matrices": [matrix | {"facts": {}} for matrix in matrices], "mean_relative_loss": None}
    trained = training_entry(kind="learn", method="maskllm", teacher=None, perplexity=[], curve=[], rates_tried={})
    page = own(page_of(write_record(tmp_path, trainings=[trained], method="maskllm", refit="none", **none)))
    assert "small.gguf at 2:4 by maskllm</title>" in page
    assert "the masks were learned end to end" in page
    assert "<dt>teacher</dt><dd>none</dd>" in page
    assert "before the training" not in page
    assert 'data-chart="' not in page


def test_of_very_many_trainings_the_last_are_told(tmp_path):
    page = own(page_of(write_record(tmp_path, trainings=[training_entry()] * (MOST_TRAININGS + 5))))
    assert f"The last {MOST_TRAININGS} of {MOST_TRAININGS + 5} trainings" in page
    assert re.findall(r"<h3>Training (\d+)</h3>", page) == [str(number) for number in range(6, MOST_TRAININGS + 6)]


def test_a_huge_curve_leaves_a_page_of_bearable_size(tmp_path):
    curve = [{"step": step, "tokens": step, "loss": 1.0, "kl": 0.5, "perplexity": 2.0} for step in range(50_000)]
    assert len(own(page_of(write_record(tmp_path, trainings=[training_entry(curve=curve)])))) < 1_000_000


def test_what_strangers_wrote_about_a_training_stays_text(tmp_path):
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    text = training_entry()["text"] | {"sources": {nasty: 1}, "notes": [nasty], "sha256": nasty}
    score = training_entry()["perplexity"][0] | {"source": nasty, "dtype": nasty, "scored": nasty, "bos": nasty}
    changes = {"method": nasty, "trained": nasty, "options": {nasty: {nasty: nasty}}, "environment": {nasty: nasty}}
    changes |= {"teacher": {"kind": "hub", "name": nasty}, "started_from": {"name": nasty}, "device": nasty}
    changes |= {"rates_tried": {nasty: 1.0}, "text": text, "perplexity": [score], "forward_dtype": nasty}
    for kind in ("finetune", "learn"):
        page = own(page_of(write_record(tmp_path, trainings=[training_entry(**changes, kind=kind)])))
        assert "<img" not in page
        assert "alert(1)</script>" not in page
        assert page.count("<script") == 2


def test_trained_runs_are_compared_with_untrained_ones(tmp_path):
    one, two = write_record(tmp_path / "a"), write_record(tmp_path / "b", trainings=[training_entry()])
    page = own(write_comparison([one, two], tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "<td>wanda+cg</td>" in page
    assert "<td>wanda+cg, fine-tuned</td>" in page
    assert '<td><data value="0">0</data></td>' in page
    assert '<td><data value="256">256</data></td>' in page
    assert "The losses of b are of before the training." in page
    page = own(write_comparison([one, write_record(tmp_path / "d")], tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "trained" not in page
