"""``python -m halve`` is the ``halve`` command."""

from halve.cli import main

main()
