"""Judge one class of transformers: build a tiny model, prune it, and collect what the judges of `sweep.py` say."""

import copy
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open

import halve
import sweep_masks as masks
import sweep_oracle as oracle
import tiny_inputs
import tiny_models
from halve.model.collect import Collector
from tiny_families import EXPERTS
from tiny_models import Case

_COMMON: dict[str, Any] = {
    "forward_dtype": "float32",
    "device": "cpu",
    "min_expert_tokens": 8,
    "fallback": "magnitude",
    "batch_norm": "keep",  # else passes that end half-way would be among the calls that are judged
}
"""Few tokens reach some experts of a tiny model, and none of the rest may fall back (`_Judge._in_memory`)."""
VERDICTS = ("right", "wrong", "refused", "crash", "not built")


@dataclass
class Result:
    """What came of one class.

    Attributes:
        name: `tiny_models.Case.name`.
        verdict: one of `VERDICTS`.
        stage: what was being done: ``build``, ``wanda``, ``dense targets``, ``files`` or ``pack``.
        reason: of any verdict but right.
        facts: figures of the judgement.
    """

    name: str
    kind: str
    family: str
    cls: str
    verdict: str
    stage: str = ""
    reason: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class _Judge:
    """Judges one class; `verdict` is never raised from, whatever happens inside."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._folder = case, folder
        self.stage = "build"
        self.facts: dict[str, Any] = {}
        self.wrong: dict[str, list[str]] = {}

    def judge(self) -> Result:
        began = time.perf_counter()
        verdict, reason = self._verdict()
        case = self._case
        seconds = round(time.perf_counter() - began, 2)
        return Result(case.name, case.kind, case.family, case.cls, verdict, self.stage, reason, seconds, self.facts)

    def _verdict(self) -> tuple[str, str]:
        try:
            self._run()
        except halve.HalveError as error:
            verdict, reason = "refused", f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - any other error is what the sweep is looking for
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            verdict = "not built" if self.stage == "build" else "crash"
            reason = f"{type(error).__name__}: {error} ({where})"
        else:
            verdict, reason = "right", ""
        if self.wrong:  # what is known to be wrong is worse than a refusal later on
            self.stage = next(iter(self.wrong))
            found = [f"{stage}: {sentence}" for stage, those in self.wrong.items() for sentence in those[:2]]
            return "wrong", "; ".join(found)
        self.stage = "" if verdict == "right" else self.stage
        return verdict, " ".join(reason.split())[:600]

    def _run(self) -> None:
        dense = tiny_models.tiny_model(self._case)
        self.facts["weights"] = sum(parameter.numel() for parameter in dense.parameters())
        batches = tiny_inputs.batches(self._case, dense)
        for batch in batches:
            if not bool(oracle.forward(dense, batch).isfinite().all()):
                raise tiny_models.CannotBuildError("its output is not finite")
        pruned, matrices = self._in_memory(dense, batches)
        self._dense_targets(dense, batches)
        if not self.wrong:
            self._files(dense, pruned, matrices, batches)

    def _in_memory(self, dense: Any, batches: Sequence[Any]) -> tuple[Any, list[masks.Matrix]]:
        """Prune by wanda; judge what blocks were fed, and the masks."""
        self.stage = "wanda"
        done, listening = _prune_listening(dense, batches, method="wanda", refit="none")
        reference = oracle.Reference(dense, done.model, done.report.changed, batches)
        self._take(oracle.judge_streams(listening, reference, dense_too=False))
        matrices = [masks.Matrix.reported(each, done.model) for each in done.report.matrices]
        plain = [m for m, row in zip(matrices, done.report.matrices, strict=True) if row.method == "wanda"]
        self._take(masks.judge_masks(plain, reference, listening.blocks))
        self._take(masks.judge_routers(matrices, done.model, EXPERTS))
        fallen = [row for row in done.report.fallbacks if "reached this expert" not in row.reason]
        if fallen:  # which it would have refused to do, had it not been allowed for experts
            raise halve.HalveError(f"{fallen[0].name}: {fallen[0].reason}")
        self.facts["fell_back"] = len(done.report.fallbacks)
        everything = sum(parameter.numel() for parameter in dense.parameters() if parameter.ndim >= 2)
        self.facts["pruned_share"] = round(sum(m.shape[0] * m.shape[1] for m in done.report.matrices) / everything, 3)
        self.facts["matrices"] = len(matrices)
        self.facts["excluded"] = dict(Counter(entry.reason for entry in done.report.excluded))
        return done.model, matrices

    def _dense_targets(self, dense: Any, batches: Sequence[Any]) -> None:
        """Prune by the default method with targets from the dense model, and judge what blocks were fed."""
        self.stage = "dense targets"
        options: dict[str, Any] = {"method": "auto", "effort": "fast"}
        paired = True
        try:
            done, listening = _prune_listening(dense, batches, **options, match_dense=0.25)
        except halve.HalveError as error:
            if "match_dense" not in str(error):
                raise
            paired = False  # experts do not get the same tokens from both models
            done, listening = _prune_listening(dense, batches, **options)
        reference = oracle.Reference(dense, done.model, done.report.changed, batches)
        self._take(oracle.judge_streams(listening, reference, dense_too=paired))
        self.facts["dense_stream"] = paired

    def _files(self, dense: Any, pruned: Any, matrices: Sequence[masks.Matrix], batches: Sequence[Any]) -> None:
        """Prune the same model from disk to disk, and judge every file."""
        self.stage = "files"
        source, out = self._folder / "dense", self._folder / "pruned"
        cls = type(dense)
        try:
            dense.save_pretrained(source)
            read, known = cls.from_pretrained(source, output_loading_info=True)
        except Exception as error:  # noqa: BLE001 - transformers cannot do it itself
            self.facts["files"] = f"not judged: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        if any(not masks.same_bits(value, read.state_dict()[name]) for name, value in dense.state_dict().items()):
            self.facts["files"] = "not judged: transformers does not read what it wrote of this class"
            return
        halve.prune(source, out, calibration=list(batches), method="wanda", refit="none", **_COMMON)
        found, info = cls.from_pretrained(out, output_loading_info=True)
        for what, names in info.items():
            extra = set(map(str, names)) - set(map(str, known.get(what, ())))
            if extra:
                self._say([f"plain transformers reports {what} {min(extra)}"])
        self._take(masks.judge_untouched(dense, found, pruned, {matrix.parameter for matrix in matrices}))
        self._say(_compare_tensors(source, out))
        if all(len(dense.get_parameter(matrix.parameter).shape) == 4 for matrix in matrices):
            self.facts["packing"] = "not judged: all that was pruned are convolutions"
        else:
            self._pack(out)

    def _pack(self, out: Path) -> None:
        self.stage = "pack"
        packed, again = self._folder / "packed", self._folder / "unpacked"
        halve.pack(out, packed)
        halve.unpack(packed, again)
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        after = {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()}
        needed = {name for name in before if name.endswith((".safetensors", "config.json", ".index.json"))}
        differing = sorted(name for name in needed | set(after) if before.get(name) != after.get(name))
        if differing:
            self._say([f"{differing[0]} is not the same after packing and unpacking"])

    def _say(self, sentences: Iterable[str]) -> None:
        """Note what is wrong at this stage."""
        for sentence in sentences:
            self.wrong.setdefault(self.stage, []).append(sentence)

    def _take(self, findings: oracle.Findings) -> None:
        self._say(findings.wrong)
        self.facts.update(findings.facts)


def _prune_listening(dense: Any, batches: Sequence[Any], **options: Any) -> tuple[halve.Pruned, oracle.Listening]:
    model = copy.deepcopy(dense)
    listening, real = oracle.Listening(model), Collector.end_batch

    def end_batch(collector: Collector) -> bool:
        if spared := real(collector):  # a product was left out
            listening.forget()
        return spared

    try:
        with patch.object(Collector, "end_batch", end_batch):
            done = halve.prune(model, calibration=list(batches), **_COMMON, **options)
    finally:
        listening.close()
    return done, listening


def _compare_tensors(source: Path, out: Path) -> list[str]:
    """Compare weight files tensor by tensor: each is as it was, or some of its entries are zero now."""
    before, after = _tensors_on_disk(source), _tensors_on_disk(out)
    if before.keys() != after.keys():
        return [f"tensor {min(before.keys() ^ after.keys())} is in only one of the two checkpoints"]
    for name, tensor in before.items():
        other = after[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            return [f"tensor {name} has another dtype or shape on disk"]
        if not bool(((tensor == other) | (other == 0)).all()):
            return [f"tensor {name} has changed on disk otherwise than by zeros"]
    return []


def _tensors_on_disk(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


def judge(case: Case) -> Result:
    """Judge a class in this process."""
    with TemporaryDirectory(prefix="halve-sweep-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Judge(case, Path(folder)).judge()
