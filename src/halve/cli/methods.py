"""The command that lists: ``halve methods``."""

from rich.table import Table

from halve.cli.terminal import out
from halve.solve.methods import METHODS


def methods() -> None:
    """List the methods."""
    table = Table("method", "patterns", "statistics", "summary", "reference")
    for entry in METHODS.values():
        patterns = "N:M, S%" if entry.unstructured else "N:M"
        table.add_row(entry.name, patterns, "yes" if entry.needs_statistics else "no", entry.summary, entry.reference)
    out.print(table)
