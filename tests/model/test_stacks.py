import pytest
from torch import nn

from halve.errors import InputError, UnsupportedModelError
from halve.model.stacks import choose_stacks, default_stacks, find_stack, find_stacks
from models import DECODERS, bert, convnext, decoder, encoder_decoder, llava, resnet, vit


@pytest.mark.parametrize("model", [*map(decoder, DECODERS), bert(), vit()])
def test_a_plain_model_has_one_stack(model):
    (stack,) = find_stacks(model)
    assert (stack.name, stack.blocks) == find_stack(model)
    assert len(stack.members) == 3
    assert all(model.get_submodule(name) is block for name, block in stack.members.items())


def test_of_an_image_text_model_the_text_tower_is_chosen_unless_another_is_asked_for():
    model = llava()
    towers = {stack.tower: stack for stack in find_stacks(model)}
    assert set(towers) == {"vision", "text"}
    assert towers["vision"].weights > towers["text"].weights
    assert [stack.tower for stack in default_stacks(model)] == ["text"]
    assert [stack.tower for stack in default_stacks(model, "vision")] == ["vision"]
    assert {stack.tower for stack in default_stacks(model, "all")} == {"vision", "text"}
    with pytest.raises(InputError, match="has no tower 'txt': choose among vision, text, or all"):
        default_stacks(model, "txt")


def test_both_stacks_of_an_encoder_decoder_are_chosen():
    for family in ("t5", "bart", "whisper"):
        model = encoder_decoder(family)
        assert [stack.tower for stack in default_stacks(model)] == ["encoder", "decoder"]
        with pytest.raises(UnsupportedModelError, match="has several stacks of blocks"):
            find_stack(model)


def test_what_did_not_run_is_not_chosen():
    stacks = find_stacks(llava())
    names = {stack.tower: stack.name for stack in stacks}
    (chosen,) = choose_stacks(stacks, "Llava", None, {names["vision"]})
    assert chosen.tower == "vision"
    with pytest.raises(InputError, match=r"no blocks of Llava ran .*: give the inputs that they need"):
        choose_stacks(stacks, "Llava", None, ())


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def test_a_stack_may_have_blocks_without_matrices():
    model = nn.Module()
    model.layers = nn.ModuleList([Block(nn.Linear(8, 8)), Block(nn.Identity()), Block(nn.Linear(8, 8))])
    assert list(find_stacks(model)[0].members) == ["layers.0", "layers.1", "layers.2"]


def test_the_stages_of_a_list_of_lists_are_pruned_together():
    model = nn.Module()
    model.stages = nn.ModuleList([nn.ModuleList([Block(nn.Linear(8, 8)) for _ in range(count)]) for count in (1, 3, 2)])
    model.heads = nn.ModuleList([Block(nn.Linear(16, 12)) for _ in range(2)])
    assert [stack.name for stack in default_stacks(model)] == ["stages.0", "stages.1", "stages.2"]
    assert [list(stack.members) for stack in default_stacks(model)][1] == ["stages.1.0", "stages.1.1", "stages.1.2"]


def test_a_model_without_a_list_of_blocks_is_refused():
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))):
        with pytest.raises(UnsupportedModelError, match="no list of blocks"):
            find_stacks(model)


def stage(count, channels=8):
    return nn.Sequential(*[Block(nn.Conv2d(channels, channels, 3)) for _ in range(count)])


def test_stages_of_convolutions_side_by_side_are_pruned_together():
    model = nn.Module()
    model.stem = nn.Sequential(nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8), nn.ReLU())
    model.layer1, model.layer2 = stage(2), stage(3, 16)
    model.head = nn.Linear(16, 10)
    assert [stack.name for stack in default_stacks(model)] == ["layer1", "layer2"]
    assert {stack.group for stack in default_stacks(model)} == {""}
    assert find_stacks(model)[1].weights == 3 * 16 * 16 * 9


def test_a_stem_of_convolutions_beside_other_blocks_is_no_stage_of_theirs():
    model = nn.Module()
    model.stem, model.layers = stage(2), nn.ModuleList([Block(nn.Linear(64, 64)) for _ in range(3)])
    assert [stack.name for stack in default_stacks(model)] == ["layers"]


def test_a_sequence_of_bare_convolutions_is_no_list_of_blocks():
    model = nn.Module()
    model.layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(UnsupportedModelError, match="no list of blocks with linear layers or convolutions"):
        find_stacks(model)


def test_the_stages_of_a_resnet_and_a_convnext_are_their_blocks():
    for model in (resnet(), convnext()):
        (stack,) = default_stacks(model)
        assert stack.name.endswith("encoder.stages")
        assert len(stack.blocks) == 2
