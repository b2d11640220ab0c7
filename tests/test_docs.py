import importlib.util
import inspect
import json
import re
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import layer_oracles as oracle
from dense_engines import Steady
from halve import check
from halve.evaluation.figure import Perplexity
from halve.evaluation.request import Evaluation
from halve.learning.mask_learning import Learning
from halve.learning.methods import LEARNING_METHODS
from halve.learning.options import Finetuning, Training
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction
from halve.option_groups import options_of
from halve.planner import speed_plan as planner
from halve.planner.speed_plan import plan
from halve.planner.where_faster import WhereFaster
from halve.pruning import prune
from halve.report.measured import add_perplexity
from halve.run.request import Request
from halve.sensitivity.keep_dense import KeepDense
from halve.solve import methods, refit
from halve.solve.matrix import prune_weight, prune_weights
from halve.solve.objective import Objective
from models import decoder, tokens
from pruned_matrices import with_gradient

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted(DOCS.parent.glob("*.md")), *sorted(DOCS.glob("*.md"))]
OPTIONS = {
    **{name: (row.options, "") for name, row in methods.METHODS.items()},
    **{f"refit {name}": (row.options, "refit_") for name, row in refit.REFITS.items()},
    **{f"learning {name}": (row.options, "") for name, row in LEARNING_METHODS.items()},
    "objective": (Objective, ""),
    "reconstruction": (Reconstruction, ""),
    "evaluation": (Evaluation, ""),
}


@pytest.mark.parametrize("each", options_of(Request), ids=lambda each: each.name)
def test_every_option_of_prune_is_documented_with_its_flag_and_default(each):
    table = [[cell.strip() for cell in line.split("|")] for line in (DOCS / "options.md").read_text().splitlines()]
    flag = f"`--{each.name.replace('_', '-')}`"
    default = "required" if each.default is MISSING else each.default
    assert any(flag in row and f"`{default}`" in row for row in table), flag


@pytest.mark.parametrize("each", options_of(Finetuning), ids=lambda each: each.name)
def test_every_option_of_finetune_is_documented_with_its_flag_and_default(each):
    page = (DOCS / "options.md").read_text()
    begin = page.index("**Fine-tuning**")
    own = page[begin : page.index("**Measuring**", begin)] + page[page.index("| `Evaluation` |") : begin]
    table = [[cell.strip() for cell in line.split("|")] for line in own.splitlines()]
    flag = f"`--{each.name.replace('_', '-')}`"
    default = "required" if each.default is MISSING else each.default
    assert any(flag in row and f"`{default}`" in row for row in table), flag


OF_LEARNING = {each.name for each in options_of(Learning)} - {each.name for each in options_of(Training)}


@pytest.mark.parametrize("each", [each for each in options_of(Learning) if each.name in OF_LEARNING])
def test_every_option_of_learn_alone_is_documented_with_its_flag_and_default(each):
    page = (DOCS / "options.md").read_text()
    own = page[page.index("| `Learning` |") :].partition("\n\n")[0]
    table = [[cell.strip() for cell in line.split("|")] for line in own.splitlines()]
    flag = f"`--{each.name.replace('_', '-')}`"
    assert any(f"`{each.name}`" in row and flag in row and f"`{each.default}`" in row for row in table), flag


@pytest.mark.parametrize("owner", OPTIONS)
def test_every_option_is_documented_with_its_default(owner):
    table = [[cell.strip() for cell in line.split("|")] for line in (DOCS / "options.md").read_text().splitlines()]
    options, prefix = OPTIONS[owner]
    for field in fields(options):
        rows = [row for row in table if f"`{prefix}{field.name}`" in row]
        default = "required" if field.default is MISSING else field.default
        assert any(f"`{default}`" in row for row in rows), field.name


def test_every_argument_of_a_plan_is_documented_with_its_default():
    table = [[cell.strip() for cell in line.split("|")] for line in (DOCS / "options.md").read_text().splitlines()]
    for name, parameter in inspect.signature(plan).parameters.items():
        flag = f"`--{'batch' if name == 'batches' else name.replace('_', '-')}`"
        rows = [row for row in table if f"`{name}`" in row and flag in row]
        if name not in {"model", "listen"}:
            assert any(f"`{parameter.default}`" in row for row in rows), name
    for field in (*fields(WhereFaster), *fields(KeepDense)):
        default = "required" if field.default is MISSING else field.default
        if field.name not in {"ratios", "kept", "pruned"}:
            assert any(f"`{field.name}`" in row and f"`{default}`" in row for row in table), field.name


def test_every_key_of_a_plan_is_documented(monkeypatch):
    monkeypatch.setattr(planner.speed, "copies_beyond_cache", lambda _nbytes: 2)
    needed = planner.speed.needed_bytes
    monkeypatch.setattr(planner.speed, "needed_bytes", lambda *a, **k: 1 << 60 if a[2] == 2 else needed(*a, **k))
    text = (DOCS / "plan.md").read_text()
    record = plan(decoder("llama"), batches=[1, 2], against=Steady()).as_json()
    assert record["left_out"]
    assert record["against"]
    nested = [entry for value in record.values() if isinstance(value, list) for entry in value]
    keys = {key for entry in (record, record["machine"], *nested) if isinstance(entry, dict) for key in entry}
    for key in keys:
        assert f"`{key}`" in text, key


def test_every_key_and_fact_of_a_record_is_documented(tmp_path):
    text = (DOCS / "record.md").read_text() + (DOCS / "options.md").read_text()  # what was asked for is in the latter
    prune(decoder("llama"), tmp_path, calibration=tokens(4), effort="best")
    record = json.loads((tmp_path / "halve.json").read_text())
    matrix, block = record["matrices"][0], record["blocks"][0]
    weight, gram = oracle.layer(4, 16, seed=0)
    facts = set(prune_weight(weight, gram, time_limit=0.001).facts)
    for method in methods.METHODS:
        for name in refit.REFITS:
            taken = with_gradient(method, [weight], gram)
            facts |= prune_weights([weight], gram, "2:4", method, name, **taken)[0].facts.keys()
    for key in {*record, *matrix, *block, *matrix["facts"], *facts, *record["calibration"], *record["source"]}:
        assert f"`{key}`" in text, key
    measured = json.loads((tmp_path / "halve-measured.json").read_text())
    add_perplexity(tmp_path, (), (Perplexity(1.0, 1, 2, "float32", "text", "00", 0.0, 0.0),))
    entry = json.loads((tmp_path / "halve-measured.json").read_text())["perplexity"][0]
    for key in {*measured, *entry}:
        assert f"`{key}`" in text, key
    assert check(tmp_path).ok


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_and_pictures_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert all((page.parent / target).exists() for target in targets), targets


def prose(page):
    """Yield the numbered lines of a page but for tables, pictures and fenced code."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith(("|", "![")):
            yield number, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_longer_than_an_editor_is_wide(page):
    assert [number for number, line in prose(page) if len(line) > 120] == []


def test_the_readme_is_short():
    lines = (DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", DOCS / "python.md", DOCS / "vision.md"], ids=lambda page: page.name
)
def test_whole_programs_on_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert programs
    for program in programs:
        exec(compile(program, str(page), "exec"), {})  # noqa: S102 - our own page


def test_the_examples_of_a_contribution_work(monkeypatch):
    blocks = re.findall(
        r"^( *)```python\n(.*?)^ *```", (DOCS / "contributing.md").read_text(), re.MULTILINE | re.DOTALL
    )
    method, row, scale = (textwrap.dedent(code) for _, code in blocks[:3])
    energy = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "energy_of_the_docs", energy)  # dataclasses look their module up
    vars(energy).update(__name__="energy_of_the_docs")
    exec(method, vars(energy))  # noqa: S102 - it is our own page
    monkeypatch.setitem(methods.METHODS, "energy", eval(row, {**vars(methods), "energy": energy})[0])  # noqa: S307
    names = {**vars(refit)}
    exec(scale, names)  # noqa: S102
    monkeypatch.setitem(refit.REFITS, "scale", refit.Refit("scale", refit.NoOptions, names["refit_scale"]))
    weight, gram = oracle.layer(8, 16, 0)
    pruned = {name: prune_weight(weight, gram, method="energy", refit=name, power=1.0) for name in ("none", "scale")}
    scores = weight.abs() * gram.diagonal().sqrt()
    assert torch.equal(pruned["none"].weight != 0, Pattern("2:4").keep_mask(scores))
    loss = {name: outcome.facts["relative_loss"] for name, outcome in pruned.items()}
    assert loss["scale"] < loss["none"]


def test_every_page_is_in_the_index_and_in_the_navigation():
    index, navigation = (path.read_text() for path in (DOCS / "index.md", DOCS.parent / "mkdocs.yml"))
    for page in sorted(DOCS.glob("*.md")):
        if page.name != "index.md":
            assert f"]({page.name})" in index, page.name
        assert f": {page.name}\n" in navigation, page.name


def test_the_picture_of_the_house_is_what_the_code_is():
    spec = importlib.util.spec_from_file_location("draw_house", DOCS / "draw_house.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.svg() == script.PICTURE.read_text(encoding="utf-8"), "run python docs/draw_house.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_line_that_only_holds_a_place(page):
    words = "TABLE|FIGURES?|TODO|TBD|FIXME|XXX|PLACEHOLDER"
    assert not re.findall(rf"^\s*(?:{words})[:.]?\s*$", page.read_text(), re.MULTILINE)
