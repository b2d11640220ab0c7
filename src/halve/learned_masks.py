"""Masks that are learned end to end, with a prior that a local method makes; and masks alone, applied to a model."""

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from halve.checkpoint.directory import CONFIG, is_unfinished
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.load import Source, load_model, resolve
from halve.checkpoint.precision import dtype_to_prune_in
from halve.checkpoint.room import check_destination
from halve.checkpoint.write import write_checkpoint
from halve.errors import HalveError, InputError
from halve.learning import methods as learning_methods
from halve.learning.launch import processes
from halve.learning.lesson import Taught, check_directory
from halve.learning.mask_files import ORDERED_LIKE, REORDERED, masked_names, masks_of_model, put_masks, read_masks
from halve.learning.mask_learning import Learning, check_asked, learn_as, recorded_matrices, view_of
from halve.learning.training.publishing import source_json
from halve.learning.training.watching import Watch
from halve.lookup import find_row
from halve.model.blocks import stand_in_batch
from halve.model.masked import pruned_parameters
from halve.model.survey import plan_model
from halve.option_groups import fill, known_names
from halve.order.reordering import NONE
from halve.provenance import files_sha256, source_fields
from halve.pruning import prune
from halve.recorded import ChannelOrder, channel_order, made_from
from halve.report.card import leave_card
from halve.report.record import mask_facts
from halve.report.training import learned_record, previous_record
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
    return _learn(model, Path(out), _request(options), watch)


def _request(given: Mapping[str, Any]) -> Learning:
    """Return what was asked for, fields and the method's options in one; a ``seed`` is both, if it has one."""
    given = {name: value for name, value in given.items() if value is not None}
    row = learning_methods.get(given.get("method", Learning.method))
    known, own = known_names(Learning), [each.name for each in fields(row.options)]
    if strange := next((name for name in given if name not in known and name not in own), None):
        close = get_close_matches(strange, [*own, *known], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"there is no option {strange!r}: {hint}method {row.name} has {', '.join(own)}, and docs/options.md lists "
            "the others"
        )
    request = fill(Learning, {name: value for name, value in given.items() if name in known})
    return replace(request, options={name: value for name, value in given.items() if name in own})


def resume_learning(call: Mapping[str, Any], out: Path, watch: Watch | None = None) -> Taught:
    """Go on with a training as it was called (`halve.learning.training.state.recorded_training`).

    Raises:
        InputError: it began in another directory, with relative paths; else as `learn`.
    """
    check_directory(call)
    return _learn(call["model"], out, from_plain(Learning, call["request"]), watch)


def _learn(model: str | Path, out: Path, request: Learning, watch: Watch | None) -> Taught:
    prior = request.prior
    if prior is not None and "/" not in prior and not Path(prior).exists():
        find_row(methods.METHODS, prior, "prior, neither a directory nor a local method,")
    if prior in methods.METHODS and not Path(prior).exists():
        check_asked(out, request)
        request = replace(request, prior=str(_made_prior(model, out, request)))
    return learn_as(model, out, request, watch)


def _made_prior(model: str | Path, out: Path, request: Learning) -> Path:
    """Return a checkpoint that a local method has pruned, made now or before.

    Raises:
        InputError: what lies there is of another model, method, pattern or text; or several processes would make it.
    """
    place = out.absolute().with_name(f"{out.name}-prior")
    length = request.text.seq_len
    asked: dict[str, Any] = {
        "pattern": request.pattern,
        "method": request.prior,
        "permute": NONE,  # masks are learned for the model as it is
        "refit": "none",
        "calibration": next((each.source for each in request.text.texts), SELF),
        "samples": max(1, min(_SAMPLES, request.text.wanted // length)),
        "seq_len": length,
        "skip": request.skip,
        "text_field": request.text.text_field,
        "bos": request.text.bos,
    }
    if (place / CONFIG).exists() and not is_unfinished(place):
        source = resolve(model, trust_remote_code=request.machine.trust_remote_code)
        _check_prior(place, asked, files_sha256(source_fields(source)))
        return place
    if processes() > 1:
        raise InputError(
            f"several processes cannot make one prior: make it first with `halve prune`, and give its directory as "
            f"prior instead of {request.prior}"
        )
    prune(
        model,
        place,
        **asked,
        device=request.machine.device,
        forward_dtype=request.machine.forward_dtype,
        attention=request.machine.attention,
        trust_remote_code=request.machine.trust_remote_code,
    )
    return place


def _check_prior(place: Path, asked: Mapping[str, Any], model: str) -> None:
    """Refuse a prior that was made otherwise than this training would make it.

    Args:
        place: the prior's directory.
        asked: how it would be pruned, as `halve.prune` takes it.
        model: sha256 of the model's files.
    """
    record = previous_record(place)
    calibration = record["calibration"]
    is_same = {
        "model": record["source"].get("sha256") == model,
        "method": record["method"] == asked["method"],
        "refit": record["refit"] == asked["refit"],
        "pattern": record["pattern"] == str(asked["pattern"]),
        "skip": record["skip"] == list(asked["skip"]),
        "training": not record.get("trainings"),
    }
    if "sha256" in calibration:  # a method that needs no text was given none
        is_same["text"] = calibration["source"] == asked["calibration"]
        is_same["seq_len"] = calibration["seq_len"] == asked["seq_len"]
    if odd := [name for name, same in is_same.items() if not same]:
        raise InputError(
            f"{place} holds another prior than this training would make (another {' and '.join(odd)}): remove it, "
            "give another out, or give its directory as prior if it is the one that is meant"
        )


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
        dict[str, Any]: the content of ``halve.json`` but for the files' sha256; its warnings also say what there is to
            say of the model card.

    Raises:
        InputError: the masks are of another model, or of this one with its channels in another order, or an argument
            cannot be used.
        CorruptFileError: the file of masks, or one of the model, was damaged.
    """
    place, path = Path(out), Path(masks)
    if not path.is_file():
        raise InputError(f"{masks} is no file: give the file of masks that save_masks named")
    pattern, names = masked_names(path)
    source = resolve(model, trust_remote_code=trust_remote_code)
    described = source_json(source) | made_from(source.path)
    _refuse_reordered(source, path, described)
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
        warnings = _of_other_weights(found.model, described, masks)
        matrices = tuple(each for each in plan.matrices if each.parameter in names)
        others = [each for each in plan.matrices if each.parameter not in names]
        excluded = [{"name": each.name, "shape": list(each.shape), "reason": each.reason} for each in plan.excluded]
        excluded += [
            {"name": each.name, "shape": [each.d_out, each.d_in], "reason": "the file of masks has none for it"}
            for each in others
        ]
        record = learned_record(
            described,
            pattern,
            "masks",
            recorded_matrices(loaded, matrices),
            {each.name: mask_facts(each.name, view_of(loaded.model, each), pattern) for each in matrices},
            excluded,
            None,
            warnings=warnings,
        )
        run.begin({**source_fields(source), "masks": sha256_of(path)}, None, None, {})
        files = write_checkpoint(run.prepare_staging(), loaded, [each.name for each in targets], record)
        verdict = check(run.staging, against=source if source.shards else None, trust_remote_code=trust_remote_code)
        if not verdict.ok:
            raise HalveError(
                f"the checkpoint just written to {run.staging} is wrong, do not use it: {verdict.problems[0]}"
            )
        cards, said = leave_card(run.staging, source)
        run.publish(files | cards)
    return {**record, "warnings": [*record["warnings"], *said]}


def _refuse_reordered(source: Source, masks: Path, given: Mapping[str, Any]) -> None:
    """Refuse masks that were learned for channels in another order than the model's, as far as is on record."""
    learned = masks_of_model(masks)
    alike = {learned.get("sha256", ""), *learned.get(ORDERED_LIKE, "").split()}
    theirs = ChannelOrder(reordered=REORDERED in learned, sha256s=frozenset(alike))
    ours = channel_order(source.path, given["sha256"])
    if not ours.is_that_of(theirs):
        name = learned.get("name", "of an unknown model")
        raise InputError(
            f"channels of {source.name if ours.reordered else name} were reordered, and {masks} was learned for other "
            f"weights ({name}): put the masks onto the model that they were learned for, or onto one with "
            "its order of channels, such as what it was pruned from without reordering"
        )


def _of_other_weights(learned: Mapping[str, str], given: Mapping[str, Any], masks: str | Path) -> tuple[str, ...]:
    """Say that masks fit a model's shapes but were learned for other weights, if so."""
    wanted = learned.get("sha256")
    if wanted == given["sha256"]:
        return ()
    warning = (
        f"{masks} was learned for {learned.get('name', 'another model')} (sha256 {str(wanted)[:12]}…), and "
        f"{given['name']} has other weights (sha256 {given['sha256'][:12]}…): the masks may not suit them"
    )
    return (warning,)
