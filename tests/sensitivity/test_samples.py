"""What damage is measured on."""

from itertools import pairwise

import pytest
import torch

from halve import memory
from halve.errors import InputError
from halve.sensitivity.samples import Samples, positions_of, working
from halve.text.tokens import TokenSet, hash_ids
from models import decoder, encoder_decoder, pairs, tokens, vit


def of_rows(rows, length, wanted, most=1024, model=None):
    model = decoder("llama") if model is None else model
    ids = torch.arange(rows)[:, None].repeat(1, length)
    return Samples.of(TokenSet(ids, "tokens", hash_ids(ids), rows), model, wanted, most)


def rows_of(batches):
    return [row for batch in batches for row in batch["input_ids"][:, 0].tolist()]


@pytest.mark.parametrize(
    ("rows", "length", "wanted", "taken", "cut"),
    [
        (32, 512, 512, 4, 128),  # four sequences at even distances
        (32, 64, 512, 4, 64),
        (4, 2048, 512, 2, 256),  # fewer sequences, so longer ones
        (2, 2048, 512, 1, 512),
        (1, 2048, 512, 1, 512),
        (9, 200, 512, 4, 128),
    ],
)
def test_of_text_rows_at_even_distances_are_cut(rows, length, wanted, taken, cut):
    found = of_rows(rows, length, wanted)
    judging, held_out = rows_of(found.judging), rows_of(found.held_out)
    assert len(judging) == taken
    assert len(held_out) == (0 if rows == 1 else taken)
    assert not set(judging) & set(held_out)
    assert all(batch["input_ids"].shape[1] == cut for batch in (*found.judging, *found.held_out))
    both = sorted([*judging, *held_out])
    assert len({b - a for a, b in pairwise(both)}) <= 1


def test_a_batch_holds_as_many_as_it_may():
    assert [len(batch["input_ids"]) for batch in of_rows(32, 512, 512, most=300).judging] == [2, 2]


def test_of_pairs_and_batches_the_first_are_taken_as_they_are():
    batches = [pairs("t5", seed=seed) for seed in range(4)]
    assert positions_of(batches[0]) == 4 * 19
    found = Samples.of(batches, encoder_decoder("t5"), 76 + 20, 1024)
    assert found.judging[0] == batches[0]
    assert len(found.judging) == 2
    for name, value in batches[1].items():
        assert torch.equal(found.judging[1][name], value[:2])  # of 19 tokens each
    assert not found.held_out
    images = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]
    taken = Samples.of(images, vit(), 5, 1024).judging
    assert [len(batch["pixel_values"]) for batch in taken] == [4, 1]
    apart = [{"input_ids": tokens(4, 8), "pixel_values": torch.randn(2, 3, 16, 16)}]
    assert Samples.of(apart, decoder("llama"), 5, 1024).judging == apart


def test_perplexity_needs_a_causal_model_and_other_text():
    model = decoder("llama")
    of_rows(2, 8, 8, model=model).check_held_out(model)
    for found, other in (
        (of_rows(1, 8, 8, model=model), model),
        (Samples([pairs("t5")]), encoder_decoder("t5")),
        (of_rows(4, 8, 8, model=model), vit()),
    ):
        with pytest.raises(InputError, match=f"for this {type(other).__name__}: give a share, such as 10%"):
            found.check_held_out(other)


def test_a_float32_model_is_not_copied_and_another_is():
    model, cpu = decoder("llama"), torch.device("cpu")
    with working(model, cpu) as copied:
        assert copied is model
    model = model.to(torch.bfloat16)
    with working(model, cpu) as copied:
        assert copied.dtype == torch.float32
        with torch.no_grad():
            moved = copied(input_ids=tokens(1, 8)).logits - model.float()(input_ids=tokens(1, 8)).logits
    assert not moved.any()


def test_too_little_memory_for_the_copy_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1)
    copying = working(decoder("llama").to(torch.bfloat16), torch.device("cpu"))
    with pytest.raises(InputError, match=r"a float32 copy need .* with skip instead of keep_dense"):
        copying.__enter__()
