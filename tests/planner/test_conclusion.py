import pytest

from halve.planner.conclusion import conclusion

BEST = (1.63, "mlp.up_proj", 8)


@pytest.mark.parametrize(
    ("everywhere", "where_faster", "unmeasured", "best", "expected"),
    [
        (
            {1: 1.4233, 8: 1.2, 64: 1.004, 2048: 1.0},
            {1: 1.4233, 8: 1.2, 64: 1.004, 2048: 1.0},
            {},
            BEST,
            (
                "At batch 1, 2:4 makes this model 1.42 times as fast end to end, at batch 8 1.20 times; "
                "no gain at batch 64 and 2048."
            ),
        ),
        ({1: 1.42}, {1: 1.42}, {}, BEST, "At batch 1, 2:4 makes this model 1.42 times as fast end to end."),
        (
            {1: 0.9949, 8: 0.6, 64: 0.996},
            {1: 1.0, 8: 1.0, 64: 1.0},
            {},
            BEST,
            "2:4 makes this model no faster end to end at batch 1 (0.99 times), 8 (0.60 times) and 64.",
        ),
        (
            {1: 1.10, 8: 0.6},
            {1: 1.20, 8: 1.05},
            {},
            BEST,
            (
                "At batch 1, 2:4 makes this model 1.10 times as fast end to end; no gain at batch 8 (0.60 times); "
                "with only the faster matrices sparse 1.20 times at batch 1, 1.05 times at batch 8."
            ),
        ),
        (
            {1: 1.5},
            {1: 1.5},
            {8: "no room", 64: "no room", 2048: "it failed"},
            BEST,
            (
                "At batch 1, 2:4 makes this model 1.50 times as fast end to end; "
                "not measured end to end at batch 8 and 64 (no room); "
                "not measured end to end at batch 2048 (it failed)."
            ),
        ),
        (
            {},
            {},
            {1: "no vocabulary"},
            BEST,
            (
                "Not measured end to end at batch 1 (no vocabulary); single products are up to 1.63 times as fast "
                "(mlp.up_proj at batch 8)."
            ),
        ),
        (
            {},
            {},
            {1: "no vocabulary"},
            (1.0049, "mlp.up_proj", 8),
            "Not measured end to end at batch 1 (no vocabulary); no single product is faster sparse.",
        ),
        ({}, {}, {1: "no room"}, None, "Not measured end to end at batch 1 (no room); no product was measured."),
    ],
)
def test_the_sentence_says_what_came_out(everywhere, where_faster, unmeasured, best, expected):
    assert conclusion("2:4", everywhere, where_faster, unmeasured, best, of_device=False) == expected


def test_on_a_gpu_it_says_which_time_is_meant():
    text = conclusion("2:4", {1: 1.5}, {1: 1.5}, {}, None, of_device=True)
    assert text.endswith("end to end. This is the GPU's own time: what launching its work costs is not counted.")
