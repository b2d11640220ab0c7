from halve.evaluation.request import overlap


def test_a_text_that_is_both_calibrated_on_and_evaluated_on_is_named():
    said = "c4 is both calibrated on and evaluated on: perplexities on it flatter"
    assert overlap("c4", ["wikitext2", "c4", "c4"]) == said
    assert overlap("c4", ["wikitext2"]) == overlap("c4", []) == overlap(None, ["c4"]) == ""


def test_so_is_a_text_that_was_trained_on():
    assert overlap("c4", ["c4"], used="trained").startswith("c4 is both trained on and evaluated on:")
