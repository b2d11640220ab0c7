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
from halve.forecast.beside import damages, forward_of, norms, ordering
from halve.forecast.needs import Needs, Plan, needs, sums_of
from halve.forecast.operations import Counts
from halve.forecast.rates import Rates, measured_rates
from halve.forecast.resolution import layer_positions
from halve.forecast.shapes import Shapes
from halve.images.positions import picture_size, positions
from halve.images.processor import input_name, sees_pictures
from halve.memory import free_memory, would_fill
from halve.model.blocks import Batch
from halve.model.reconstruct import RATES
from halve.planner.outline import outline
from halve.run.batch_norms import ESTIMATE
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
    directory = None if source is None or source.kind == "gguf" else source.path
    samples, length, sides = _amount(skeleton, request, directory)
    layers = layer_positions(skeleton, *sides) if sides is not None and request.uses_calibration else {}
    shapes = Shapes.of(
        skeleton,
        dtype=dtype,
        skip=settings.skip,
        tower=settings.tower,
        positions={name: count / length for name, count in layers.items()},
    )
    whole = isinstance(found, nn.Module) or out is None or (source is not None and not source.shards)
    plan = _plan(shapes, request, samples, length, keeps=out is not None, streams=not whole, pictures=sides is not None)
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
    notes = _not_in_it(request, shapes, None if sides is None else length, known=bool(layers))
    if plan.sums_on_host:
        notes.append(
            "the statistics of a block would fill the GPU: its inputs are summed by the processor, in the machine's "
            "memory, which takes longer than is foreseen"
        )
    if rates is None and measured:
        widths = [side for block in shapes.blocks for each in block.bundles for side in (each.d_in, *each.rows)]
        rates = measured_rates(
            plan.device,
            request.placement.precision,
            plan.batch,
            widths,
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


def _not_in_it(request: Request, shapes: Shapes, picture: int | None, *, known: bool) -> list[str]:
    """Return what a run takes besides, or less, as sentences.

    Args:
        request: what is asked for.
        shapes: of the model.
        picture: positions that a picture is counted as; None without pictures.
        known: whether it is known how many each layer sees.
    """
    notes = []
    if picture is not None and request.uses_calibration:
        later = "in every block: a model that makes pictures smaller on the way takes less"
        if known:
            later = "of the first hidden state, and in every layer as those that it sees"
        notes.append(f"a picture counts as {counted(picture, 'position')} {later}")
    if request.settings.keep_dense is not None:
        notes.append(
            "blocks of this model leave something for later ones, so that passes for damages are counted through all "
            "of them: fewer keep_dense_tokens take less"
            if shapes.shares
            else "passes for damages are counted from each block on; where a run finds out that they have to begin at "
            "the first one, they take up to twice as long. All matrices are foreseen as pruned"
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
    shapes: Shapes, request: Request, samples: int, length: int, *, keeps: bool, streams: bool, pictures: bool
) -> Plan:
    """Return what decides what the run takes.

    Args:
        shapes: of the model.
        request: what is asked for.
        samples: sequences or pictures.
        length: tokens or positions in each.
        keeps: whether there is an output directory, beside which hidden states may be kept.
        streams: whether its weights could stay on disk.
        pictures: whether samples are pictures, of which damage is measured on whole ones.
    """
    settings, placement = request.settings, request.placement
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
        ordered=settings.reorders,
        normed=settings.batch_norm == ESTIMATE and tokens > 0,
    )
    if settings.keep_dense is not None:
        judged = min(samples, settings.keep_dense.tokens) if pictures else min(tokens, settings.keep_dense.tokens)
        of_one = length if pictures else 1
        in_batch = min(judged * of_one, batch_tokens(placement.target, stepping=False) // of_one * of_one or of_one)
        plan = replace(plan, judged=judged * of_one, judged_batch=in_batch, logits=1.0 / of_one)
    most_sums = max((sums_of(block, plan) for block in shapes.blocks), default=0)
    return replace(plan, sums_on_host=home_of_sums(most_sums, plan.device) != plan.device)


def _amount(model: nn.Module, request: Request, directory: Path | None) -> tuple[int, int, tuple[int, int] | None]:
    """Return the number of calibration sequences or pictures, tokens or positions in each, and a picture's sides.

    Args:
        model: without its weights.
        request: what is asked for.
        directory: where its settings lie; None where they are not on disk.
    """
    source = request.calibration.source
    if isinstance(source, TokenSet):
        return source.samples, source.seq_len, None
    if isinstance(source, Tensor) and source.ndim == 2:
        return source.shape[0], source.shape[1], None
    if isinstance(source, Tensor) and source.ndim == 4:
        return source.shape[0], positions(model, *source.shape[-2:]), (source.shape[-2], source.shape[-1])
    if source is not None and not isinstance(source, str | Path | Tensor):
        return _amount_of_batches(model, source)
    if sees_pictures(model):
        height, width = picture_size(model, directory)
        return request.calibration.samples, positions(model, height, width), (height, width)
    length = request.calibration.seq_len or default_length(LoadedModel(model, None, None))  # type: ignore[arg-type]
    return request.calibration.samples, length, None


def _amount_of_batches(model: nn.Module, batches: Sequence[Batch]) -> tuple[int, int, tuple[int, int] | None]:
    """Return the rows of ready batches, and their most positions; what is wrong with them is told later."""
    rows, longest, sides = 0, 1, None
    for batch in batches:
        given = batch.get("input_ids", batch.get(input_name(model))) if isinstance(batch, Mapping) else None
        if isinstance(given, Tensor) and given.ndim in (2, 4):
            rows += given.shape[0]
            has = given.shape[1] if given.ndim == 2 else positions(model, *given.shape[-2:])
            if given.ndim == 4 and (sides is None or has > longest):
                sides = given.shape[-2], given.shape[-1]
            longest = max(longest, has)
    return rows, longest, sides


def _seconds(
    shapes: Shapes, plan: Plan, length: int, request: Request, rates: Rates, output: int
) -> tuple[dict[str, float], list[str]]:
    """Return how long every phase lasts, and what could not be counted."""
    settings = request.settings
    collect, replay, tuning, estimated, ordered = Counts(), Counts(), Counts(), Counts(), Counts()
    solve: Counts | None = Counts()
    for index, block in enumerate(shapes.blocks):
        one_pass = forward_of(block, shapes, plan.tokens, length)
        collecting_pass = forward_of(block, shapes, plan.tokens, length, collecting=True)
        estimated += norms(block, plan.tokens, one_pass) if plan.normed else Counts()
        ordered += ordering(block, shapes) if plan.ordered else Counts()
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
    chosen = Counts()
    if settings.keep_dense is not None:
        budget = settings.keep_dense.ratio is not None
        chosen = damages(shapes, plan.judged, length, plan.judged * plan.logits, budget=budget)
    notes = [] if solve is not None else [f"what {settings.method} with refit {settings.refit} takes is not counted"]
    limit = settings.options.get("time_limit")
    of_solving = 0.0 if solve is None else rates.seconds(solve)
    judged = Counts(bytes=_JUDGED * output)
    found = {
        Phase.LOAD: _STARTS + shapes.size / rates.reading + rates.seconds(Counts(bytes=_LOADED * shapes.size)),
        Phase.DAMAGE: rates.seconds(chosen),
        Phase.COLLECT: rates.seconds(collect),
        Phase.REORDER: rates.seconds(ordered),
        Phase.SOLVE: max(of_solving, float(limit or 0.0)),  # the first effort is finished, and the rest of it used
        Phase.NORMS: rates.seconds(estimated),
        Phase.RECONSTRUCT: rates.seconds(tuning),
        Phase.REPLAY: rates.seconds(replay),
        Phase.COMMIT: _COMMITTED * shapes.inside / rates.writing if output and rates.writing else 0.0,
        Phase.WRITE: _WRITTEN * output / rates.writing if rates.writing else 0.0,
        Phase.VERIFY: output / rates.reading + rates.seconds(judged),
    }
    return {str(phase): value for phase, value in found.items() if value}, notes
