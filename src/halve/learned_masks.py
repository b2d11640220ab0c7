"""Masks that are learned end to end, with a prior that a local method makes; and masks alone, applied to a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halve.checkpoint.directory import CONFIG
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.load import load_model, resolve
from halve.checkpoint.precision import dtype_to_prune_in
from halve.checkpoint.room import check_destination
from halve.checkpoint.write import write_checkpoint
from halve.errors import HalveError, InputError
from halve.learning.lesson import Taught, check_directory
from halve.learning.mask_files import masked_names, put_masks, read_masks
from halve.learning.mask_learning import Learning, learn_as, recorded_matrices, view_of
from halve.learning.training.publishing import source_json
from halve.learning.training.watching import Watch
from halve.model.blocks import stand_in_batch
from halve.model.masked import pruned_parameters
from halve.model.survey import plan_model
from halve.option_groups import fill, known_names
from halve.provenance import source_fields
from halve.pruning import prune
from halve.report.record import mask_facts
from halve.report.training import learned_record
from halve.run.directory import open_run
from halve.serial import from_plain
from halve.solve import methods
from halve.text.tokens import SELF
from halve.verification import check

_SAMPLES = 64
"""Calibration sequences of a prior."""


def learn(model: str | Path, out: str | Path, *, watch: Watch | None = None, **options: Any) -> Taught:
    """Learn N:M masks, with the weights or without, so that the pruned model says what the dense model says.

    A training that was stopped is continued by the same call. Everything else is an option, a keyword by its flat name:
    ``method="maskllm"``, ``data=["text.jsonl"]``, ``tokens="2M"``, … (docs/options.md). What is an option of the method
    (docs/learned-masks.md) is one too.

    Args:
        model: the dense model, or a pruned checkpoint whose weights the training begins with: a directory, a ``.gguf``
            file, or a hub id.
        out: directory for the pruned checkpoint; it must not exist yet, be empty, or hold the same training,
            unfinished. A prior that a local method makes is kept beside it, in a directory of the same name and
            ``-prior``.
        watch: told what happens.
        **options: fields of `halve.learning.mask_learning.Learning` and its groups, and of the method's options.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        UnsupportedModelError: the model cannot be pruned, or not trained on text.
        ResumeMismatchError: ``out`` holds an unfinished training that began otherwise.
        CorruptFileError: a file of a model, or of the unfinished training, was damaged.
        HalveError: the loss is not finite, or the volume failed.
    """
    known = known_names(Learning)
    own = {name: options.pop(name) for name in list(options) if name not in known}
    request = replace(fill(Learning, options), options=own)
    return _learn(model, Path(out), request, watch)


def resume_learning(call: Mapping[str, Any], out: Path, watch: Watch | None = None) -> Taught:
    """Go on with a training as it was called (`halve.learning.training.state.recorded_training`).

    Raises:
        InputError: it began in another directory, with relative paths; else as `learn`.
    """
    check_directory(call)
    return _learn(call["model"], out, from_plain(Learning, call["request"]), watch)


def _learn(model: str | Path, out: Path, request: Learning, watch: Watch | None) -> Taught:
    if request.prior in methods.METHODS:
        request = replace(request, prior=str(_made_prior(model, out, request)))
    return learn_as(model, out, request, watch)


def _made_prior(model: str | Path, out: Path, request: Learning) -> Path:
    """Return a checkpoint that a local method has pruned, made now or before."""
    place = out.with_name(f"{out.name}-prior")
    if (place / CONFIG).exists():
        return place
    text = next((each.source for each in request.text.texts), SELF)
    length = request.text.seq_len
    prune(
        model,
        place,
        pattern=request.pattern,
        method=request.prior,
        refit="none",
        calibration=text,
        samples=max(1, min(_SAMPLES, request.text.wanted // length)),
        seq_len=length,
        skip=request.skip,
        text_field=request.text.text_field,
        bos=request.text.bos,
        device=request.machine.device,
        forward_dtype=request.machine.forward_dtype,
        attention=request.machine.attention,
        trust_remote_code=request.machine.trust_remote_code,
    )
    return place


def apply_masks(
    model: str | Path, masks: str | Path, out: str | Path, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Put masks that were learned, and kept alone in a file, onto the dense model that they were learned for.

    Args:
        model: the dense model: a directory, a ``.gguf`` file, or a hub id.
        masks: the file (``save_masks`` of `learn`).
        out: directory for the pruned checkpoint; it must not exist yet, or be empty.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        dict[str, Any]: the content of ``halve.json`` but for the files' sha256.

    Raises:
        InputError: the masks are of another model, or an argument cannot be used.
        CorruptFileError: the file of masks, or one of the model, was damaged.
    """
    place, path = Path(out), Path(masks)
    if not path.is_file():
        raise InputError(f"{masks} is no file: give the file of masks that save_masks named")
    pattern, names = masked_names(path)
    source = resolve(model, trust_remote_code=trust_remote_code)
    check_destination(place, source, source.size)
    with open_run(place) as run:
        loaded = load_model(source, dtype=dtype_to_prune_in(source))
        plan, _ = plan_model(
            loaded.model, [stand_in_batch(loaded.model)], pattern, together=loaded.layout.together, least=0.0
        )
        layouts = {each.parameter: each.layout for each in plan.matrices if each.parameter in names}
        targets = list(pruned_parameters(loaded.model, layouts))
        found = read_masks(path, targets)
        put_masks(targets, found.masks)
        matrices = tuple(each for each in plan.matrices if each.parameter in names)
        others = [each for each in plan.matrices if each.parameter not in names]
        excluded = [{"name": each.name, "shape": list(each.shape), "reason": each.reason} for each in plan.excluded]
        excluded += [
            {"name": each.name, "shape": [each.d_out, each.d_in], "reason": "the file of masks has none for it"}
            for each in others
        ]
        record = learned_record(
            source_json(source),
            pattern,
            "masks",
            recorded_matrices(loaded, matrices),
            {each.name: mask_facts(each.name, view_of(loaded.model, each), pattern) for each in matrices},
            excluded,
            None,
        )
        run.begin({**source_fields(source), "masks": sha256_of(path)}, None, None, {})
        files = write_checkpoint(run.prepare_staging(), loaded, [each.name for each in targets], record)
        verdict = check(run.staging, against=source if source.shards else None, trust_remote_code=trust_remote_code)
        if not verdict.ok:
            raise HalveError(
                f"the checkpoint just written to {run.staging} is wrong, do not use it: {verdict.problems[0]}"
            )
        run.publish(files)
    return record
