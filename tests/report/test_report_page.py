"""The report in a real browser: headless Chromium, with everything but the page's own file refused."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import sync_playwright

from halve.report.page import write_comparison, write_report
from reported import fallen_back, prune_and_measure, prune_mixture, training_entry, write_record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REQUIRED = "HALVE_TEST_BROWSER" in os.environ

pytestmark = pytest.mark.skipif(BROWSER is None and not REQUIRED, reason="no Chromium on this machine")

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny model, pruned with reconstruction, its perplexity measured."""
    from halve.model.reconstruct import Reconstruction
    from models import decoder
    from tiny_tokenizers import SENTENCES, byte_bpe

    folder = tmp_path_factory.mktemp("pruned")
    decoder("llama", vocab_size=320).save_pretrained(folder / "dense")
    byte_bpe().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    options = {"method": "wanda", "reconstruct": Reconstruction(epochs=1, learning_rate=1e-3)}
    return prune_and_measure(folder / "dense", str(folder / "text.txt"), folder / "out", **options)


@contextmanager
def opened(browser, path, **options) -> Iterator:
    """Open a page; at the end, no request may have been tried, and nothing complained of."""
    context = browser.new_context(**options)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-charts=drawn]", timeout=30_000)
    yield page
    assert requests == [path.resolve().as_uri()]
    assert complaints == []
    context.close()


def series(page, chart):
    """Return name, x and y of what Plotly has drawn."""
    return page.evaluate(f"document.getElementById('chart-{chart}').data.map(s => [s.name, s.x, s.y])")


def value_of(node):
    """Return the exact number that an element shows rounded."""
    return float(node.get_attribute("value"))


def test_the_page_opens_and_its_numbers_are_those_of_the_record(browser, pruned):
    record = json.loads((pruned / "halve.json").read_text())
    measured = json.loads((pruned / "halve-measured.json").read_text())
    losses = {m["name"]: m["facts"]["relative_loss"] for m in record["matrices"]}
    with opened(browser, pruned / "report.html") as page:
        assert page.title() == "dense at 2:4 by wanda+cg+block"
        assert value_of(page.locator("#mean-loss data")) == record["mean_relative_loss"]
        (score,) = measured["perplexity"]
        values = [value_of(node) for node in page.locator(".score data").all()]
        assert values == [score["before"], score["after"]]
        drawn = {
            f"model.layers.{x}.{name}.weight": y
            for name, xs, ys in series(page, "loss")
            for x, y in zip(xs, ys, strict=True)
        }
        assert drawn == losses
        worst = page.locator("table.matrices").first.locator("tbody tr").all()
        shown = {row.locator("th").inner_text(): value_of(row.locator(".loss data")) for row in worst}
        assert shown == dict(sorted(losses.items(), key=lambda item: -item[1])[:5])
        groups = [value_of(node) for node in page.locator("#groups-table tr.all data").all()]
        counts = [matrix["kept_per_group"] for matrix in record["matrices"]]
        assert groups == [sum(count) for count in zip(*counts, strict=True)]
        rows = page.locator("#phases tbody tr").all()
        assert {row.locator("th").inner_text(): value_of(row.locator("data").first) for row in rows} == (
            measured["seconds"]
        )
        ((_, seconds, phases),) = series(page, "seconds")
        assert dict(zip(phases, seconds, strict=True)) == measured["seconds"]
        before, after = (ys for _, _, ys in series(page, "reconstruction"))
        assert before == [block["error_before"] for block in record["blocks"]]
        assert after == [block["error_after"] for block in record["blocks"]]


def test_charts_are_drawn_and_answer_to_the_pointer(browser, pruned):
    with opened(browser, pruned / "report.html") as page:
        for chart in ("loss", "reconstruction", "seconds", "memory"):
            box = page.locator(f"#chart-{chart} svg.main-svg").first.bounding_box()
            assert box["width"] > 300
            assert box["height"] > 200
        assert page.locator("#chart-loss .scatterlayer .trace").count() == 7
        assert page.locator("#chart-seconds .barlayer .point").count() >= 6
        page.locator("#chart-loss .scatterlayer .trace").first.locator(".point").first.hover(force=True)
        page.wait_for_selector("#chart-loss .hoverlayer .hovertext")
        assert "relative loss" in page.locator("#chart-loss .hoverlayer .hovertext").first.text_content()
        button = page.get_by_role("button", name="logarithmic scale")
        for kind, pressed in (("log", "true"), ("linear", "false")):
            button.press("Enter")
            assert button.get_attribute("aria-pressed") == pressed
            assert page.evaluate("document.getElementById('chart-loss').layout.yaxis.type") == kind


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(browser, tmp_path, scheme):
    changes = {"warnings": ["Read me."], "trainings": [training_entry()]}
    record = write_record(tmp_path, **changes, **fallen_back(write_record(tmp_path)))
    with opened(browser, write_report(record), color_scheme=scheme) as page:
        found = page.evaluate(CONTRASTS)
        assert len(found) > 50
        assert min(found.values()) >= 4.5, min(found, key=found.get)
        dark_text = page.evaluate("document.getElementById('chart-loss').layout.font.color")
        assert dark_text == {"light": "#1c1f23", "dark": "#e6e9ec"}[scheme]


# Contrast of every element's own text with what lies behind it, as WCAG 2 computes it.
CONTRASTS = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const element of document.querySelectorAll("main *:not(svg *)")) {
    if (![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    let behind = element;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind ?? document.body).backgroundColor]
      .map(rgb).map(light).sort((x, y) => y - x);
    found[element.outerHTML.slice(0, 80)] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


def test_a_phone_needs_no_sideways_scrolling(browser, pruned, tmp_path):
    mixture = prune_mixture(tmp_path / "mixture")  # with cells that say that nothing was measured
    pages = [pruned / "report.html", mixture / "report.html"]
    pages.append(write_report(write_record(tmp_path / "trained", trainings=[training_entry()] * 2)))
    pages.append(write_comparison([pruned, mixture], tmp_path / "comparison.html"))
    for path in pages:
        with opened(browser, path, viewport={"width": 360, "height": 740}) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
            assert page.locator(".chart").first.bounding_box()["width"] <= 360


def test_paper_shows_what_is_folded(browser, pruned):
    with opened(browser, pruned / "report.html", color_scheme="dark") as page:
        assert page.locator("details[open]").count() == 0
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        assert page.evaluate("document.getElementById('chart-loss').layout.font.color") == "#1c1f23"
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert page.locator("details[open]").count() == 0
        assert page.pdf()[:5] == b"%PDF-"


def test_fallbacks_and_experts(browser, tmp_path):
    with opened(browser, prune_mixture(tmp_path / "out") / "report.html") as page:
        alarm = page.locator(".alarm")
        assert "matrices fell back to another method" in alarm.inner_text()
        red, green, blue = page.evaluate("getComputedStyle(document.querySelector('.alarm h2')).color.match(/\\d+/g)")
        assert int(red) > 2 * max(int(green), int(blue))
        assert page.locator("details tr.fallback").count() == 14
        drawn = {name: len(ys) for name, _, ys in series(page, "loss")}
        assert drawn["mlp.experts.down_proj"] == 3  # a point a block


def test_the_curves_of_two_trainings_are_drawn(browser, tmp_path):
    trainings = [training_entry(), training_entry(best_step=4)]
    with opened(browser, write_report(write_record(tmp_path, trainings=trainings))) as page:
        for chart, values in (("kl", [1.5, 0.75, 0.875]), ("perplexity", [40.0, 30.0, 31.0])):
            first, second, star = series(page, f"training_{chart}")
            assert first == ["training 1", [0, 128, 256], values]
            assert second == ["training 2", [256, 384, 512], values]
            assert star == ["weights that stayed", [128, 512], values[1:]]
            assert page.locator(f"#chart-training_{chart} .scatterlayer .trace").count() == 3
        assert [ys for _, _, ys in series(page, "training_loss")] == [[1.25, 1.0, 0.5]] * 2
        button = page.locator("[data-scale-of=training_loss]")
        button.press("Enter")
        assert page.evaluate("document.getElementById('chart-training_loss').layout.yaxis.type") == "log"


def test_tags_in_names_do_nothing(browser, tmp_path):
    nasty = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    matrices[0] |= {"name": f"model.layers.0.{nasty}", "method": nasty}
    record = write_record(tmp_path, matrices=matrices, method=nasty, source={"kind": "hub", "name": nasty})
    with opened(browser, write_report(record)) as page:
        page.on("dialog", lambda _dialog: pytest.fail("a script ran"))
        assert page.locator("main img").count() == 0
        assert "<script>alert(2)" in page.locator("h1").inner_text()


def test_a_comparison_opens(browser, tmp_path):
    runs = [write_record(tmp_path / name) for name in "abc"]
    with opened(browser, write_comparison(runs, tmp_path / "comparison.html")) as page:
        assert [name for name, _, _ in series(page, "losses")] == ["a", "b", "c"]
        assert page.locator("#runs-table tbody tr").count() == 3
