"""Foresee a run: what it takes of memory and disk, and how long its phases last, from the settings of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from halve.checkpoint import load
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.precision import bytes_in, dtype_to_prune_in
from halve.checkpoint.streamed import ALWAYS, AUTO, NEVER, computed_bytes
from halve.device import weight_dtype
from halve.errors import counted
from halve.forecast import operations
from halve.forecast.needs import Needs, Plan, needs, sums_of
from halve.forecast.operations import Counts
from halve.forecast.rates import Rates, measured_rates
from halve.forecast.shapes import BlockShape, Shapes
from halve.images.positions import picture_size, positions
from halve.images.processor import input_name, sees_pictures
from halve.memory import free_memory, would_fill
from halve.model.blocks import Batch
from halve.model.reconstruct import RATES
from halve.planner.outline import outline
from halve.run.bundles import home_of_sums
from halve.run.executor import cut
from halve.run.phases import Phase
from halve.run.request import Request
from halve.text.calibration import batch_tokens, default_length
from halve.text.tokens import TokenSet

_CPU = torch.device("cpu")
_MEASURED_FOR = 0.2
"""Seconds that each rate of the machine is measured for, where a model is `_LARGE`; less for smaller ones."""
_LARGE = 10**9
"""Bytes."""
_JUDGED = 90.0
"""Passes over a tensor's bytes that its verification takes: hashing, finiteness, the pattern, the original's bytes."""
_STARTS = 2.0
"""Seconds until a model is built, whatever its size."""
_LOADED, _COMMITTED, _WRITTEN = 6.0, 2.0, 3.0
"""How many times the weights are passed over as they are loaded, hashed and looked at; and written where a block is
kept, and where the checkpoint is put together from the blocks, whose hashes are looked at first."""


@dataclass(frozen=True)
class Foreseen:
    """What a run is going to take.

    Attributes:
        shapes: of the model.
        plan: of the run.
        needs: of memory and disk.
        seconds: by phase; empty where nothing was measured.
        rates: of this machine; None where nothing was measured.
        used: bytes that this process has already.
        notes: what is not in the figures, a sentence each.
    """

    shapes: Shapes
    plan: Plan
    needs: Needs
    seconds: Mapping[str, float]
    rates: Rates | None
    used: int
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse a run that cannot fit into the memory that is free.

        Raises:
            InputError: see `Needs.check`.
        """
        device = self.plan.device
        self.needs.check(free_memory(_CPU) + self.used, 0 if device.type == "cpu" else free_memory(device))


def foresee(
    model: nn.Module | Source | str | Path,
    out: Path | None,
    request: Request,
    *,
    rates: Rates | None = None,
    measured: bool = True,
) -> Foreseen:
    """Foresee what pruning a model takes; of one on disk or on the hub, only its settings are read.

    Args:
        model: as for `halve.prune`, or a name in `halve.planner.outline.PRESETS`, or what was found already.
        out: where the checkpoint is going to be put; None where it is not.
        request: what is asked for.
        rates: of the machine; None measures this one.
        measured: whether to measure, where no rates are given; without them nothing is said of time.

    Raises:
        InputError, UnsupportedModelError, CorruptFileError: as `halve.planner.outline.outline`.
    """
    settings = request.settings
    found: nn.Module | Source | str | Path = model
    if isinstance(model, str | Path) and _has_weights(Path(model).expanduser()):
        found = load.resolve(model, trust_remote_code=request.loading.trust_remote_code)
    source = found if isinstance(found, Source) else None
    if isinstance(found, Source):
        skeleton: nn.Module = load.skeleton(found)
    else:
        skeleton = outline(found, trust_remote_code=request.loading.trust_remote_code).skeletons[0]
    dtype = None if isinstance(found, nn.Module) else weight_dtype(skeleton)
    if source is not None:
        dtype = dtype_to_prune_in(source) or torch.float32  # a GGUF file is dequantised
    files = () if source is None else source.shards or (source.path,)
    shapes = Shapes.of(skeleton, dtype=dtype, skip=settings.skip, tower=settings.tower)
    whole = isinstance(found, nn.Module) or out is None or (source is not None and not source.shards)
    directory = None if source is None or source.kind == "gguf" else source.path
    plan, length = _plan(skeleton, shapes, request, directory, keeps=out is not None, streams=not whole)
    output = sum(bytes_in(each, request.loading.written_dtype) for each in skeleton.parameters()) if out else 0
    used = psutil.Process().memory_info().rss
    computed = 0
    if source is not None and not whole:
        computed = computed_bytes(source, skeleton, dtype_to_prune_in(source))  # type: ignore[arg-type]
    wanted = needs(shapes, plan, used, output, computed)
    by_itself = not whole and request.placement.stream == AUTO
    if by_itself and not plan.streamed and sum(wanted.memory.values()) > free_memory(_CPU) + used:
        plan = replace(plan, streamed=True)
        wanted = needs(shapes, plan, used, output, computed)
    notes = _not_in_it(request, skeleton, length)
    if plan.sums_on_host:
        notes.append(
            "the statistics of a block would fill the GPU: its inputs are summed by the processor, in the machine's "
            "memory, which takes longer than is foreseen"
        )
    if rates is None and measured:
        sides = [side for block in shapes.blocks for each in block.bundles for side in (each.d_in, *each.rows)]
        rates = measured_rates(
            plan.device,
            request.placement.precision,
            plan.batch,
            sides,
            files,
            out or Path.cwd(),
            lasting=min(_MEASURED_FOR, _MEASURED_FOR * shapes.size / _LARGE),
        )
    seconds: dict[str, float] = {}
    if rates is not None:
        seconds, uncounted = _seconds(shapes, plan, length, request, rates, output)
        notes += uncounted
        if out is not None and not rates.writing:
            notes.append(f"nothing can be written beside {out}, so that the time of writing is not in it")
    return Foreseen(shapes, plan, wanted, seconds, rates, used, tuple(notes))


def _not_in_it(request: Request, model: nn.Module, length: int) -> list[str]:
    """Return what a run takes besides, or less, as sentences; ``length`` is what a picture is counted as."""
    notes = []
    if sees_pictures(model) and request.uses_calibration:
        notes.append(
            f"a picture counts as {counted(length, 'position')} in every block: a model that makes pictures smaller on "
            "the way takes less"
        )
    if request.placement.workers is not None:
        notes.append("this is what one process takes: workers share the time, and each takes memory of its own")
    if request.calibration.is_self_written and request.uses_calibration:
        notes.append("the time that the model takes to write its own calibration text is not in it")
    return notes


def _has_weights(path: Path) -> bool:
    """Whether there are weights on this disk, not the settings of a model alone."""
    return path.is_file() or any(path.glob("*.safetensors"))


def _plan(
    model: nn.Module, shapes: Shapes, request: Request, directory: Path | None, *, keeps: bool, streams: bool
) -> tuple[Plan, int]:
    """Return what decides what the run takes, and the tokens in a sequence, or the positions of a picture.

    Args:
        model: without its weights.
        shapes: of it.
        request: what is asked for.
        directory: where its settings lie; None where they are not on disk.
        keeps: whether there is an output directory, beside which hidden states may be kept.
        streams: whether its weights could stay on disk.
    """
    settings, placement = request.settings, request.placement
    samples, length = _amount(model, request, directory)
    tokens = samples * length if request.uses_calibration else 0
    experts = any(each.experts > 1 or each.share < 1 for block in shapes.blocks for each in block.bundles)
    matching, tuned = settings.matches_dense and not experts, settings.reconstruction is not None
    most = batch_tokens(placement.target, stepping=tuned)
    chosen = settings.objective.chooses_shrinkage(settings.defaults)
    streamed = streams and (placement.stream == ALWAYS or (placement.stream != NEVER and would_fill(shapes.size)))
    state = round(shapes.inside / max(1, sum(block.count for block in shapes.blocks)))
    hidden = tokens * shapes.width * state * (1 + (matching or tuned))
    beside = 0 if streamed else shapes.size  # what is in memory when the hidden states are recorded
    batch = min(tokens, max(length, most // length * length))
    plan = Plan(
        tokens=tokens,
        batch=batch,
        state=state,
        method=settings.method,
        refit=settings.refit,
        statistics=0 if not request.uses_calibration else 1 + 2 * chosen,
        cross=matching,
        paired=matching or tuned,
        tuned=tuned,
        streamed=streamed,
        offloaded=placement.offload is not None or (keeps and would_fill(beside // 2 + hidden)),
        device=placement.target,
        shards=len(cut(-(-tokens // max(1, batch)), request.calibration.shards)),
    )
    most_sums = max((sums_of(block, plan) for block in shapes.blocks), default=0)
    return replace(plan, sums_on_host=home_of_sums(most_sums, plan.device) != plan.device), length


def _amount(model: nn.Module, request: Request, directory: Path | None) -> tuple[int, int]:
    """Return the number of calibration sequences or pictures, and the tokens or positions in each."""
    source = request.calibration.source
    if isinstance(source, TokenSet):
        return source.samples, source.seq_len
    if isinstance(source, Tensor) and source.ndim == 2:
        return source.shape[0], source.shape[1]
    if isinstance(source, Tensor) and source.ndim == 4:
        return source.shape[0], positions(model, *source.shape[-2:])
    if source is not None and not isinstance(source, str | Path | Tensor):
        return _amount_of_batches(model, source)
    if sees_pictures(model):
        return request.calibration.samples, positions(model, *picture_size(model, directory))
    length = request.calibration.seq_len or default_length(LoadedModel(model, None, None))  # type: ignore[arg-type]
    return request.calibration.samples, length


def _amount_of_batches(model: nn.Module, batches: Sequence[Batch]) -> tuple[int, int]:
    """Return the rows of ready batches, and their most positions; what is wrong with them is told later."""
    rows, longest = 0, 1
    for batch in batches:
        given = batch.get("input_ids", batch.get(input_name(model))) if isinstance(batch, Mapping) else None
        if isinstance(given, Tensor) and given.ndim in (2, 4):
            rows += given.shape[0]
            longest = max(longest, given.shape[1] if given.ndim == 2 else positions(model, *given.shape[-2:]))
    return rows, longest


def _seconds(
    shapes: Shapes, plan: Plan, length: int, request: Request, rates: Rates, output: int
) -> tuple[dict[str, float], list[str]]:
    """Return how long every phase lasts, and what could not be counted."""
    settings = request.settings
    collect, replay, tuning = Counts(), Counts(), Counts()
    solve: Counts | None = Counts()
    for index, block in enumerate(shapes.blocks):
        one_pass = _forward(block, shapes, plan, length)
        collecting_pass = _forward(block, shapes, plan, length, collecting=True)
        matched = plan.cross
        for bundle in block.bundles:
            collect += operations.statistics(bundle, plan.tokens, cross=plan.cross) if plan.tokens else Counts()
            part = operations.solving(
                bundle, settings.method, settings.refit, settings.all_options, shrinkage=plan.statistics > 1
            )
            solve = None if solve is None or part is None else solve + part
        collect += collecting_pass + one_pass.times(matched)
        replay += one_pass.times(int(index + 1 < len(shapes.blocks)) + (plan.paired and not matched))
        if settings.reconstruction is not None:
            epochs, steps = settings.reconstruction.epochs, plan.tokens / max(1, plan.batch)
            step = operations.backward(one_pass) + operations.optimiser(block.count).times(steps)
            tried = len(RATES) if not index and settings.reconstruction.learning_rate is None else 1
            tuning += (step + one_pass.times(settings.reconstruction.held_out)).times(epochs * tried)
    notes = [] if solve is not None else [f"what {settings.method} with refit {settings.refit} takes is not counted"]
    limit = settings.options.get("time_limit")
    of_solving = 0.0 if solve is None else rates.seconds(solve)
    judged = Counts(bytes=_JUDGED * output)
    found = {
        Phase.LOAD: _STARTS + shapes.size / rates.reading + rates.seconds(Counts(bytes=_LOADED * shapes.size)),
        Phase.COLLECT: rates.seconds(collect),
        Phase.SOLVE: max(of_solving, float(limit or 0.0)),  # the first effort is finished, and the rest of it used
        Phase.RECONSTRUCT: rates.seconds(tuning),
        Phase.REPLAY: rates.seconds(replay),
        Phase.COMMIT: _COMMITTED * shapes.inside / rates.writing if output and rates.writing else 0.0,
        Phase.WRITE: _WRITTEN * output / rates.writing if rates.writing else 0.0,
        Phase.VERIFY: output / rates.reading + rates.seconds(judged),
    }
    return {str(phase): value for phase, value in found.items() if value}, notes


def _forward(block: BlockShape, shapes: Shapes, plan: Plan, length: int, *, collecting: bool = False) -> Counts:
    """Count a pass through a block; one that collects leaves out the last matrix, unless some are experts.

    The last one that is defined stands for the last one that is called.
    """
    products, outputs = block.products, float(sum(each.share * each.experts * sum(each.rows) for each in block.bundles))
    if collecting and block.bundles and all(each.experts == each.share == 1 for each in block.bundles):
        products -= block.bundles[-1].rows[-1] * block.bundles[-1].d_in
    return operations.forward(products, plan.tokens, length, shapes.width, outputs)
