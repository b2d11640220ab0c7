from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from halve.errors import InputError
from halve.option_groups import OptionError, fill, group, internal, known_names, option, options_of


@dataclass(frozen=True)
class Wheels:
    """What it rolls on.

    Attributes:
        number: how many there are, at least
            `halve.garage.LEAST`.
        colour: ``red`` or ``blue``.
    """

    number: int
    colour: str = option("red", shared=True)
    bolts: tuple[int, ...] = internal(())


@dataclass(frozen=True)
class Seats:
    """Where people sit.

    Attributes:
        rows: of seats.
    """

    rows: int = 2
    colour: str = option("red", shared=True)


@dataclass(frozen=True, kw_only=True)
class Car:
    """Everything.

    Attributes:
        name: whatever it is called.

    Raises:
        InputError: never.
    """

    name: str = option("car", name="called")
    seats: Seats = group(factory=Seats)
    wheels: Wheels | None = group(None, prefix="wheel_")
    extras: Sequence[str] = ()


def test_every_field_is_an_option_once_with_its_help():
    options = {each.name: each for each in options_of(Car)}
    assert list(options) == ["called", "rows", "colour", "wheel_number", "extras"]
    assert options["wheel_number"].help == "How many there are, at least LEAST."
    assert options["called"].help == "Whatever it is called."
    assert (options["rows"].default, options["rows"].optional_group) == (2, False)
    assert options["wheel_number"].optional_group
    assert set(known_names(Car)) == {*options, "seats", "wheels"}


def test_a_tree_is_filled_from_flat_names():
    assert fill(Car, {}) == Car()
    assert fill(Car, {"called": "a", "rows": 3}) == Car(name="a", seats=Seats(3))
    assert fill(Car, {"wheel_number": 4, "colour": "blue"}) == Car(seats=Seats(2, "blue"), wheels=Wheels(4, "blue"))
    assert fill(Car, {"colour": "blue"}).wheels is None  # what is shared alone asks for no group
    assert fill(Car, {"rows": None, "wheels": None}) == Car()


def test_a_group_may_be_given_ready():
    assert fill(Car, {"seats": Seats(5), "wheels": Wheels(3)}) == Car(seats=Seats(5), wheels=Wheels(3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"row": 3}, "there is no option 'row': choose one of called, colour, extras, rows"),
        ({"seats": Seats(5), "rows": 3}, "rows is given twice, by itself and in seats: give it once"),
        ({"seats": 5}, r"seats must be a halve\.Seats, got int"),
        ({"bolts": (1,)}, "there is no option 'bolts'"),
    ],
)
def test_what_cannot_be_filled_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        fill(Car, given)


@dataclass(frozen=True)
class Trailer:
    """Attributes: none with a default."""

    length: int
    axles: int = 1


@dataclass(frozen=True)
class Train:
    """What may have a trailer."""

    trailer: Trailer | None = group(None, prefix="trailer_")


def test_a_part_of_an_optional_group_asks_for_what_it_requires():
    assert fill(Train, {"trailer_length": 2}).trailer == Trailer(2)
    message = "trailer_axles goes with trailer_length, which is not given: give it, or neither"
    with pytest.raises(OptionError, match=message) as caught:
        fill(Train, {"trailer_axles": 2})
    assert caught.value.with_flags().startswith("--trailer-axles goes with --trailer-length, which is not given")


@dataclass(frozen=True)
class Clash:
    """Two groups with an option of one name, which neither says it shares."""

    one: Trailer = group(factory=lambda: Trailer(1))
    two: Trailer = group(factory=lambda: Trailer(1))


def test_two_options_of_one_name_are_a_mistake_in_the_classes():
    with pytest.raises(TypeError, match="two groups of Clash have an option length"):
        options_of(Clash)


@dataclass(frozen=True)
class Racing(Seats):
    """Fewer seats.

    Attributes:
        belts: how many points hold each driver.
    """

    belts: int = 4


def test_inherited_options_have_their_help():
    helps = {each.name: each.help for each in options_of(Racing)}
    assert helps["rows"] == "Of seats."
    assert helps["belts"] == "How many points hold each driver."
