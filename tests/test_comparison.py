import json
import weakref

import pytest
import torch

import halve
from halve import check, comparison
from halve.checkpoint.load import LoadedModel
from halve.comparison import Comparison, checkpoint_directory
from halve.errors import FactorisationError, HalveError, InputError
from halve.evaluation.perplexity import perplexity
from halve.evaluation.request import Evaluation
from halve.run.contender import Contender, make_requests
from halve.run.events import Progress
from halve.run.phases import Phase
from halve.text.tokens import TokenSet, hash_ids
from models import decoder, tokens
from seen import draw, processor, taught_vit


def token_set(seed, name):
    ids = tokens(seed=seed)
    return TokenSet(ids, name, hash_ids(ids), 1)


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
        ({"keep_dense": "ten"}, "keep_dense = 'ten' is neither a share"),
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


def test_what_stays_dense_is_chosen_once_as_a_run_chooses_it(checkpoint, text, tmp_path, monkeypatch):
    real, times = comparison.choose_dense, []

    def counted(*arguments):
        times.append(arguments[2].keep_dense.amount)
        arguments[4](Progress(0, 0, Phase.DAMAGE, 0, 0, caution=f"beware of {times[-1]}"))
        return real(*arguments)

    monkeypatch.setattr(comparison, "choose_dense", counted)
    asked = {"calibration": text, "samples": 4, "seq_len": 16, "keep_dense_tokens": 32}
    methods = ["wanda", "wanda+keep-dense=30%", "magnitude+keep-dense=30%", "wanda+keep-dense=60%"]
    rows = list(halve.compare(checkpoint, [text], methods=methods, out=tmp_path / "out", **asked))
    assert [row.error for row in rows] == [""] * 5
    assert times == ["30%", "60%"]
    assert ["damage" in row.phases for row in rows] == [False, False, True, True, True]
    assert rows[2].phases["damage"] == rows[3].phases["damage"]
    cautions = [[each for each in row.warnings if each.startswith("beware of")] for row in rows]
    assert cautions == [[], [], ["beware of 30%"], ["beware of 30%"], ["beware of 60%"]]
    alone = halve.prune(checkpoint, method="wanda", refit="none", keep_dense="30%", **asked).record
    record = json.loads((tmp_path / "out" / "wanda-keep-dense-30%" / "halve.json").read_text())
    assert record["keep_dense"] == alone["keep_dense"]
    assert {each["name"] for each in record["matrices"]} == {each["name"] for each in alone["matrices"]}
    assert len(record["matrices"]) < 21
    assert "wanda+keep-dense=60%" in (tmp_path / "out" / "comparison.html").read_text()


def test_a_share_that_holds_no_matrix_fails_one_contender(checkpoint, text):
    asked = {"calibration": text, "samples": 4, "seq_len": 16}
    rows = list(halve.compare(checkpoint, [text], methods=["wanda+keep-dense=0.1%", "wanda"], **asked))
    assert "less than the smallest matrix has" in rows[1].error
    assert rows[2].error == ""


def test_image_classifiers_are_compared_on_pictures(tmp_path):
    model, folder, out = taught_vit(), draw(tmp_path / "pictures"), tmp_path / "out"
    asked = {"calibration": folder, "samples": 6, "tokenizer": processor(), "eval_images": folder}
    asked |= {"forward_dtype": "float32"}
    found = halve.compare(model, methods=["magnitude", "wanda"], out=out, **asked)
    dense, *pruned = list(found)
    assert dense.top_one.value == 1.0
    record = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (record["calibration"]["samples"], record["calibration"]["pictures"]) == (6, ["3 x 8 x 8"])
    page = (out / "comparison.html").read_text()
    for row, entry in zip(pruned, record["rows"][1:], strict=True):
        alone = halve.top_one(out / row.name, folder, image_processor=processor(), forward_dtype="float32")
        assert (row.top_one.right, row.top_one.sha256) == (alone.right, alone.sha256)
        assert entry["top_one"]["top_one"] == alone.value
        assert entry["top_one"]["lost"] == 12 - sum(alone.right)
        (kept,) = json.loads((out / row.name / "halve-measured.json").read_text())["top_one"]
        assert (kept["before"], kept["after"]) == (12, sum(alone.right))
        assert f"<strong>{100 * alone.value:.2f} %</strong>" in page
    assert "top-1 pictures <small>(12 pictures, float32, ViTImageProcessorPil)</small>" in page
    assert "No perplexities" not in page


def test_a_model_that_sees_needs_pictures(tmp_path):
    folder = draw(tmp_path / "pictures")
    with pytest.raises(InputError, match="takes pixel_values, not text: give a folder of pictures"):
        halve.compare(taught_vit(), tokenizer=processor(), eval_images=folder)
    with pytest.raises(InputError, match="there is nothing to compare"):
        halve.compare(taught_vit(), tokenizer=processor(), calibration=folder)
