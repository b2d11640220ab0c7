"""Every experiment at a tiny size, and what must hold of its numbers at any size."""

import json
import math
import statistics
from itertools import pairwise

import pytest
import torch

import calibration_samples
import gather
import group_path
import lambda_schedule
import level_losses
import levels
import masked_gradient
import matmul_speed
import matrices_of_model
import results
import toy_problem
import which_layers
from halve.checkpoint.load import load_model
from halve.maths.pattern import Pattern

TINY = ["--samples", "4", "--seq-len", "16", "--device", "cpu"]


def numbers_of(module, out):
    """Return what an experiment wrote, after a look at its picture's first bytes."""
    assert (out / f"{module.NAME}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{module.NAME}.json").read_text())


def test_paths_keep_signs_and_order_and_supports_only_shrink(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(group_path, "_BISECTIONS", 0)
    group_path.main(["--out", str(tmp_path), "--points", "10"])
    for path in numbers_of(group_path, tmp_path)["paths"]:
        weights, z = torch.tensor(path["weights"]), torch.tensor(path["z"])
        pattern = Pattern(path["pattern"])
        assert path["signs_kept"]
        assert path["order_kept"]
        assert path["support_only_shrinks"]
        assert torch.equal(weights.sign().abs() * z.sign(), weights.sign())
        order = z.abs().argsort()
        assert (weights.abs()[:, order].diff(dim=-1) >= 0).all()
        supports = (weights != 0).sum(-1).tolist()
        assert supports == sorted(supports, reverse=True)
        steps = [(change["from"], change["to"]) for change in path["changes"]]
        assert steps == [(size, size - 1) for size in range(pattern.group, pattern.keep, -1)]
    assert "3→2" in capsys.readouterr().out


def test_change_of_support_is_where_the_third_weight_goes():
    path = group_path.follow("2:4", (1.0, 0.9, 0.8, 0.0), [0.01, 3.0])
    (change,) = path["changes"]
    at = [
        group_path.halve.prox(torch.tensor(path["z"]).double(), change["lambda"] * f)[2] for f in (1 - 1e-6, 1 + 1e-6)
    ]
    assert at[0] > 0
    assert at[1] == 0


def test_optimum_of_toy_problem_is_that_of_every_mask_solved_alone():
    gram = toy_problem.covariance("decaying", 0.8, 8)
    root = torch.linalg.cholesky(gram)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = torch.full((3,), math.inf, dtype=torch.float64)
    supports = toy_problem.all_supports(8)
    assert len({tuple(support) for support in supports.tolist()}) == 36
    for support in supports:
        fitted = torch.zeros_like(rows)
        fitted[:, support] = torch.linalg.lstsq(root.mT[:, support], root.mT @ rows.mT).solution.mT
        assert Pattern("2:4").satisfied_by(fitted)
        best = torch.minimum(best, toy_problem.losses(fitted, rows, gram))
    assert torch.allclose(toy_problem.optimal_losses(rows, gram), best, rtol=1e-9)


def test_toy_problem_is_never_below_its_optimum(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_problem, "CORRELATIONS", (0.0, 0.9))
    toy_problem.main(["--out", str(tmp_path), "--seeds", "1", "--rows", "3"])
    numbers = numbers_of(toy_problem, tmp_path)
    for entry in numbers["entries"]:
        found = {contender: means[0] for contender, means in entry["over_optimum"].items()}
        assert min(found.values()) >= 1 - 1e-6
        if entry["correlation"] == 0.0:  # Wanda is optimal for a diagonal H
            assert found["wanda"] == pytest.approx(1.0, abs=1e-6)
            assert entry["share_optimal"]["wanda"] == [1.0]
        else:
            assert found["wanda"] > found["wanda+cg"] >= found["prox-admm+swap"]
    assert "| wanda+cg |" in capsys.readouterr().out


def test_matrices_of_model_have_the_statistics_of_the_dense_models_inputs(checkpoint):
    loaded = load_model(str(checkpoint))
    ids = torch.randint(3, 320, (4, 12), generator=torch.Generator().manual_seed(0))
    seen = {}
    block = loaded.model.model.layers[1]
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, kind=kind: seen.setdefault(kind, args[0].detach()))
        for kind, module in (("q_proj", block.self_attn.q_proj), ("down_proj", block.mlp.down_proj))
    ]
    loaded.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found = matrices_of_model.matrices_of_model(
        loaded.model, ids, [1], rows=5, held_out=True, snapshots=lambda _matrix: (7, 20, 999), device="cpu"
    )
    matrices = {matrix.kind: matrix for matrix in found}
    assert len(matrices) == 7
    for kind, inputs in seen.items():
        matrix, train, other = matrices[kind], inputs[::2].flatten(0, 1), inputs[1::2].flatten(0, 1)
        assert matrix.weight.shape == (5, inputs.shape[-1])
        assert matrix.block == 1
        assert torch.allclose(matrix.fitted.gram, train.mT @ train / len(train), rtol=1e-4, atol=1e-5)
        assert torch.allclose(matrix.held_out.gram, other.mT @ other / len(other), rtol=1e-4, atol=1e-5)
        assert [stats.tokens for stats in matrix.snapshots] == [7, 20]
        for stats in matrix.snapshots:
            first = train[: stats.tokens]
            assert torch.allclose(stats.gram, first.mT @ first / len(first), rtol=1e-4, atol=1e-5)


def test_iterations_of_the_schedule_fall_as_lambda_starts_or_grows_faster(model, text, tmp_path):
    grid = ["--lambdas", "0.01", "1", "--betas", "1.05", "1.1", "1.3", "--block", "1", "--kinds", "q_proj", "down_proj"]
    lambda_schedule.main([model, "--calibration", text, "--out", str(tmp_path), *TINY, *grid])
    numbers = numbers_of(lambda_schedule, tmp_path)
    assert [matrix["kind"] for matrix in numbers["matrices"]] == ["q_proj", "down_proj"]
    for matrix in numbers["matrices"]:
        found = {(run["lambda0"], run["beta"]): run for run in matrix["runs"]}
        for lambda0 in (0.01, 1.0):
            slow_to_fast = [found[lambda0, beta]["iterations"] for beta in (1.05, 1.1, 1.3)]
            assert slow_to_fast == sorted(slow_to_fast, reverse=True)
            assert slow_to_fast[0] > slow_to_fast[-1]
        assert found[0.01, 1.05]["iterations"] > found[1.0, 1.05]["iterations"]
        for run in matrix["runs"]:
            assert 0 < run["loss"] <= run["loss_before_refit"] < 1
            assert run["row_iterations"] <= run["iterations"]


def test_masked_gradient_steps_approach_the_exact_refit(model, text, tmp_path, monkeypatch, capsys):
    call = [model, "--calibration", text, "--out", str(tmp_path), *TINY]
    call += ["--steps", "50", "400", "--perplexity-steps", "0", "2", "--block", "0"]
    call += ["--data", text, "--windows", "2", "--methods", "wanda"]
    masked_gradient.main(call)
    numbers = numbers_of(masked_gradient, tmp_path)
    assert len(numbers["matrices"]) == 7
    for matrix in numbers["matrices"]:
        for losses in matrix["losses"].values():
            assert list(losses) == ["0", "50", "400", "cg"]
            steps = [losses[count] for count in ("0", "50", "400")]
            assert all(after <= before * (1 + 1e-6) for before, after in pairwise(steps))
            assert losses["cg"] <= losses["50"]
    assert [(row["method"], row["steps"]) for row in numbers["rows"]] == [("wanda", n) for n in ("0", "2", "cg")]
    assert all(math.isfinite(row["perplexities"][0]) for row in numbers["rows"])
    assert "16.26 / 28.63" not in capsys.readouterr().out  # the paper's 1600 steps have no row of ours beside them

    def refuse(*_args, **_options):
        raise AssertionError

    monkeypatch.setattr(masked_gradient.halve, "prune", refuse)
    monkeypatch.setattr(masked_gradient.halve, "prune_weight", refuse)
    masked_gradient.main(call)
    assert numbers_of(masked_gradient, tmp_path)["rows"] == numbers["rows"]


def test_steps_in_parts_are_steps_in_one():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    stats = masked_gradient.Statistics(inputs.mT @ inputs / 64, 64)
    found = masked_gradient.losses_by_steps(weight, stats, "wanda", [0, 10, 30])
    whole = masked_gradient.halve.prune_weight(weight, stats, "2:4", "wanda", "gd", refit_steps=30)
    assert found["30"] == pytest.approx(whole.facts["relative_loss"], rel=1e-5)
    assert found["0"] == pytest.approx(whole.facts["relative_loss_before_refit"], rel=1e-5)


def test_which_layers_judges_on_tokens_that_no_method_saw(model, text, tmp_path, capsys):
    which_layers.main([model, "--calibration", text, "--out", str(tmp_path), *TINY, "--depths", "1", "--beta", "1.3"])
    numbers = numbers_of(which_layers, tmp_path)
    assert [matrix["block"] for matrix in numbers["matrices"]] == [0] * 7
    for matrix in numbers["matrices"]:
        assert matrix["tokens"] == 32
        for fact in ("effective_rank", "participation", "effective_rank_scaled", "diagonal_share"):
            assert 0 < matrix[fact] <= 1 + 1e-6
        losses = matrix["losses"]
        for contender in which_layers.CONTENDERS[1:-1]:  # an exact refit is best where it looks
            assert losses[contender]["seen"] < losses["wanda"]["seen"]
        assert losses["auto+cg"]["seen"] <= losses["wanda"]["seen"] * (1 + 1e-4)  # shrinkage 1 ends at Wanda
    assert [point["tokens_per_input"] for point in numbers["sweep"] if point["kind"] == "q_proj"] == [0.25, 0.5, 1.0]
    assert {point["kind"] for point in numbers["sweep"]} == set(which_layers.SWEPT)
    assert all(-1 <= row["diagonal_share"] <= 1 for row in numbers["correlations"])
    assert "held-out tokens" in capsys.readouterr().out


def test_facts_of_gram_matrices_that_are_known():
    alike = which_layers.facts_of(torch.eye(8))
    assert all(value == pytest.approx(1.0, rel=1e-6) for value in alike.values())
    one = which_layers.facts_of(torch.ones(8, 8))
    assert all(value == pytest.approx(1 / 8, rel=1e-4) for value in one.values())
    scaled = which_layers.facts_of(torch.diag(torch.tensor([100.0, 1.0])))
    assert scaled["diagonal_share"] == pytest.approx(1.0)
    assert scaled["effective_rank_scaled"] == pytest.approx(1.0)
    assert scaled["participation"] == pytest.approx(101**2 / (100**2 + 1) / 2)


def test_rank_correlation():
    assert which_layers.spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1.0)
    assert which_layers.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert which_layers.spearman([1, 2, 3], [5, 5, 5]) == 0.0
    assert which_layers.spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(2 / math.sqrt(5))
    shared = statistics.correlation([0.5, 0.5, 2, 4, 4, 4], range(6))
    assert which_layers.spearman([1, 1, 2, 3, 3, 3], [1, 2, 4, 8, 16, 32]) == pytest.approx(shared)


def test_blocks_are_spread_over_the_depth():
    assert which_layers.spread(30, 6) == [0, 6, 12, 17, 23, 29]
    assert which_layers.spread(3, 6) == [0, 1, 2]
    assert which_layers.spread(5, 1) == [0]


def test_matmul_speed_without_cuda_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    matmul_speed.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out.count("nothing was measured and nothing was written.") == 1
    assert not list(tmp_path.iterdir())


def test_batches_are_padded_to_what_the_sparse_product_takes():
    assert [matmul_speed.padded_rows(batch) for batch in (1, 8, 9, 16, 32768)] == [8, 8, 16, 16, 32768]


def test_cases_that_do_not_fit_are_left_out():
    everything, nothing = matmul_speed.cases(1 << 50)
    assert len(everything) == 2 * 4 * 6
    assert not nothing
    chosen, left_out = matmul_speed.cases(16 << 30)
    assert sorted(chosen + left_out) == sorted(everything)
    assert ("70B", "gate, up", 28672, 8192, 32768) in left_out
    assert ("8B", "k, v", 1024, 4096, 1) in chosen
    least = 2 * (28672 * 8192 + 32768 * 8192 + 32768 * 28672)  # what the dense product alone takes
    assert matmul_speed.needed_bytes(28672, 8192, 32768) > least


def test_table_of_matmul_speed(tmp_path):
    rows = [
        {
            "model": "8B",
            "layer": layer,
            "d_out": d_out,
            "d_in": 4096,
            "batch": batch,
            "dtype": "bfloat16",
            "device_seconds": {"dense": 3.0, "sparse": 4.0, "sparse, searched": 2.0},
            "call_seconds": {"dense": 1.0, "sparse": 1.0, "sparse, searched": 4.0},
        }
        for layer, d_out, batches in (("q, o", 4096, (1, 16)), ("k, v", 1024, (1,)))
        for batch in batches
    ]
    numbers = {"rows": rows, "left_out": ["70B down, batch 32768"]}
    text = matmul_speed.markdown(numbers)
    assert "| 8B q, o | 4096 x 4096 | 1.50 | 1.50 |" in text
    assert "| 8B q, o | 4096 x 4096 | 0.75 | 0.75 |" in text
    assert "| 8B k, v | 1024 x 4096 | 0.25 |  |" in text
    assert "Left out for want of memory: 70B down, batch 32768." in text
    results.save("matmul", numbers, matmul_speed.picture(numbers), tmp_path)
    assert (tmp_path / "matmul.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_sparse_products_on_a_gpu_are_right():
    row = matmul_speed.measure(("8B", "k, v", 1024, 4096, 9), torch.bfloat16, turns=2)
    assert max(row["error"].values()) < 2e-2
    assert min(row["device_seconds"].values()) > 0


def test_calibration_samples_goes_on_where_it_stopped(model, text, tmp_path, monkeypatch):
    call = [model, "--calibration", text, "--data", text, "--out", str(tmp_path), "--methods", "wanda+cg"]
    call += ["--seq-len", "16", "--blocks", "1", "--windows", "2", "--device", "cpu", "--samples", "2"]
    calibration_samples.main([*call, "1"])
    rows = numbers_of(calibration_samples, tmp_path)["rows"]
    assert [row["samples"] for row in rows] == [2, 1]

    def refuse(*_args, **_options):
        raise AssertionError

    monkeypatch.setattr(calibration_samples.halve, "prune", refuse)
    calibration_samples.main(call)
    assert numbers_of(calibration_samples, tmp_path)["rows"] == rows


MEASURED = {"kept": 0.5, "mean_relative_loss": 0.1, "cpu_seconds": 7.0}
SWEPT = ["--levels", "50%", "2:4", "3:4", "--methods", "wanda", "sparse-swaps", "auto+cg"]


@pytest.fixture
def swept(model, text, tmp_path):
    """The command line of a small sweep; sparse-swaps needs groups, and so does not take 50 %."""
    data = ["--calibration", text, "--data", text, "--windows", "2"]
    places = ["--out", str(tmp_path), "--rows", str(tmp_path / "rows.jsonl"), "--picture", str(tmp_path / "a.svg")]
    return [model, *data, *places, *SWEPT, *TINY]


def test_levels_are_kept_to_and_what_a_method_does_not_take_is_said(swept, tmp_path, capsys):
    settings = dict(levels.mpl.rcParams)
    levels.main(swept)
    assert dict(levels.mpl.rcParams) == settings
    numbers = json.loads((tmp_path / "levels.json").read_text())
    kept = {(row["method"], row["level"]): row.get("kept") for row in numbers["rows"]}
    for method in ("wanda", "sparse-swaps", "auto+cg, fast"):
        assert kept[method, "2:4"] == pytest.approx(0.5, abs=0.01)
        assert kept[method, "3:4"] == pytest.approx(0.75, abs=0.01)
    assert kept["wanda", "50%"] == pytest.approx(0.5, abs=0.01)
    assert kept["sparse-swaps", "50%"] is None
    text = capsys.readouterr().out
    assert "| 50% | 1.00 | sparse-swaps | not measured |" in text
    assert "Not measured: sparse-swaps at 50%: " in text
    order = [line.split(" | ")[0] for line in text.splitlines() if " | wanda | " in line]
    assert order == ["| 3:4", "| 2:4", "| 50%"]
    drawn = (tmp_path / "a.svg").read_text()
    assert all(f">{word}<" in drawn for word in ("2:4", "3:4", "50%", "25 % zeros", "wanda", "auto+cg, fast"))


def test_a_sweep_of_levels_goes_on_after_half_a_row(swept, tmp_path, monkeypatch):
    levels.main([*swept, "--methods", "wanda"])
    rows, picture, found = tmp_path / "rows.jsonl", tmp_path / "a.svg", (tmp_path / "levels.json").read_bytes()
    first, drawn = rows.read_text(), picture.read_bytes()
    lines = first.splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:40])
    asked = []
    prune = levels.halve.prune
    monkeypatch.setattr(levels.halve, "prune", lambda *args, **opts: asked.append(opts) or prune(*args, **opts))
    levels.main([*swept, "--methods", "wanda"])
    assert [(options["pattern"], options["method"]) for options in asked] == [("3:4", "wanda")]
    again = [json.loads(line) for line in rows.read_text().splitlines()]
    for row, before in zip(again, map(json.loads, lines), strict=True):
        assert row.get("perplexities") == before.get("perplexities")
    levels.main([*swept, "--show"])
    assert len(asked) == 1
    assert json.loads((tmp_path / "levels.json").read_text())["seed"] == 0
    levels.main([*swept, "--methods", "wanda", "--seed", "1"])  # measured otherwise: nothing is taken over
    assert len(asked) == 4
    assert len(rows.read_text().splitlines()) == 2 * len(lines)
    rows.write_text(first)
    levels.main([*swept, "--methods", "wanda"])
    assert len(asked) == 4
    assert (tmp_path / "levels.json").read_bytes() == found
    assert picture.read_bytes() == drawn


def test_a_sweep_of_levels_without_text_or_rows_is_refused(model, tmp_path, capsys):
    rows = ["--rows", str(tmp_path / "rows.jsonl")]
    with pytest.raises(SystemExit):
        levels.main([model, *rows])
    assert "give at least one text to measure perplexity on, with --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        levels.main([model, *rows, "--show"])
    assert "rows.jsonl has no rows yet: leave --show out" in capsys.readouterr().err


def test_freedom_of_levels():
    assert levels.mask_bits(Pattern("2:4")) == pytest.approx(math.log2(6) / 4)
    assert levels.mask_bits(Pattern("50%")) == pytest.approx(1.0)
    assert levels.mask_bits(Pattern("25%")) == pytest.approx(math.log2(math.comb(4096, 1024)) / 4096, abs=2e-3)
    assert levels.ordered(["50%", "8:16", "1:4", "2:4", "2:8", "4:8", "2:4", "6:8", "3:4"]) == [
        *("3:4", "6:8", "2:4", "4:8", "8:16", "50%", "1:4", "2:8"),
    ]


def test_cost_of_a_level_is_in_nats_and_beside_the_tightest_of_its_share():
    rows = [
        {"level": level, "method": "m", "perplexities": [10 * math.exp(cost), 30 * math.exp(3 * cost)]}
        for level, cost in (("4:8", 0.3), ("2:4", 0.4))
    ]
    numbers = {"data": ["a", "b"], "dense": [10.0, 30.0], "rows": [{**row, **MEASURED} for row in rows]}
    assert levels.excess(numbers, "m", "2:4") == pytest.approx(0.8)
    assert levels.excess(numbers, "m", "50%") is None
    table = levels.markdown(numbers)
    assert "| m | 0.800 | 0.600 (75%) |" in table
    assert "| 2:4 | 0.65 | m | 50.0% | 14.92 | 99.60 | 1.49 / 3.32 | 0.1000 | 7 |" in table
    assert levels.markdown({**numbers, "rows": []}).startswith("| level |")


def test_losses_of_levels_fall_with_freedom(model, text, tmp_path, capsys):
    asked = ["--levels", "2:4", "50%", "4:8", "3:4", "--kinds", "q_proj", "down_proj", "--methods", "wanda", "auto+cg"]
    level_losses.main([model, "--calibration", text, "--out", str(tmp_path), *TINY, *asked, "--block", "1"])
    numbers = numbers_of(level_losses, tmp_path)
    assert [row["kind"] for row in numbers["rows"]] == ["q_proj"] * 8 + ["down_proj"] * 8
    by_hand = {
        level: [r["loss"] for r in numbers["rows"] if (r["method"], r["level"]) == ("wanda", level)]
        for level in ("3:4", "2:4", "4:8", "50%")
    }
    found = level_losses.means(numbers)["wanda"]
    for level, (one, other) in by_hand.items():
        assert found[level] == pytest.approx(math.sqrt(one * other))
    assert found["3:4"] < found["50%"] < found["4:8"] < found["2:4"]
    share = f"{found['4:8'] / found['2:4']:.0%}"
    assert (
        f"| wanda | {found['3:4']:.4f} | {found['2:4']:.4f} | {found['4:8']:.4f} ({share}) |" in capsys.readouterr().out
    )


def test_gathered_page_keeps_its_prose(tmp_path, capsys):
    numbers = {"paths": [group_path.follow("2:4", (1.0, 0.9, 0.8, 0.0), [0.01, 3.0])]}
    results.save("group_path", numbers, None, tmp_path)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table: group_path -->\nold\n<!-- end -->\nb\n<!-- table: nothing -->\nc\n<!-- end -->\n")
    call = ["--page", str(page), "--numbers", str(tmp_path)]
    assert gather.main([*call, "--check"]) == 1
    assert "old" in page.read_text()
    assert gather.main(call) == 0
    text = page.read_text()
    assert text.startswith("a\n")
    assert text.endswith("\nb\n<!-- table: nothing -->\nc\n<!-- end -->\n")
    assert "old" not in text
    assert group_path.markdown(numbers) in text
    assert gather.main([*call, "--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_pages_are_up_to_date():
    assert gather.main(["--check"]) == 0


def test_one_page_that_is_not_up_to_date_is_enough(tmp_path):
    pages = [tmp_path / "old.md", tmp_path / "new.md"]
    pages[0].write_text("<!-- table: levels -->\nold\n<!-- end -->\n")
    pages[1].write_text("no table\n")
    results.save("levels", {"data": ["a"], "dense": [2.0], "rows": []}, None, tmp_path)
    call = [*(word for page in pages for word in ("--page", str(page))), "--numbers", str(tmp_path)]
    assert gather.main([*call, "--check"]) == 1
    assert gather.main(call) == 0
    assert "| dense |" in pages[0].read_text()
    assert gather.main([*call, "--check"]) == 0


def test_page_shows_every_picture():
    text = gather.PAGE.read_text(encoding="utf-8")
    for picture in results.DEFAULT_OUT.glob("*.png"):
        assert f"](paper/{picture.name})" in text
