import pytest

from halve.model.plan import part_of, places_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.decoder.layers.0.fc1.weight", "decoder"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "encoder"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "model"),
        ("layers.3.fc.weight", ""),
        ("head.weight", ""),
    ],
)
def test_the_part_of_a_model_is_read_off_the_name(name, part):
    assert part_of(name) == part


def test_kinds_tell_the_parts_apart_where_there_are_several():
    one = ["model.layers.0.fc1.weight", "model.layers.1.fc1.weight"]
    assert places_of(one) == {one[0]: (0, "fc1"), one[1]: (1, "fc1")}
    two = ["model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"]
    assert places_of(two) == {two[0]: (0, "encoder: fc1"), two[1]: (0, "decoder: fc1")}
