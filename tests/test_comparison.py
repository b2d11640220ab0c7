import json
import weakref

import pytest
import torch

import halve
from halve import check, comparison
from halve.checkpoint.load import LoadedModel
from halve.comparison import Comparison, checkpoint_directory, make_requests
from halve.errors import FactorisationError, HalveError, InputError
from halve.evaluation.perplexity import perplexity
from halve.evaluation.request import Evaluation
from halve.model.reconstruct import Reconstruction
from halve.run.contender import Contender
from halve.text.tokens import TokenSet, hash_ids
from models import decoder, tokens


def token_set(seed, name):
    ids = tokens(seed=seed)
    return TokenSet(ids, name, hash_ids(ids), 1)


def test_a_name_alone_is_the_method_as_published():
    assert Contender.parse("wanda") == Contender("wanda", "none")
    assert Contender.parse(" wanda+cg ") == Contender("wanda", "cg")
    assert str(Contender.parse("wanda+cg")) == "wanda+cg"
    for text in ("wanda+block", "wanda+cg+block"):
        parsed = Contender.parse(text)
        assert parsed.reconstruct
        assert str(parsed) == text
    assert Contender.parse("wanda++") == Contender("wanda++", "none")
    assert Contender.parse("wanda+++cg+block") == Contender("wanda++", "cg", reconstruct=True)
    for text in ("wanda+block", "wanda+cg+block", "wanda++", "wanda+++cg", "wanda+++block"):
        assert str(Contender.parse(text)) == text
    for text in (
        "wanda++cg",
        "wanda++++cg",
        "wanda+++",
        "",
        "+cg",
        "wanda+",
        "wanda+cg+gd",
        "wanda+block+cg",
        "+block",
    ):
        with pytest.raises(InputError, match="is not a method to compare"):
            Contender.parse(text)


def test_rows_come_in_order_and_the_dense_model_stays_dense(tmp_path):
    model = decoder("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    contenders = [Contender.parse(name) for name in ("magnitude", "wanda", "wanda+cg")]
    requests = make_requests(contenders, {}, forward_dtype="float32", seed=3)
    compared = Comparison(
        LoadedModel(model, None, None),
        requests,
        token_set(0, "calibration"),
        [token_set(1, "one"), token_set(2, "two")],
        out=tmp_path,
    )
    rows = list(compared)
    assert [row.name for row in rows] == ["dense", "magnitude", "wanda", "wanda+cg"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert rows[0].mean_relative_loss is None
    assert rows[3].mean_relative_loss < rows[2].mean_relative_loss < rows[1].mean_relative_loss
    assert len({row.perplexities[0].value for row in rows}) == 4
    record = compared.as_json()
    record = json.loads(json.dumps(record, allow_nan=False))
    calibration = token_set(0, "calibration")
    assert record["calibration"] == {
        "source": "calibration",
        "samples": calibration.samples,
        "seq_len": calibration.seq_len,
        "bos": "",
        "sha256": calibration.sha256,
        "seed": 3,
    }
    assert (record["model"], record["pattern"]) == ("LlamaForCausalLM", "2:4")
    assert list(record["contenders"]) == ["magnitude", "wanda", "wanda+cg"]
    assert record["contenders"]["wanda+cg"]["options"]["refit_tolerance"] == 1e-4
    assert record["contenders"]["wanda"]["objective"]["match_dense"] == 0.0
    assert record["environment"]["torch"] == torch.__version__
    assert [p["source"] for p in record["rows"][1]["perplexities"]] == ["one", "two"]
    assert record["rows"][1]["perplexities"][0]["value"] == rows[1].perplexities[0].value
    assert "log_difference" not in record["rows"][0]["perplexities"][0]
    for row, entry in zip(rows[1:], record["rows"][1:], strict=True):
        for score, dense, shown in zip(row.perplexities, rows[0].perplexities, entry["perplexities"], strict=True):
            apart = torch.tensor(score.window_nll) - torch.tensor(dense.window_nll)
            assert shown["log_difference"] == pytest.approx(apart.mean().item(), abs=1e-5)
            assert shown["log_difference_stderr"] == pytest.approx(apart.std().item() / len(apart) ** 0.5, rel=1e-3)
            assert shown["versions"]["torch"] == torch.__version__
    for contender in contenders:
        assert check(checkpoint_directory(tmp_path, contender)).ok


def test_a_contender_named_twice_is_refused():
    with pytest.raises(InputError, match=r"wanda\+cg is named twice"):
        make_requests([Contender.parse(name) for name in ("wanda+cg", "wanda", " wanda+cg")], {})


def test_options_go_to_their_method_or_refit():
    contenders = [Contender.parse(name) for name in ("prox-gradient+gd", "wanda+gd", "wanda")]
    requests = make_requests(contenders, {"prox-gradient": {"beta": 1.2}, "gd": {"steps": 7}})
    assert requests[contenders[0]].settings.options == {"beta": 1.2, "refit_steps": 7}
    assert requests[contenders[1]].settings.options == {"refit_steps": 7}
    assert requests[contenders[2]].settings.options == {}
    with pytest.raises(InputError, match=r"'sparsegpt' belong to none of the compared: gd, prox-gradient, wanda$"):
        make_requests(contenders, {"sparsegpt": {"damping": 0.1}})
    tuned = Contender.parse("wanda+block")
    asked = make_requests([*contenders, tuned], {"block": {"epochs": 3}})
    assert asked[tuned].settings.reconstruction == Reconstruction(epochs=3)
    assert asked[contenders[2]].settings.reconstruction is None
    assert make_requests(contenders, {}, min_expert_tokens=5)[contenders[0]].settings.min_expert_tokens == 5


@pytest.mark.parametrize("name", ["model", "method", "pattern", "steps"])
def test_an_option_of_neither_method_nor_refit_is_refused(name):
    message = f"prox-gradient\\+gd has no option '{name}': its options are lambda0, beta, max_iterations, refit_steps"
    with pytest.raises(InputError, match=message):
        make_requests([Contender("prox-gradient", "gd")], {"prox-gradient": {name: 3}})


@pytest.mark.parametrize(
    ("contender", "owner", "option", "value"),
    [
        ("prox-gradient", "prox-gradient", "beta", "abc"),
        ("prox-gradient", "prox-gradient", "lambda0", True),
        ("prox-gradient", "prox-gradient", "max_iterations", True),
        ("sparsegpt", "sparsegpt", "damping", True),
        ("sparsegpt", "sparsegpt", "damping", [1]),
        ("sparsegpt", "sparsegpt", "block_size", True),
        ("wanda+cg", "cg", "tolerance", "x"),
        ("wanda+cg", "cg", "max_iterations", True),
        ("wanda+gd", "gd", "steps", True),
    ],
)
def test_options_of_another_type_are_refused(contender, owner, option, value):
    with pytest.raises(InputError, match=f"{option} .*must be a .*number.*, got "):
        make_requests([Contender.parse(contender)], {owner: {option: value}})


def duel(*names):
    requests = make_requests([Contender.parse(name) for name in names], {}, forward_dtype="float32")
    loaded = LoadedModel(decoder("llama"), None, None)
    return loaded, requests, token_set(0, "calibration"), [token_set(1, "text")]


def test_arguments_are_checked_at_the_call(tmp_path):
    loaded, requests, calibration, texts = duel("magnitude")
    (tmp_path / "magnitude").mkdir()
    (tmp_path / "magnitude" / "file").touch()
    with pytest.raises(InputError, match="is not empty"):
        Comparison(loaded, requests, calibration, texts, out=tmp_path)
    with pytest.raises(InputError, match="nothing to compare"):
        Comparison(loaded, {}, calibration, texts)
    with pytest.raises(InputError, match="forward dtype 'int8'"):
        make_requests([Contender("magnitude", "none")], {}, forward_dtype="int8")
    ids = torch.zeros(1, 100_000, dtype=torch.int64)
    with pytest.raises(InputError, match="exceeds the model's max_position_embeddings"):
        Comparison(loaded, requests, calibration, [TokenSet(ids, "long", hash_ids(ids), 1)])


def test_a_contender_that_fails_has_a_row_and_the_others_go_on(monkeypatch):
    real = comparison.prune_loaded

    def fail_wanda(candidate, data, request, out, **arguments):
        if request.settings.method == "wanda":
            raise FactorisationError("no luck")
        return real(candidate, data, request, out, **arguments)

    monkeypatch.setattr(comparison, "prune_loaded", fail_wanda)
    rows = list(Comparison(*duel("wanda", "magnitude")))
    assert [(row.name, row.error) for row in rows] == [("dense", ""), ("wanda", "no luck"), ("magnitude", "")]
    assert rows[1].perplexities == ()
    assert len(rows[2].perplexities) == 1


def test_the_numbers_of_pruning_survive_a_failed_evaluation(monkeypatch):
    calls = []

    def fail_second(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise InputError("not finite")
        return perplexity(*arguments, **keywords)

    monkeypatch.setattr(comparison, "perplexity", fail_second)
    row = list(Comparison(*duel("magnitude")))[1]
    assert (row.error, row.perplexities) == ("not finite", ())
    assert row.mean_relative_loss > 0.0


def test_seconds_are_those_of_pruning_and_at_most_two_models_live(monkeypatch):
    real, copies, seconds = comparison.prune_loaded, [], []

    def watched(candidate, *arguments, **keywords):
        assert all(copy() is None for copy in copies)
        copies.append(weakref.ref(candidate.model))
        pruned = real(candidate, *arguments, **keywords)
        seconds.append(sum(pruned.report.seconds.values()))
        return pruned

    monkeypatch.setattr(comparison, "prune_loaded", watched)
    heard = []
    loaded, requests, calibration, texts = duel("magnitude", "wanda")
    rows = list(Comparison(loaded, requests, calibration, texts, listen=lambda who, _step: heard.append(str(who))))
    assert len(copies) == 2
    assert [row.seconds for row in rows] == [0.0, *seconds]
    assert [sum(row.phases.values()) for row in rows] == [0.0, *seconds]
    assert all({"capture", "collect", "solve", "replay"} <= row.phases.keys() for row in rows[1:])
    assert list(dict.fromkeys(heard)) == ["magnitude", "wanda"]


def test_writing_checkpoints_is_a_phase_but_no_pruning(tmp_path):
    row = list(Comparison(*duel("magnitude"), out=tmp_path))[1]
    writing = [row.phases[phase] for phase in ("commit", "write", "verify")]
    assert all(seconds > 0.0 for seconds in writing)
    assert row.seconds == pytest.approx(sum(row.phases.values()) - sum(writing))


def test_written_checkpoints_get_reports_and_a_comparison(tmp_path):
    rows = list(Comparison(*duel("magnitude", "wanda"), out=tmp_path))
    for row in rows[1:]:
        (entry,) = json.loads((tmp_path / row.name / "halve-measured.json").read_text())["perplexity"]
        assert (entry["before"], entry["after"]) == (rows[0].perplexities[0].value, row.perplexities[0].value)
        assert f"{entry['after']:.2f}" in (tmp_path / row.name / "report.html").read_text()
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()


def test_a_place_where_the_comparison_cannot_go_is_refused_first(tmp_path):
    (tmp_path / "comparison.html").mkdir()
    with pytest.raises(InputError, match=r"comparison\.html is a directory"):
        Comparison(*duel("magnitude", "wanda"), out=tmp_path)


def test_what_cannot_be_put_on_record_is_a_warning(tmp_path, monkeypatch):
    def full(*_):
        raise HalveError("volume full")

    monkeypatch.setattr(comparison, "add_perplexity", full)
    row = list(Comparison(*duel("magnitude"), out=tmp_path))[1]
    assert row.error == ""
    assert row.warnings[-1] == "pruned and measured, but not put on record: volume full"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_where_faster": 1.5}, "only_where_faster is no option of a comparison: all contenders are pruned alike"),
        ({"keep_dense": "10%"}, "keep_dense is no option of a comparison: all contenders are pruned alike"),
        ({"work": "a"}, "work is no option of a comparison"),
        ({"method": "wanda"}, "method is no option of a comparison: name it with the methods"),
        ({"reconstruct": "block"}, "reconstruct is no option of a comparison"),
        ({"effort": "best"}, "effort belongs to one method or refit: give it in method_options"),
        ({"eval_data": ["a"]}, "texts to measure on are the argument data"),
        ({"evaluation": Evaluation(["a"])}, "texts to measure on are the argument data"),
    ],
)
def test_what_a_comparison_does_not_take_is_refused(checkpoint, text, options, message):
    with pytest.raises(InputError, match=message):
        halve.compare(checkpoint, [text], calibration=text, samples=4, seq_len=16, **options)


def test_a_comparison_checks_the_model_as_prune_does(checkpoint, text):
    asked = {"calibration": text, "samples": 4, "seq_len": 16}
    with pytest.raises(InputError, match="dtype is for a GGUF file or a model in memory"):
        halve.compare(checkpoint, [text], dtype="bfloat16", **asked)
    with pytest.raises(InputError, match="revision 'main' was given, but"):
        halve.compare(checkpoint, [text], revision="main", **asked)


def test_a_comparison_from_names_to_rows(checkpoint, text, tmp_path):
    out, asked = tmp_path / "compared", {"calibration": text, "samples": 4, "seq_len": 16}
    contest = halve.compare(checkpoint, [text], methods=["magnitude", "wanda+cg"], out=out, **asked)
    rows = list(contest)
    assert [row.name for row in rows] == ["dense", "magnitude", "wanda+cg"]
    assert not any(row.error for row in rows)
    assert list(contest) == rows  # nothing is done twice
    assert check(out / "wanda-cg").ok
