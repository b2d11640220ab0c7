"""Running a model from one of its blocks on, against running all of it."""

import pytest
import torch

from halve.errors import InputError
from halve.sensitivity.logits import log_probabilities
from halve.sensitivity.restart import Passage, beginnings
from models import decoder, encoder_decoder, gemma4, pairs, tokens


def members_of(model):
    return list(model.model.layers)


def test_what_comes_out_is_what_the_whole_model_gives():
    model, batch = decoder("llama"), {"input_ids": tokens(2, 8)}
    passage = Passage(members_of(model))
    with passage.recording():
        whole = log_probabilities(model, batch)
    assert passage.order == [0, 1, 2]
    for block in range(3):
        with passage.beginning_at(block):
            assert torch.equal(log_probabilities(model, batch), whole)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with passage.beginning_at(1):
        assert torch.equal(log_probabilities(model, batch), whole)  # the first block is not looked at
    with passage.beginning_at(0):
        assert not torch.allclose(log_probabilities(model, batch), whole)


def test_a_pass_may_begin_at_every_block():
    model = decoder("llama")
    assert beginnings(model, members_of(model), {"input_ids": tokens(2, 8)}) == {0: 0, 1: 1, 2: 2}
    model = encoder_decoder("t5")
    members = [*model.encoder.block, *model.decoder.block]
    assert beginnings(model, members, pairs("t5")) == {index: index for index in range(len(members))}


def test_blocks_that_write_for_later_ones_have_to_run():
    """Of its four blocks the last two read what the first two have left in a mapping."""
    model = gemma4()
    assert beginnings(model, members_of(model), {"input_ids": tokens(2, 8)}) == {0: 0, 1: 0, 2: 0, 3: 0}


def test_what_is_missing_without_an_error_is_noticed_too():
    model = decoder("llama")
    first, last = model.model.layers[0], model.model.layers[2]
    left = []
    first.register_forward_pre_hook(lambda *_: left.clear())
    first.mlp.register_forward_hook(lambda _module, _args, output: left.append(output))

    def add(_module, _args, output):
        return output + left.pop() if left else output

    last.mlp.register_forward_hook(add)
    assert beginnings(model, members_of(model), {"input_ids": tokens(2, 8)}) == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_not_taken_for_a_block_that_has_to_run(error):
    model, passes = decoder("llama"), []

    def fail(_module, _args):
        passes.append(None)
        if len(passes) > 1:
            raise error

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(InputError, match=r"too little memory .* give fewer keep_dense_tokens"):
        beginnings(model, members_of(model), {"input_ids": tokens(2, 8)})
