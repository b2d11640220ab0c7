"""Which files are pictures, and what is said of those that are not."""

import importlib.util

import pytest
from PIL import Image

from halve.errors import InputError
from halve.images import pictures as pictures_module
from halve.images.pictures import check_pillow, chosen, folder_pictures, is_picture_folder, opened
from seen import draw


def test_pictures_are_listed_in_the_order_of_their_paths_with_their_classes(tmp_path):
    draw(tmp_path)
    (tmp_path / "red" / "notes.txt").write_text("none")
    (tmp_path / ".cache").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / ".cache" / "hidden.png")
    (tmp_path / "red" / "deep").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "red" / "deep" / "9.PNG")
    Image.new("RGB", (2, 2)).save(tmp_path / "loose.jpg")
    found = folder_pictures(tmp_path)
    paths = [picture.where.removeprefix(f"{tmp_path}/") for picture in found]
    assert paths == sorted(paths)
    assert [picture.name for picture in found] == ["blue"] * 4 + ["green"] * 4 + [""] + ["red"] * 5
    assert is_picture_folder(str(tmp_path))
    assert not is_picture_folder(tmp_path / "loose.jpg")
    assert not is_picture_folder("c4")


def test_the_choice_is_that_of_the_seed_wherever_the_folder_lies(tmp_path):
    names = []
    for place in ("a", "b/c"):
        folder = draw(tmp_path / place)
        every = folder_pictures(folder)
        names.append([picture.where.removeprefix(str(folder)) for picture in chosen(every, 6, 3, folder)])
    assert names[0] == names[1]
    assert len(set(names[0])) == 6
    other = [picture.where.removeprefix(str(folder)) for picture in chosen(every, 6, 4, folder)]
    assert other != names[1]


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn to the right makes it upright
    image.save(tmp_path / "held.png", exif=turned)
    found = opened(folder_pictures(tmp_path)[0])
    assert found.size == (2, 4)
    assert found.getpixel((1, 0)) == (255, 0, 0)


ORANGE = (200, 100, 50)
OF_ORANGE = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)


@pytest.mark.parametrize(
    ("mode", "colour", "name", "shown"),
    [
        ("1", 1, "x.png", (255,) * 3),
        ("L", 90, "x.png", (90,) * 3),
        ("P", ORANGE, "x.png", ORANGE),
        ("LA", (90, 7), "x.png", (90,) * 3),
        ("RGBA", (*ORANGE, 0), "x.png", ORANGE),  # what is below transparency is shown
        ("CMYK", (55, 155, 205, 0), "x.tif", ORANGE),
        ("I;16", 257 * 90, "x.png", (90,) * 3),
        ("I;16", 257 * 90 + 128, "x.tif", (90,) * 3),
        ("I;16", 257 * 90 + 129, "x.tif", (91,) * 3),
        ("I;16", 65535, "x.png", (255,) * 3),
        ("I;16B", 257 * 90, "x.tif", (90,) * 3),
        ("I;16", 257 * 90, "x.ppm", (90,) * 3),
    ],
)
def test_a_picture_of_any_kind_shows_its_colours(tmp_path, mode, colour, name, shown):
    Image.new(mode, (3, 2), colour).save(tmp_path / name)
    (picture,) = folder_pictures(tmp_path)
    colours, greys = opened(picture), opened(picture, 1)
    assert (colours.mode, greys.mode) == ("RGB", "L")
    assert colours.getpixel((1, 1)) == shown
    assert greys.getpixel((1, 1)) == (OF_ORANGE if shown == ORANGE else shown[0])


@pytest.mark.parametrize(("mode", "said"), [("I", "integers of 32 bits"), ("F", "floating-point numbers")])
def test_numbers_that_are_no_shades_are_refused(tmp_path, mode, said):
    Image.new(mode, (3, 2), 300).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=rf"x\.tif holds {said}, and not shades of 8 or 16 bits: convert it"):
        opened(folder_pictures(tmp_path)[0])


def test_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert opened(folder_pictures(tmp_path)[0]).getpixel((1, 1)) == (255, 0, 0)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"folder .* holds no pictures: expected \.bmp"):
        folder_pictures(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        folder_pictures(tmp_path / "none")


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="has 12 pictures, but samples = 13"):
        chosen(folder_pictures(draw(tmp_path)), 13, 0, tmp_path)


def test_a_broken_picture_is_named(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for picture in folder_pictures(tmp_path):
        with pytest.raises(InputError, match=r"(cut|text)\.png is not a readable picture") as caught:
            opened(picture)
        assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("limit", [9_000, 4_000])  # at twice the limit Pillow no longer only warns
def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, limit):
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    said = rf"large\.png is too large \(10000 pixels, limit {limit}\): scale it down"
    with pytest.raises(InputError, match=said):
        opened(folder_pictures(tmp_path)[0])


def test_pillow_is_asked_for_where_it_is_missing(monkeypatch):
    assert importlib.util.find_spec("PIL") is not None
    monkeypatch.setattr(pictures_module, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"Pillow .* pip install 'halve\[images\]'"):
        check_pillow()
