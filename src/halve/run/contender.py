"""A method with what follows it, by one name, ``method[+refit][+block][+keep-dense=…]``; and what several run by."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from halve.errors import InputError
from halve.model.reconstruct import BLOCK, parse_reconstruction
from halve.run.request import Request
from halve.run.settings import Settings
from halve.sensitivity.keep_dense import KeepDense
from halve.solve import methods, refit
from halve.solve.settings import OBJECTIVE_OPTIONS

KEEP_DENSE = "keep-dense"
"""What begins the part of a name that says how much stays dense: ``keep-dense=10%``."""
_NAMED = "name it with the methods, as in wanda+cg+block"
OF_ONE_METHOD = {
    "method": _NAMED,
    "refit": _NAMED,
    "reconstruct": _NAMED,
    "reconstruct_epochs": "give it in method_options, under block",
    "reconstruct_learning_rate": "give it in method_options, under block",
    "reconstruct_held_out": "give it in method_options, under block",
    "only_where_faster": "all contenders are pruned alike",
    "faster_at_batch": "all contenders are pruned alike",
    "work": "a comparison that was stopped is not continued",
    "stream": "the dense model is in memory, and a copy of it is pruned",
    "workers": "contenders are pruned by this process: prune with workers, then use halve report on several",
    "worker_threads": "contenders are pruned by this process",
}
"""Options of `halve.prune` that a comparison does not take, and what to do instead."""


@dataclass(frozen=True)
class Contender:
    """A method with what follows it, ``method[+refit][+block][+keep-dense=…]``; ``method`` alone is as published.

    Attributes:
        method: name in `halve.solve.methods`.
        refit: ``none``, ``cg``, ``gd``, ``swap`` or ``int4``.
        reconstruct: whether blocks are reconstructed.
        keep_dense: how much stays dense, as `halve.sensitivity.keep_dense.KeepDense` has it: ``10%``, ``1.5x``; None
            where the name says nothing of it.
    """

    method: str
    refit: str
    reconstruct: bool = False
    keep_dense: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Parse ``wanda``, ``wanda+cg``, ``wanda+block``, ``wanda+cg+block``, or any with ``+keep-dense=10%`` last.

        Raises:
            InputError: the text is none of these, or the amount that stays dense is none.
        """
        named = [name for name in methods.METHODS if f"{text.strip()}+".startswith(f"{name}+")]
        method = max(named, key=len, default="")  # names may have a + of their own, as wanda++
        first, *rest = (part.strip() for part in text.strip()[len(method) :].split("+"))
        method = method or first
        amount = None
        if rest and rest[-1].startswith(f"{KEEP_DENSE}="):
            amount = KeepDense(rest.pop().removeprefix(f"{KEEP_DENSE}=").strip()).amount
        reconstruct = rest[-1:] == [BLOCK]
        rest = rest[:-1] if reconstruct else rest
        misplaced = any(part.startswith(f"{KEEP_DENSE}=") for part in rest)
        if not method or len(rest) > 1 or not all(rest) or misplaced:
            raise InputError(
                f"{text!r} is not a method to compare: write a method (wanda), method+refit (wanda+cg), "
                f"or either with +block (wanda+cg+block), and +{KEEP_DENSE}=10% at the end where something stays dense"
            )
        return cls(method, rest[0] if rest else "none", reconstruct, amount)

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

    def settings(
        self, common: Settings, options: Mapping[str, Mapping[str, Any]], tokens: int | None = None
    ) -> Settings:
        """Return what this is pruned by.

        Args:
            common: what all contenders have in common.
            options: by name of a method, a refit or ``block``.
            tokens: that damage is measured on, about, where this says itself how much stays dense.

        Raises:
            InputError: a setting is not usable.
        """
        of_refit = {f"refit_{name}": value for name, value in options.get(self.refit, {}).items()}
        own = {**options.get(self.method, {}), **of_refit}
        self.check_option_names(own)
        tuning = parse_reconstruction(BLOCK, **options.get(BLOCK, {})) if self.reconstruct else None
        kept = common.keep_dense
        if self.keep_dense is not None:
            known = KeepDense.tokens if kept is None else kept.tokens
            kept = KeepDense(self.keep_dense, known if tokens is None else tokens)
        return replace(
            common, method=self.method, refit=self.refit, options=own, reconstruction=tuning, keep_dense=kept
        )

    def __str__(self) -> str:
        parts = [self.method, *([self.refit] if self.refit != "none" else []), *([BLOCK] if self.reconstruct else [])]
        return "+".join([*parts, *([] if self.keep_dense is None else [f"{KEEP_DENSE}={self.keep_dense}"])])


def make_requests(
    contenders: Sequence[Contender], method_options: Mapping[str, Mapping[str, Any]], **options: Any
) -> dict[Contender, Request]:
    """Check every contender's settings before any work.

    Args:
        contenders: what to compare.
        method_options: options by name of a method, a refit or ``block``; each contender gets those that concern it.
        **options: those of `halve.prune` that all have in common.

    Raises:
        InputError: a contender is named twice, an option belongs to none, or any setting is not usable.
    """
    if twice := next((contender for contender, count in Counter(contenders).items() if count > 1), None):
        raise InputError(f"{twice} is named twice among the methods to compare: name it once")
    known = {name for contender in contenders for name in (contender.method, contender.refit)} - {"none"}
    if any(contender.reconstruct for contender in contenders):
        known.add(BLOCK)
    if stray := sorted(set(method_options) - known):
        raise InputError(f"options for {stray[0]!r} belong to none of the compared: {', '.join(sorted(known))}")
    for name, instead in OF_ONE_METHOD.items():
        if options.get(name) is not None:
            raise InputError(f"{name} is no option of a comparison: {instead}")
    alone = options.get("keep_dense") is None and any(contender.keep_dense is not None for contender in contenders)
    tokens = options.pop("keep_dense_tokens", None) if alone else None
    common = Request.of(options)
    for name in common.settings.options:
        raise InputError(f"{name} belongs to one method or refit: give it in method_options, by that one's name")
    return {
        contender: replace(common, settings=contender.settings(common.settings, method_options, tokens))
        for contender in contenders
    }
