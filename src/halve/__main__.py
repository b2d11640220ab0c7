"""``python -m halve`` is the ``halve`` command."""

from halve.cli.app import main

main()
