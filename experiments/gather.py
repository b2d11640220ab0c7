"""Put the tables of all experiments into docs/paper.md and docs/benchmarks.md, or say whether they are the latest.

    python experiments/gather.py [--check]

What stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is replaced by the experiment's Markdown table of the
numbers in ``docs/paper/NAME.json``, where there are any. ``--check`` writes nothing and exits with 1 if a page would
change.
"""

import argparse
import importlib
import re
from pathlib import Path

import results

PAGE = results.DEFAULT_OUT.with_suffix(".md")
PAGES = (PAGE, PAGE.with_name("benchmarks.md"))
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def gathered(text: str, numbers: Path) -> str:
    """Return a page with its tables brought up to date.

    Args:
        text: of the page.
        numbers: directory of the experiments' JSON.
    """

    def filled(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        found = results.load(name, numbers)
        if found is None:
            return match.group()
        table: str = importlib.import_module(name).markdown(found)
        return f"{begin}\n{table}\n\n{end}"

    return _TABLE.sub(filled, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", type=Path, action="append", dest="pages", help="default: both; repeat the flag")
    parser.add_argument("--numbers", type=Path, default=results.DEFAULT_OUT)
    given = parser.parse_args(arguments)
    changed = False
    for page in given.pages or PAGES:
        text = page.read_text(encoding="utf-8")
        latest = gathered(text, given.numbers)
        if text == latest:
            print(f"{page.name} is up to date.")
        elif given.check:
            print(f"{page.name} is not up to date: run python experiments/gather.py")
            changed = True
        else:
            page.write_text(latest, encoding="utf-8")
            print(f"{page.name} has been brought up to date.")
    return int(changed)


if __name__ == "__main__":
    raise SystemExit(main())
