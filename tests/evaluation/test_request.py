from halve.evaluation.request import overlap


def test_a_text_that_is_both_calibrated_on_and_evaluated_on_is_named():
    said = "c4 is both calibrated on and evaluated on: perplexities on it flatter"
    assert overlap("c4", ["wikitext2", "c4", "c4"]) == said
    assert overlap("c4", ["wikitext2"]) == overlap("c4", []) == overlap(None, ["c4"]) == ""


def test_so_is_a_text_that_was_trained_on():
    assert overlap("c4", ["c4"], used="trained").startswith("c4 is both trained on and evaluated on:")


def test_a_folder_is_the_same_however_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "digits" / "test").mkdir(parents=True)
    (tmp_path / "digits" / "train").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "digits")
    (tmp_path / "c4").mkdir()
    monkeypatch.chdir(tmp_path)
    flatters = "calibrated on: accuracies on it flatter"
    for one, other, said in [
        ("digits", f"{tmp_path}/digits/", f"{tmp_path}/digits/ is both calibrated on and evaluated on: accuracies"),
        ("digits/train/..", "link", "link is both calibrated on"),
        ("digits", "link/test", f"link/test, evaluated on, lies in digits, {flatters}"),
        ("digits/train", "digits", f"digits, evaluated on, holds digits/train, {flatters}"),
    ]:
        assert overlap(one, ["digits2", other], figures="accuracies").startswith(said)
    for one, other in [("digits/train", "digits/test"), (".", "c4"), ("c4", "digits"), ("digits", "digits2")]:
        assert overlap(one, [other]) == ""
