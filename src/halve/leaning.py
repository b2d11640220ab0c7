"""What Halve uses of other libraries that they do not promise to keep: how an entry reads, and whether it still holds.

The tables are in `halve.torch_internals` and `halve.transformers_internals`, the only modules that touch such things;
``docs/leaning.md`` shows them to the reader.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from halve.errors import HalveError


@dataclass(frozen=True, kw_only=True)
class Leaning:
    """One name that another library may take away without notice.

    Attributes:
        path: its module and name, dotted; the attributes of a class follow it.
        use: what it is used for.
        breaks: what no longer works without it.
        test: the test that tells, as a path from the root of the repository.
        parameters: of a function, those that it is called with, in their order.
        on_instances: whether only instances have it, so that it cannot be looked for on the class.
        optional: whether Halve does without it, where a version or a build lacks it.
    """

    path: str
    use: str
    breaks: str
    test: str
    parameters: tuple[str, ...] = ()
    on_instances: bool = False
    optional: bool = False

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    def find(self) -> Any:
        """Return what the path leads to.

        Raises:
            HalveError: nothing is there; the message names it and what breaks.
        """
        owner, rest = _import_longest(self.path)
        for part in rest:
            if not hasattr(owner, part):
                raise HalveError(self._gone())
            owner = getattr(owner, part)
        return owner

    def fault(self) -> str:
        """Return in a sentence why this no longer holds, empty if it does."""
        if self.on_instances:
            return ""
        try:
            found = self.find()
        except HalveError as error:
            return "" if self.optional else str(error)
        if not self.parameters:
            return ""
        known = list(signature(found).parameters)
        if [name for name in known if name in self.parameters] == list(self.parameters):
            return ""
        return (
            f"{self.path} takes {', '.join(known) or 'nothing'} now, and Halve gives it {', '.join(self.parameters)}: "
            f"without it, {self.breaks}"
        )

    def _gone(self) -> str:
        library = self.path.partition(".")[0]
        version = getattr(import_module(library), "__version__", "?")
        return (
            f"{library} {version} has no {self.path}, which Halve needs: without it, {self.breaks}; install a version "
            f"of {library} that pyproject.toml allows"
        )


def faults(table: Iterable[Leaning]) -> list[str]:
    """Return a sentence for each entry that no longer holds."""
    return [fault for entry in table if (fault := entry.fault())]


def _import_longest(path: str) -> tuple[Any, list[str]]:
    """Import as many leading parts of a dotted path as are modules; return the last module and what is left."""
    parts = path.split(".")
    module: Any = import_module(parts[0])
    for number in range(1, len(parts)):
        try:
            module = import_module(".".join(parts[: number + 1]))
        except ImportError:
            return module, parts[number:]
    return module, []
