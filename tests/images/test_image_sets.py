"""Sets of pictures that datasets opens; nothing is asked of the hub."""

import datasets
import pytest
from PIL import Image

from halve.errors import InputError
from halve.images import image_sets
from halve.images.image_sets import is_image_set, set_pictures
from halve.images.labelled import labelled_pictures
from halve.images.pictures import opened
from seen import COLOURS, draw, vit

NAMES = ["blue", "green", "red"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(**columns):
    images = [Image.new("RGB", (4, 4), COLOURS[name]) for name in ("red", "blue", "green", "red")]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    content = {"image": images, "label": [2, 0, 1, 2]} | columns
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def check_colours(source):
    found = labelled_pictures(source, vit())
    assert found.labels == (0, 2, 1, 0)  # by name: the model has another order
    colours = [opened(picture).getpixel((1, 1)) for picture in found.pictures]
    assert colours == [tuple(COLOURS.values())[label] for label in found.labels]


def test_a_saved_set_is_read(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    assert is_image_set(tmp_path / "saved")
    check_colours(tmp_path / "saved")


def test_the_split_is_the_one_named_or_the_one_held_out(tmp_path):
    place = tmp_path / "saved"
    datasets.DatasetDict({"train": table().select([0]), "test": table()}).save_to_disk(place)
    check_colours(place)
    assert len(labelled_pictures(f"{place}:train", vit()).labels) == 1
    with pytest.raises(InputError, match="has the splits train, test, and none called dev"):
        set_pictures(f"{place}:dev")


def test_parquet_files_are_read(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    table().select([0, 1]).to_parquet(folder / "a.parquet")
    table().select([2, 3]).to_parquet(folder / "b.parquet")
    assert is_image_set(folder)
    check_colours(folder)
    assert len(set_pictures(folder / "a.parquet")[0]) == 2


@pytest.mark.parametrize("names", ["{}-00000-of-00001", "{}", "data/{}-0", "{}/0000", "colours.{}"])
def test_parquet_files_of_several_splits_are_kept_apart(tmp_path, names):
    for number, split in enumerate(("train", "test", "validation")):
        file = tmp_path / "files" / f"{names.format(split)}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        table().select([number]).to_parquet(file)
    labels = {"": (1,), ":train": (0,), ":test": (2,), ":validation": (1,)}
    for split, expected in labels.items():
        assert is_image_set(f"{tmp_path / 'files'}{split}")
        assert labelled_pictures(f"{tmp_path / 'files'}{split}", vit()).labels == expected
    with pytest.raises(InputError, match=r"has the splits test, train, validation, and none called dev: give one"):
        set_pictures(f"{tmp_path / 'files'}:dev")


def test_a_file_beside_those_of_splits_is_not_mixed_with_them(tmp_path):
    for name in ("train", "more", "testimony"):
        table().to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="has the splits more, testimony, train: give one"):
        set_pictures(tmp_path)
    assert len(set_pictures(f"{tmp_path}:more")[0]) == 4


def test_a_split_of_what_has_none_is_refused(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    table().to_parquet(tmp_path / "files" / "a.parquet")
    for source in ("saved", "files", "files/a.parquet"):
        with pytest.raises(InputError, match="has no splits, and train is asked for: leave :train out"):
            set_pictures(f"{tmp_path / source}:train")


def test_a_name_on_the_hub_is_asked_for_its_held_out_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table())
    check_colours("org/colours")
    check_colours("org/colours:train")
    assert asked == [("org/colours", "validation"), ("org/colours", "train")]


def test_a_set_that_is_not_there_is_refused(monkeypatch):
    def offline(_name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(InputError, match="'org/none' cannot be opened: ConnectionError: no network; give a folder"):
        set_pictures("org/none")


def test_columns_that_do_not_fit_are_named(tmp_path):
    table().remove_columns("label").save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="has the columns image, and needs one of pictures and one of classes"):
        set_pictures(tmp_path / "saved")


def test_a_picture_without_a_class_is_refused(tmp_path):
    table(label=[0, 1, -1, 2]).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="class -1"):
        set_pictures(tmp_path / "saved")


def test_a_folder_of_pictures_is_no_set(tmp_path):
    assert not is_image_set(draw(tmp_path))
    assert not is_image_set(tmp_path / "none")


def test_datasets_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(image_sets, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'halve\[data\]'"):
        set_pictures("org/colours")
