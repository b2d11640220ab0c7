"""The house as `docs/architecture.md` draws it: rooms on floors, imports that only go down, names that hide nothing."""

import ast
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import pytest

import halve

PACKAGE = Path(halve.__file__).parent
FLOORS = (
    ("errors",),
    ("leaning",),
    ("torch_internals", "transformers_internals", "memory"),
    ("device", "checks", "lookup", "option_groups", "versions"),
    ("maths",),
    ("solve", "checkpoint"),
    ("model",),
    ("images", "order"),
    ("text", "recorded", "provenance", "serial"),
    ("evaluation", "runtime", "sensitivity"),
    ("packed", "planner"),
    ("run", "engines"),
    ("report", "verification", "forecast"),
    ("whole_model", "learning"),
    ("workers", "judging"),
    ("pruning", "comparison", "merging"),
    ("learned_masks", "packing"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FRONT = {"__init__", "__main__"}
"""What stands before the house: the public names, and ``python -m halve``."""


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(tree):
    """Yield the rooms that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail("imports are written in full, so that this test can read them")
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "halve":
            names = [f"halve.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("halve."))


def imports():
    """Return the files behind every import from one room into another."""
    found = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        for other in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
            if other != room and room not in FRONT:
                found[room, other].add(str(path.relative_to(PACKAGE)))
    return found


IMPORTS = imports()


def test_every_room_has_its_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - FRONT
    assert rooms == FLOOR.keys()


@pytest.mark.parametrize(("room", "other"), list(permutations(FLOOR, 2)))
def test_imports_only_go_down(room, other):
    if FLOOR[room] <= FLOOR[other]:
        assert not IMPORTS[room, other], f"{room} must not import {other}"


def test_the_reading_of_imports_sees_something():
    assert "run/loop.py" in IMPORTS["run", "model"]
    assert len(IMPORTS) > 50


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=lambda path: path.name
)
def test_a_room_says_what_it_is_for_and_hands_nothing_on(folder):
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    if folder.name not in {"methods", "kernels", "halve"}:
        assert len(tree.body) == 1, "re-exports are for halve/__init__.py alone"
        assert 4 <= len(files) <= 15  # few enough to be seen at a glance
        assert not [path for path in files if path.stem in {"utils", "base", "helpers", "common"}]


def test_no_public_name_is_the_name_of_a_module():
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert not modules & set(halve.__all__)
    assert not modules & {"learn", "finetune", "merge", "compare"}  # names that are kept free for the public


def test_every_public_name_is_there():
    assert sorted(halve.__all__) == halve.__all__ == dir(halve)
    for name in halve.__all__:
        assert getattr(halve, name).__module__.startswith("halve.")
