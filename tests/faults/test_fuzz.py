from fuzz import SEEDS, fuzz


def test_mutated_files_are_read_or_refused():
    found = fuzz(8_000, seed=1)
    assert sum(found.values()) == 8_000
    for kind in SEEDS:
        assert found[f"{kind} refused"] > 100
    assert found["shard accepted"] > 20
    assert found["json accepted"] > 20
    assert found["manifest accepted"] > 20
