"""Draw ``docs/house.svg`` from the code: the rooms of ``src/halve`` on their floors, and who imports whom.

    python docs/draw_house.py

The floors are those that ``tests/test_house.py`` holds the imports to; the arrows are read from the imports. Of these,
only such are drawn as do not follow from others: where A imports B and C, and B imports C, the arrow from A to C is
left out. ``tests/test_docs.py`` checks that the picture is what this script draws now.
"""

import ast
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "halve"
PICTURE = ROOT / "docs" / "house.svg"
THE_WAY = (  # of the data through `halve prune`: the room, and what happens there
    ("checkpoint", "a model is read"),
    ("text", "text becomes tokens"),
    ("model", "a block runs, its inputs are summed up"),
    ("solve", "its matrices are pruned"),
    ("run", "the block is kept on disk; the next one"),
    ("checkpoint", "a checkpoint is written"),
    ("verification", "its bytes are checked"),
    ("report", "a record and a page say what was done"),
)
WIDTH, ROOM_WIDTH, ROOM_HEIGHT, FLOOR_HEIGHT, MARGIN = 1030, 118, 34, 74, 30
LEGEND = 330  # on the right
STYLE = """<style>
text { font: 13px sans-serif; fill: #222 }
rect { fill: #fff; stroke: #456 }
circle { fill: #b3541e }
.folder { stroke-width: 2.2 }
.file { stroke-width: 1 }
.import { fill: none; stroke: #9ab; stroke-width: 1.2 }
.title { font-weight: bold }
.number { fill: #fff; font-size: 12px; font-weight: bold }
</style>"""
HEAD = """<defs>
<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#9ab"/>
</marker>
</defs>"""


class Point(NamedTuple):
    x: float
    y: float


def floors() -> tuple[tuple[str, ...], ...]:
    """Return the rooms of every floor, from the ground, as the test of the imports has them."""
    tree = ast.parse((ROOT / "tests" / "test_house.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return tuple(ast.literal_eval(node.value))
    raise LookupError("tests/test_house.py has no FLOORS")


def imports() -> set[tuple[str, str]]:
    """Return every pair of rooms of which the first imports the second."""
    found = set()
    rooms = {room for floor in floors() for room in floor}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "halve":
                names = [f"halve.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found |= {(room, name.split(".")[1]) for name in names if name.startswith("halve.")}
    return {(room, other) for room, other in found if room != other and {room, other} <= rooms}


def needed(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Leave out the pairs that follow from others."""
    below: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in below:
            direct = {other for first, other in pairs if first == room}
            below[room] = direct.union(*(reach(other) for other in direct))
        return below[room]

    return {
        (room, other)
        for room, other in pairs
        if not any(other in reach(middle) for first, middle in pairs if first == room and middle != other)
    }


def places() -> dict[str, Point]:
    """Return the middle of every room."""
    storeys = floors()
    return {
        room: Point(
            MARGIN + (WIDTH - LEGEND - MARGIN) * (number + 0.5) / len(storey),
            MARGIN + FLOOR_HEIGHT * (len(storeys) - 1 - height) + ROOM_HEIGHT / 2,
        )
        for height, storey in enumerate(storeys)
        for number, room in enumerate(storey)
    }


def arrow(start: Point, end: Point) -> str:
    """Draw an import: from the floor of a room down to the ceiling of another."""
    top, bottom = start.y + ROOM_HEIGHT / 2, end.y - ROOM_HEIGHT / 2 - 3
    bend = min(40.0, (bottom - top) / 2)
    path = f"M{start.x:.0f},{top:.0f} C{start.x:.0f},{top + bend:.0f} {end.x:.0f},{bottom - bend:.0f}"
    return f'<path class="import" d="{path} {end.x:.0f},{bottom:.0f}" marker-end="url(#head)"/>'


def box(room: str, middle: Point) -> str:
    """Draw a room; files that stand alone have thinner walls than folders."""
    x, y = middle.x - ROOM_WIDTH / 2, middle.y - ROOM_HEIGHT / 2
    kind = "folder" if (PACKAGE / room).is_dir() else "file"
    name = f"{room}/" if kind == "folder" else f"{room}.py"
    return (
        f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{ROOM_WIDTH}" height="{ROOM_HEIGHT}" rx="4"/>\n'
        f'<text x="{middle.x:.0f}" y="{middle.y + 5:.0f}" text-anchor="middle">{escape(name)}</text>'
    )


def badges(middles: dict[str, Point]) -> list[str]:
    """Number the rooms in the order of the data's way, and say beside the house what happens in each."""
    drawn, seen = [], dict.fromkeys(middles, 0)
    for number, (room, what) in enumerate(THE_WAY, 1):
        x = middles[room].x - ROOM_WIDTH / 2 + 22 * seen[room]
        y = middles[room].y - ROOM_HEIGHT / 2
        seen[room] += 1
        line = MARGIN + 62 + 26 * number
        for left, height in ((x, y), (WIDTH - LEGEND + 30, line)):
            drawn += [
                f'<circle cx="{left:.0f}" cy="{height:.0f}" r="10"/>',
                f'<text class="number" x="{left:.0f}" y="{height + 4:.0f}" text-anchor="middle">{number}</text>',
            ]
        drawn.append(f'<text x="{WIDTH - LEGEND + 48}" y="{line + 5:.0f}">{escape(what)}</text>')
    return drawn


def svg() -> str:
    """Return the picture."""
    middles = places()
    height = 2 * MARGIN + FLOOR_HEIGHT * (len(floors()) - 1) + ROOM_HEIGHT
    left = WIDTH - LEGEND + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The rooms of src/halve on their floors: imports only go down</title>",
            STYLE,
            HEAD,
            f'<rect x="0" y="0" width="{WIDTH}" height="{height}" style="fill:#f7f8fa;stroke:none"/>',
            *(arrow(middles[room], middles[other]) for room, other in sorted(needed(imports()))),
            *(box(room, middle) for room, middle in middles.items()),
            f'<text class="title" x="{left}" y="{MARGIN + 30}">The way of the data</text>',
            f'<text x="{left}" y="{MARGIN + 50}">through “halve prune”:</text>',
            *badges(middles),
            f'<text class="title" x="{left}" y="{MARGIN + 340}">Arrows</text>',
            f'<text x="{left}" y="{MARGIN + 360}">imports; those that follow</text>',
            f'<text x="{left}" y="{MARGIN + 378}">from others are left out</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
