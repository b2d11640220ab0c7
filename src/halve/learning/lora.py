"""Adapters that keep a pruned model N:M: LoRA with the mask of its base, and HiRA, as ways to learn.

Stock LoRA adds ``s·BA`` to a matrix, zeros included, and its merge loses the pattern without a word. Here the update is
masked, ``W + M ⊙ (s·BA)`` with M the non-zeros of W, so that the merged matrix has the zeros of the pruned one. HiRA
(Huang et al. 2025), ``W + W ⊙ (BA)``, leaves zeros alone by itself, and is peft's own tuner. Both go through peft, of
the minor version whose private registration of layers is tested (`LEANINGS`); this module is imported where adapters
are asked for, since peft is an optional package.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.checks import check_count, check_positive
from halve.errors import InputError, UnsupportedModelError, first_few
from halve.leaning import Leaning
from halve.learning.adapter import NON_ZEROS, PREFIX, Kind, Update, write_adapter
from halve.learning.learner import Learner
from halve.lookup import find_row
from halve.maths.linalg import is_finite
from halve.model.layers import is_conv1d, is_plain_linear
from halve.model.masked import PrunedParameter

_WANTED = "peft>=0.21,<0.22"

try:
    from peft import HiraConfig, LoraConfig, PeftConfig, inject_adapter_in_model
    from peft.tuners.hira import HiraLayer
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise InputError(f"adapters need {_WANTED}: pip install 'halve[adapters]'") from error

LEANINGS = (
    Leaning(
        path="peft.LoraConfig._register_custom_module",
        use="the masked LoRA layer in place of peft's own",
        breaks="adapters would be trained without the mask, and their merge would lose the pattern",
        test="tests/learning/test_lora.py",
        parameters=("self", "mapping"),
    ),
)

DEFAULT = "default"
"""What peft calls an adapter that has no name."""


def check_peft() -> None:
    """Refuse another peft than the one whose internals were tested.

    Raises:
        InputError: it is another, or not installed as a package.
    """
    try:
        installed = version("peft")
    except PackageNotFoundError:
        installed = "unknown"
    if installed.split(".")[:2] != ["0", "21"]:
        raise InputError(f"adapters need {_WANTED}, and peft {installed} is installed: pip install 'halve[adapters]'")


class MaskedLinear(LoraLinear):
    """peft's LoRA of a linear layer, its update masked by the non-zeros of the layer: ``x (W + M ⊙ s·BA)ᵀ + b``.

    The mask is that of the moment in which the layer is made; it is not saved, since the base has it. Both matrices
    are multiplied as their sum, so that what is computed is what a merge leaves, up to rounding.
    """

    halve_mask: Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        self.fan_in_fan_out = is_conv1d(self._plain)
        self.masked = True
        """Whether the mask counts; without it the layer computes what stock peft would."""
        self.register_buffer("halve_mask", self._plain.weight.detach() != 0, persistent=False)

    @property
    def _plain(self) -> Any:
        return self.get_base_layer()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``M ⊙ s·BA``, as it lies in the layer's weight; peft merges and unmerges with it."""
        delta = super().get_delta_weight(adapter)
        return torch.where(self.halve_mask, delta, 0.0) if self.masked else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output, (…, d_out), of inputs (…, d_in)."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None or self.lora_variant:
            raise InputError("masked LoRA adapters take neither adapter_names nor variants of LoRA: leave them out")
        active = [name for name in self.active_adapters if name in self.lora_A]
        with torch.autocast(x.device.type, enabled=False):  # the update would be rounded before it is added
            deltas = [self.get_delta_weight(name) for name in active]
        dropped = [name for name in active if self.training and isinstance(self.lora_dropout[name], nn.Dropout)]
        if dropped:  # x differs between the two products
            result: Tensor = self.base_layer(x, *args, **kwargs)
            for name, delta in zip(active, deltas, strict=True):
                result = result + self._multiplied(self.lora_dropout[name](x), delta, None).to(result.dtype)
            return result
        return self._multiplied(x, sum(deltas, self._plain.weight), self._plain.bias)

    def _multiplied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x, weight = x.to(self._plain.weight.dtype), weight.to(self._plain.weight.dtype)
        return nn.functional.linear(x, weight.mT if self.fan_in_fan_out else weight, bias)


@dataclass
class MaskedLoraConfig(LoraConfig):
    """A `peft.LoraConfig` whose layers are masked: ``get_peft_model(model, MaskedLoraConfig(…))``, in any trainer.

    What peft saves of it says so in the field ``halve_mask``. Stock peft warns that it does not know that field, leaves
    it out, and computes another function: see docs/adapters.md.
    """

    halve_mask: str = NON_ZEROS

    def __post_init__(self) -> None:
        check_peft()
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.use_dora or self.lora_bias:
            raise InputError("masked LoRA has neither DoRA nor a bias of its own: leave use_dora and lora_bias out")
        from halve.transformers_internals import Conv1D

        self._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an adapter's layer stands: ``leaf`` of ``parent``; the parameter that it belongs to is ``target``."""

    parent: nn.Module
    leaf: str
    target: PrunedParameter

    @property
    def layer(self) -> Any:
        """The adapter's layer, or the plain one that stands there without it."""
        return getattr(self.parent, self.leaf)


class AdapterLearner(Learner):
    """Trains a low-rank adapter of every pruned linear layer, all else frozen; made by `adapter_learner`.

    Attributes:
        kind: ``lora`` or ``hira``.
        notes: sentences on what stays frozen that one might expect to be trained.
    """

    def __init__(
        self, kind: Kind, targets: Sequence[PrunedParameter], rank: int, alpha: float, seed: int, base: str
    ) -> None:
        plain = [each for each in targets if each.leaf == "weight" and is_plain_linear(each.owner)]
        names = {each.name for each in plain}
        others = [each.name for each in targets if each.name not in names]
        if not plain:
            have = f" ({first_few(others)} are none)" if others else ""
            raise InputError(
                f"the model has no pruned linear layer that an adapter could be put on{have}: train all weights instead"
            )
        self.kind: Kind = kind
        self.notes: tuple[str, ...] = ()
        if others:
            self.notes = (f"{first_few(others)} stay frozen: adapters are for plain linear layers",)
        self._targets = tuple(plain)
        self._rank, self._alpha, self._seed, self._base = rank, alpha, seed, base
        self._model: nn.Module | None = None
        self._places: tuple[_Place, ...] = ()
        self._flags: dict[nn.Parameter, bool] = {}
        self._config: dict[str, Any] = {}
        self._updates: dict[str, Update] = {}
        self._off_mask = 0.0
        self._held_out: tuple[float, float] | None = None

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Put the adapters on, and return their parameters; the model's own no longer require gradients.

        Raises:
            UnsupportedModelError: peft puts adapters on other layers than were meant.
        """
        check_peft()
        wanted = {each.name.rpartition(".")[0]: each for each in self._targets}
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        config = self._peft_config(sorted(wanted))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the layout of some layers, which it finds out by itself
            torch.manual_seed(self._seed)
            inject_adapter_in_model(config, model)
        self._model, self._config = model, config.to_dict()
        found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        self._places = tuple(_place(model, name, wanted[name]) for name in found if name in wanted)
        strange = sorted(found.keys() ^ wanted.keys())
        if strange:
            self.detach()
            raise UnsupportedModelError(
                f"peft and Halve do not mean the same layers of {type(model).__name__} by the name {strange[0]}: train "
                "all weights instead"
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        return trained

    def _peft_config(self, modules: list[str]) -> PeftConfig:
        conv1d = all(is_conv1d(each.owner) for each in self._targets)
        common: dict[str, Any] = {
            "target_modules": modules,
            "base_model_name_or_path": self._base or None,
            "fan_in_fan_out": conv1d,
            "r": self._rank,
        }
        if self.kind == "hira":
            return HiraConfig(**common)
        return MaskedLoraConfig(**common, lora_alpha=self._alpha)  # type: ignore[arg-type]

    def look_back(self, measure: Callable[[], float]) -> None:
        """Measure the adapter with the mask, and as stock peft would compute it."""
        masked = measure()
        with self.unmasked():
            self._held_out = (masked, measure())

    def finish(self) -> None:
        """Merge the adapters into the parameters, pruned zeros as they were, and take them off.

        Raises:
            UnsupportedModelError: an adapter is not finite; nothing was merged.
        """
        self._keep_updates()
        for module, update in self._updates.items():
            if not all(is_finite(each) for each in (update.first, update.second)):
                self.detach()
                raise UnsupportedModelError(f"the adapter of {module} is not finite: train with a lower learning rate")
        for place in self._places:
            target = place.target
            weight = target.inputs_last(target.tensor.data)
            weight.copy_(self._updates[target.name.rpartition(".")[0]].merged(weight, masked=True))
        self.detach()

    def detach(self) -> None:
        """Take the adapters off and merge nothing."""
        for place in self._places:
            setattr(place.parent, place.leaf, place.layer.get_base_layer())
        if self._model is not None and hasattr(self._model, "peft_config"):
            del self._model.peft_config
        for parameter, flag in self._flags.items():
            parameter.requires_grad = flag
        self._places, self._model = (), None

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Let the attached model compute what stock peft, which has no mask, makes of the adapter; HiRA's is the same.

        Measured in here, a perplexity says how far the adapter loaded by stock peft is from the merged model.
        """
        layers = [place.layer for place in self._places if isinstance(place.layer, MaskedLinear)]
        for layer in layers:
            layer.masked = False
        try:
            yield
        finally:
            for layer in layers:
                layer.masked = True

    @property
    def effect(self) -> str:
        """What was measured of the adapter with the mask and without it; empty before the training has ended."""
        if self._held_out is None or self.kind != "lora":
            return ""
        masked, stock = self._held_out
        return (
            f"On held-out text, the loss of the model with the mask is {masked:.4f} nats a token, and {stock:.4f} with "
            "the same adapter loaded by stock peft."
        )

    def save_adapter(self, directory: str | Path, effect: str = "", *, again: bool = False) -> None:
        """Save the adapter as peft does, with a card that says what stock peft makes of it.

        Args:
            directory: absent or empty.
            effect: sentences on what was measured of the adapter with the mask and without it (`unmasked`).
            again: whether an adapter may lie there, to be replaced.

        Raises:
            InputError: the directory holds something, or no adapter was attached.
            HalveError: the volume is full or failed.
        """
        self._keep_updates()
        if not self._updates:
            raise InputError("there is no adapter yet: attach it, and train")
        first, second = ("lora_A.weight", "lora_B.weight") if self.kind == "lora" else ("hira_A", "hira_B")
        tensors = {}
        for module, update in self._updates.items():
            tensors[f"{PREFIX}{module}.{first}"] = update.first
            tensors[f"{PREFIX}{module}.{second}"] = update.second
        config = {**self._config, "inference_mode": True}
        config = {name: sorted(each) if isinstance(each, set) else each for name, each in config.items()}
        write_adapter(Path(directory).expanduser(), config, tensors, self._card(effect), again=again)

    def _keep_updates(self) -> None:
        """Copy the adapters as they are now; after `finish` there is only the copy."""
        if not self._places:
            return
        lost = total = 0.0
        for place in self._places:
            layer, target = place.layer, place.target
            if isinstance(layer, HiraLayer):
                update = Update(kind="hira", first=_kept(layer.hira_A[DEFAULT]), second=_kept(layer.hira_B[DEFAULT]))
            else:
                update = Update(
                    kind="lora",
                    first=_kept(layer.lora_A[DEFAULT].weight),
                    second=_kept(layer.lora_B[DEFAULT].weight),
                    scaling=layer.scaling[DEFAULT],
                )
                squares = (update.second @ update.first).square()
                mask = target.inputs_last(layer.halve_mask).cpu()
                lost, total = lost + float(squares[~mask].sum()), total + float(squares.sum())
            self._updates[target.name.rpartition(".")[0]] = update
        self._off_mask = lost / total if total else 0.0

    def _card(self, effect: str) -> str:
        head = ["---", *([f"base_model: {self._base}"] if self._base else []), "library_name: peft", "tags:"]
        tags = ["- halve", "- N:M sparsity", f"- {self.kind}", "---", ""]
        body = _HIRA_CARD if self.kind == "hira" else _LORA_CARD.format(share=self._off_mask)
        measured = ["", "## Measured", "", effect.strip()] if effect.strip() else []
        return "\n".join([*head, *tags, body.strip(), *measured, ""])


_LORA_CARD = """
# A LoRA adapter with a mask

This adapter was trained on a pruned model with the mask of its weights: a matrix is `W + M ⊙ (s·BA)`, where M marks the
non-zeros of W. **Stock peft has no mask.** It warns of a field `halve_mask` that it does not know, adds `s·BA` to the
zeros too, and so computes a *different function*; its merge also loses the N:M pattern. Of the squared norm of the
update, {share:.1%} lies on pruned weights, where the mask drops it and stock peft does not.

The trained model is what this gives, with the pattern kept:

    halve merge ADAPTER --into PRUNED --out DIR
"""
_HIRA_CARD = """
# A HiRA adapter

This adapter was trained on a pruned model: a matrix is `W + W ⊙ (BA)`, which leaves zeros alone. Stock peft computes
the same function, and its merge keeps the N:M pattern. So does this, which checks it on the bytes written:

    halve merge ADAPTER --into PRUNED --out DIR
"""


def _kept(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _place(model: nn.Module, name: str, target: PrunedParameter) -> _Place:
    path, _, leaf = name.rpartition(".")
    return _Place(parent=model.get_submodule(path), leaf=leaf, target=target)


_KINDS: Mapping[str, Kind] = {"lora": "lora", "hira": "hira"}


def adapter_learner(
    kind: str,
    targets: Sequence[PrunedParameter],
    rank: int = 16,
    alpha: float | None = None,
    *,
    seed: int = 0,
    base: str = "",
) -> AdapterLearner:
    """Return a way to learn by adapters that keep the zeros of pruned matrices.

    Args:
        kind: ``lora``, masked, or ``hira``.
        targets: the pruned parameters; those that are no weight of a plain linear layer, such as fused experts, stay
            frozen, and ``notes`` of the learner say so.
        rank: of every update, >= 1.
        alpha: updates of LoRA are multiplied by alpha / rank; None makes that 1. HiRA has none.
        seed: of the first values of A; B begins at zero, so that the model begins as it is.
        base: name of the pruned model, for the adapter's config and card.

    Raises:
        InputError: peft is another version than was tested, a value is out of range, or no target is a linear layer.
    """
    check_peft()
    known = find_row(_KINDS, kind, "adapter")
    check_count("rank of the adapter", rank)
    if alpha is not None and known == "hira":
        raise InputError("hira has no alpha: leave it out, or take lora")
    if alpha is not None:
        check_positive("alpha of the adapter", alpha)
    return AdapterLearner(known, targets, rank, float(rank if alpha is None else alpha), seed, base)
