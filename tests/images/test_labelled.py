"""Classes of folders and the numbers that a model has for them."""

from types import SimpleNamespace

import pytest
from PIL import Image

from halve.errors import InputError
from halve.images.labelled import labelled_pictures, match_classes
from seen import draw, vit


def knowing(*labels):
    return SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(labels))))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (("cat", "Dog"), ("dog", "CAT"), (1, 0)),
        (("tench, Tinca tinca", "crane", "crane, bird"), ("tinca_tinca", "bird"), (0, 2)),
        (("crane", "crane, bird"), ("crane", "crane, bird"), (0, 1)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("2", "0"), (2, 0)),
        (("1", "0"), ("0", "1"), (1, 0)),  # names go before numbers
    ],
)
def test_classes_are_known_by_name_number_or_order(labels, names, numbers):
    found = match_classes([*names, *names], knowing(*labels), (), "set")
    assert found == dict(zip(names, numbers, strict=True))


def test_a_set_of_as_many_classes_is_known_by_its_order():
    assert match_classes(["x"], knowing("a", "b"), ["y", "x"], "set")["x"] == 1
    assert match_classes(["x"], knowing("LABEL_0", "LABEL_1"), ["y", "x"], "set")["x"] == 1
    assert match_classes(["7"], SimpleNamespace(), (), "set") == {"7": 7}


@pytest.mark.parametrize(
    ("labels", "names", "strange"),
    [
        (("cat", "dog"), ("cat", "cow"), "cow"),
        (("LABEL_0", "LABEL_1"), ("0", "2"), "0"),
        (("a", "b", "c"), ("n01443537", "n01440764"), "n01440764"),
        (("a", "b"), ("n01443537", "n01440764"), "n01440764"),  # two of ImageNet's are not in its order
        (("1", "5"), ("0", "1"), "0"),  # neither all names nor all numbers
    ],
)
def test_a_class_that_the_model_does_not_know_is_named(labels, names, strange):
    with pytest.raises(InputError, match=rf"set has a class '{strange}'.*as its config does \({labels[0]}"):
        match_classes(names, knowing(*labels), (), "set")


def test_the_order_is_not_believed_where_the_model_knows_a_name():
    said = r"class 'cow', and the model knows no such one, nor .*: 'dog' is number 0 of the set and 1 of it: call"
    with pytest.raises(InputError, match=said):
        match_classes(["cow", "dog"], knowing("cat", "dog"), ["dog", "cow"], "set")
    with pytest.raises(InputError, match=said):  # nor where no picture shows the class of that name
        match_classes(["cow"], knowing("cat", "dog"), ["dog", "cow"], "set")
    with pytest.raises(InputError, match="class 'cow', and the model knows no such one: call"):
        match_classes(["cow", "dog"], knowing("cat", "dog"), ["cow", "dog"], "set")


@pytest.mark.parametrize("labels", [("crane, machine", "hen", "crane, bird"), ("crane", "hen", "Crane")])
def test_a_name_of_several_classes_is_refused(labels):
    with pytest.raises(InputError, match=r"class 'crane', and several .* are called so \(0, 2\): call .* numbers"):
        match_classes(["crane", "hen"], knowing(*labels), ["crane", "hen", "x"], "set")
    assert match_classes(["hen"], knowing(*labels), (), "set") == {"hen": 1}


def test_all_folders_of_imagenet_are_known_by_their_order():
    folders = [f"n{number:08d}" for number in range(1000)]
    labels = [f"thing {number}" for number in range(1000)]
    named = match_classes(folders[::-1], knowing(*labels), (), "set")
    assert named == match_classes(folders, SimpleNamespace(num_classes=1000), (), "set")
    assert [named[folder] for folder in folders] == list(range(1000))
    for model, there in [
        (knowing(*labels), folders[1:]),
        (knowing(*labels[1:]), folders[1:]),
        (knowing(*labels, "more"), folders),
        (SimpleNamespace(), folders),
        (knowing(*labels[1:], folders[3]), folders),
    ]:
        with pytest.raises(InputError, match="class 'n0000000"):
            match_classes(there, model, (), "set")


def test_pictures_of_a_folder_have_the_class_of_their_folder(tmp_path):
    found = labelled_pictures(draw(tmp_path), vit())
    assert found.labels == (2,) * 4 + (1,) * 4 + (0,) * 4
    some = labelled_pictures(tmp_path, vit(), 5)
    assert len(some.pictures) == 5
    assert len(set(some.labels)) > 1
    assert labelled_pictures(tmp_path, vit(), 5).listing == some.listing != found.listing
    assert all(f"/{('red', 'green', 'blue')[n]}/" in p.where for p, n in zip(some.pictures, some.labels, strict=True))


def test_a_picture_without_a_class_is_named(tmp_path):
    Image.new("RGB", (2, 2)).save(draw(tmp_path) / "loose.png")
    with pytest.raises(InputError, match=r"loose\.png has no class"):
        labelled_pictures(tmp_path, vit())
