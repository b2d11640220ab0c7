"""A method with what follows it, by one name: ``method[+refit][+block]``."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from halve.errors import InputError
from halve.model.reconstruct import BLOCK
from halve.solve import methods, refit
from halve.solve.settings import OBJECTIVE_OPTIONS


@dataclass(frozen=True)
class Contender:
    """A method with what follows it, written ``method[+refit][+block]``; ``method`` alone is as published.

    Attributes:
        method: name in `halve.solve.methods`.
        refit: ``none``, ``cg``, ``gd``, ``swap`` or ``int4``.
        reconstruct: whether blocks are reconstructed.
    """

    method: str
    refit: str
    reconstruct: bool = False

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Parse ``wanda``, ``wanda+cg``, ``wanda+block`` or ``wanda+cg+block``."""
        named = [name for name in methods.METHODS if f"{text.strip()}+".startswith(f"{name}+")]
        method = max(named, key=len, default="")  # names may have a + of their own, as wanda++
        first, *rest = (part.strip() for part in text.strip()[len(method) :].split("+"))
        method = method or first
        reconstruct = rest[-1:] == [BLOCK]
        rest = rest[:-1] if reconstruct else rest
        if not method or len(rest) > 1 or not all(rest):
            raise InputError(
                f"{text!r} is not a method to compare: write a method (wanda), method+refit (wanda+cg), "
                "or either with +block at the end (wanda+cg+block)"
            )
        return cls(method, rest[0] if rest else "none", reconstruct)

    def check_option_names(self, names: Iterable[str]) -> None:
        """Refuse options that neither the method nor the refit has.

        Args:
            names: of the method's options, and of the refit's with the prefix ``refit_``.

        Raises:
            InputError: the method or the refit is unknown, or has no such option.
        """
        of_refit = [f"refit_{field.name}" for field in fields(refit.get(self.refit).options)]
        known = [*(field.name for field in fields(methods.get(self.method).options)), *of_refit]
        for name in names:
            if name in OBJECTIVE_OPTIONS:
                raise InputError(f"{name} is not an option of {self}: write --{name.replace('_', '-')}")
            if name not in known:
                choice = f"its options are {', '.join(known)}" if known else "it takes none"
                raise InputError(f"{self} has no option {name!r}: {choice}")

    def __str__(self) -> str:
        parts = [self.method, *([self.refit] if self.refit != "none" else []), *([BLOCK] if self.reconstruct else [])]
        return "+".join(parts)
