from halve.engines.layer_tally import LayerTally, multiplied_by
from halve.runtime.native import describe


def test_one_line_when_all_layers_are_known():
    said = []
    tally = LayerTally(said.append)
    for name in ("a", "b", "c", "d"):
        tally.expect(name)
    tally.leave("head", "heads are not packed")
    tally.pack("a", 4_000_000, 2_250_000)
    tally.pack("b", 4_000_000, 2_250_000)
    tally.leave("c", "it is not at 2:4")
    assert said == []
    tally.leave("d", "it is not at 2:4")
    (line,) = said
    assert line.split("; ") == [
        "2 of 5 layers packed, 8.0 MB of weights in 4.5 MB",
        "1 dense because heads are not packed: head",
        "2 dense because it is not at 2:4: c, d",
    ]


def test_a_model_without_any_says_so():
    said = []
    tally = LayerTally(said.append)
    tally.expect("a")
    tally.leave("a", "it is not at 2:4")
    assert said == ["0 of 1 layers packed; 1 dense because it is not at 2:4: a"]


def test_what_multiplies_is_that_of_the_device():
    assert multiplied_by("cpu", 8) == describe(8)
    assert multiplied_by("cuda", 8).startswith("sparse tensor cores through torch")
