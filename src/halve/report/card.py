"""``README.md``: the model card of a checkpoint, in the format of the hub.

It is made of nothing but what lies beside it — the record, what was measured, the base model's card — so that equal
runs have equal cards, and it can be written again once more is known. It is made to be published: it has no times, and
no directories but those whose names may be of the hub. Of the base model's card, which anybody may have written, single
fields are taken that hold of a pruned model too; nothing in it can stop a run.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from halve.checkpoint.directory import BASE_CARD, CARD, CONFIG, PAGE, card_of_base, is_plain_name, is_sealed, sealed
from halve.checkpoint.durable import sha256_of, write_file, writing
from halve.checkpoint.load import Source
from halve.checkpoint.shards import read_json
from halve.checkpoint.validated import shown
from halve.errors import HalveError, PatternError, counted
from halve.maths.pattern import Pattern
from halve.recorded import Named
from halve.report.facts import RunFacts, read_run
from halve.report.model_index import eval_results
from halve.report.page import write_report
from halve.report.top_one_facts import percent, saw_pictures
from halve.versions import named_versions

CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "base_model")
"""Fields of the base model's card that hold of a pruned model too. Its scores (``model-index``) do not."""
_SINGLE = ("license_name", "license_link", "pipeline_tag")
"""Those of them that are one text."""
_TAGS = ("halve", "pruned", "n:m-sparsity")
_LONGEST = 1 << 19
"""Bytes at the beginning of a card within which its fields have to end."""
_LONGEST_VALUE = 300
_MOST_VALUES = 500
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_IN_HUB_CACHE = re.compile(r"(?:.*/)?models--([^/]+)/snapshots/[^/]+/?")
_ON_A_MACHINE = re.compile(r"file:|[A-Za-z]:[\\/]|[~.\\/]")
_TEXT_FILE = re.compile(r"\.(txt|text|md|jsonl?|csv|tsv|parquet|arrow)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
_FENCE = re.compile(rb"---[ \t]*[\r\n]")
_END_FENCE = re.compile(rb"[\r\n]---[ \t]*(?:[\r\n]|$)")
_CLASS = re.compile(r"[A-Z]\w*")
_VERSIONS = ("halve", "torch", "transformers", "python")


@dataclass(frozen=True)
class BaseCard:
    """What the base model's card says.

    Attributes:
        exists: whether there is one.
        fields: those of `CARRIED` that it has, as text or lists of text.
        note: why no fields could be read, a sentence; empty where they could.
    """

    exists: bool = False
    fields: Mapping[str, str | list[str]] = field(default_factory=dict)
    note: str = ""


def leave_beside(directory: Path, source: Source | None, place: Path | None = None) -> tuple[dict[str, str], list[str]]:
    """Write the report and the card of a checkpoint, which is complete without them: nothing here stops a run.

    Args:
        directory: of the checkpoint.
        source: what it was made from; None for a model that was in memory, or where that is not to be looked at.
        place: where it is going to be; None leaves it where it is.

    Returns:
        tuple[dict[str, str], list[str]]: sha256 of the files written, by name; what there is to say, sentences.
    """
    sums: dict[str, str] = {}
    notes: list[str] = []
    try:
        write_report(directory, place=place)
        sums[PAGE] = sha256_of(directory / PAGE)
    except Exception as error:  # noqa: BLE001  hours may lie behind the checkpoint, and it needs no report
        notes.append(f"the checkpoint is complete, but its report is not written: {_said(error)}")
    cards, said = leave_card(directory, source)
    return sums | cards, [*notes, *said]


def leave_card(directory: Path, source: Source | None) -> tuple[dict[str, str], list[str]]:
    """Write the card alone; as `leave_beside`."""
    notes = [] if source is None or source.kind == "gguf" else [card_of_base(source.path)[1]]
    sums: dict[str, str] = {}
    try:
        notes.append(write_card(directory))
        sums[CARD] = sha256_of(directory / CARD)
    except Exception as error:  # noqa: BLE001  hours may lie behind the checkpoint, and it needs no card
        notes.append(f"the checkpoint is complete, but its model card is not written: {_said(error)}")
    return sums, [note for note in notes if note]


def _said(error: Exception) -> str:
    """Return what an error says, and, where it is none of ours, which it is."""
    return str(error) if isinstance(error, HalveError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def write_card(directory: str | Path) -> str:
    """Write the card of a checkpoint; one that somebody has changed since Halve wrote it stays.

    Args:
        directory: of the checkpoint.

    Returns:
        str: what there is to say of it, a sentence; empty where there is nothing.

    Raises:
        InputError: ``directory`` has no ``halve.json``.
        CorruptFileError: what Halve left there was damaged.
        HalveError: the card could not be written.
    """
    place = Path(directory)
    run, base = read_run(place), read_base(place)
    target = place / CARD
    if target.is_symlink() or (target.exists() and not is_sealed(target)):
        return f"the model card {target} was left as it is: it is not as Halve wrote it"
    with writing(place):
        write_file(target, [card(run, base, _architecture(place))], "card")
    return base.note


def rounded_card(directory: Path, kind: str) -> tuple[bytes | None, str]:
    """Return the card of a checkpoint once its weights are rounded: nothing here stops packing.

    Args:
        directory: of the checkpoint as it is.
        kind: of integers, such as ``int4``.

    Returns:
        tuple[bytes | None, str]: the content, None where it could not be made; and why not, a sentence.
    """
    try:
        run = read_run(directory)
        run = replace(run, rounded=(*run.rounded, kind), perplexity=())
        return card(run, read_base(directory), _architecture(directory)), ""
    except Exception as error:  # noqa: BLE001  a card is no reason not to pack
        return None, f"the packed checkpoint is complete, but has no model card: {_said(error)}"


def card(run: RunFacts, base: BaseCard, architecture: str = "") -> bytes:
    """Return the content of a card.

    Args:
        run: what is on record.
        base: what the base model's card says.
        architecture: name of the model's class; empty where it is not known.
    """
    hub_id, nearest = _hub_id(run.origin), run.origin.made_from is None or _own_hub_id(run.origin) != ""
    title = f"{(hub_id or run.model_name).rpartition('/')[2]}, {run.pattern}"
    data = _metadata(run, base, hub_id, architecture, title)
    named = run.origin if nearest or run.origin.made_from is None else run.origin.made_from
    text = (
        _templates()
        .get_template("card.md.j2")
        .render(
            run=run,
            title=title,
            hub_id=hub_id,
            revision=named.revision,
            through="" if nearest else run.model_name,
            meaning=_meaning(run.pattern),
            accelerate=_accelerate(run.pattern),
            share=_share(run),
            calibration=_calibration(run.calibration),
            cautions=[_without_paths(caution, run) for caution in run.cautions],
            loader=_loader(architecture),
            reader="AutoImageProcessor" if run.sees else "AutoTokenizer",
            licence=_licence(base.fields),
            base_card=BASE_CARD if base.exists else "",
            versions=named_versions({name: run.environment[name] for name in _VERSIONS if name in run.environment}),
        )
    )
    return sealed(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _metadata(run: RunFacts, base: BaseCard, hub_id: str, architecture: str, title: str) -> Any:
    """Return the fields of a card, `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = dict(base.fields)
    if hub_id:
        fields["base_model"] = hub_id
    if "base_model" in fields and run.rounded:
        fields["base_model_relation"] = "quantized"
    elif "base_model" in fields and (run.trainings or run.merged):
        fields["base_model_relation"] = "finetune"  # there is none for a model that was pruned alone
    if architecture.endswith("ForCausalLM"):
        fields.setdefault("pipeline_tag", "text-generation")
    if architecture.endswith("ForImageClassification"):
        fields.setdefault("pipeline_tag", "image-classification")
    unstructured = run.pattern.endswith("%")
    tags = [*_TAGS[:2], "unstructured-sparsity"] if unstructured else [*_TAGS, shown(run.pattern)]
    if results := eval_results(run, _local):
        fields |= {"model_name": title, "eval_results": results}  # of which the hub's card makes `model-index`
    return ModelCardData(library_name="transformers", tags=[*tags, *dict.fromkeys(run.rounded)], **fields)


def read_base(directory: Path) -> BaseCard:
    """Read what the card of the base model says, which lies beside a checkpoint; it never fails."""
    path = directory / BASE_CARD
    if not path.is_file():
        return BaseCard()
    try:
        with path.open("rb") as file:
            found, left = _fields(file.read(_LONGEST))
    except (ValueError, OSError, RecursionError) as error:
        # what is wrong with YAML is a ValueError here, and so is what is no UTF-8
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shown(" ".join(str(error).split()))
        return BaseCard(
            True, {}, f"the fields of {BASE_CARD}, licence and language among them, could not be read: {reason}"
        )
    return BaseCard(True, found, _licence_note(directory, found, left))


def _licence_note(directory: Path, found: Mapping[str, str | list[str]], left: list[str]) -> str:
    """Say what of the licence could not be taken over; empty where all was."""
    said = []
    if left:
        named = ", ".join(f"`{name}`" for name in left)
        said.append(f"{named} of {BASE_CARD} could not be taken over: see to it that the card names the licence")
    link = found.get("license_link", "")
    if link and "://" not in link and not (is_plain_name(link) and (directory / link).is_file()):
        name = shown(repr(link))
        said.append(
            f"the licence file {name}, which {BASE_CARD} names, was not taken along: copy it if terms ask for it"
        )
    return "; ".join(said)


def _fields(content: bytes) -> tuple[dict[str, str | list[str]], list[str]]:
    """Return those of `CARRIED` that a card begins with, and the names of those of the licence that cannot be taken.

    What YAML would make of a value is not asked: ``no`` is a language. And no node is built of others, so that a few
    lines that stand for billions do no harm.

    Raises:
        ValueError: they cannot be read.
    """
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it
        root = yaml.compose(_front_matter(content), Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"they are no YAML ({error})") from error
    if root is not None and root.id != "mapping":
        raise ValueError("they are a list, or a text")
    found: dict[str, str | list[str]] = {}
    left = []
    for key, node in () if root is None else root.value:
        name = _scalar(key)
        values = [value for value in map(_scalar, _inside(node)) if value] if name in CARRIED else []
        if values:
            found[name] = values if node.id == "sequence" and name not in _SINGLE else values[0]
        elif name in CARRIED[:3] and not node.tag.endswith(":null"):
            left.append(name)
    return found, left


def _front_matter(content: bytes) -> str:
    """Return the YAML that a card begins with, between two lines of three dashes; empty where there is none.

    Raises:
        ValueError: it does not end, or is no UTF-8.
    """
    text = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if (opening := _FENCE.match(text)) is None:
        return ""
    first = opening.end()
    end = _END_FENCE.search(text, first - 1)  # the line break of the one fence may be that before the other
    if end is None:
        raise ValueError(f"they do not end within {_LONGEST} bytes")
    return text[first : end.start()].decode()


def _inside(node: Any) -> list[Any]:
    """Return the nodes of a YAML list, or the one node itself."""
    return node.value[:_MOST_VALUES] if node.id == "sequence" else [node]


def _scalar(node: Any) -> str:
    """Return a value of YAML as it is written; empty where it is none, or not one line of moderate length."""
    if node.id != "scalar" or node.tag.endswith(":null"):
        return ""
    line = " ".join(node.value.split())
    return line if line.isprintable() and len(line) <= _LONGEST_VALUE else ""


def _own_hub_id(model: Named) -> str:
    """Return the name on the hub under which a model was read, if it was."""
    name = model.name if model.kind == "hub" else ""
    if model.kind == "directory" and (cached := _IN_HUB_CACHE.fullmatch(model.name)):
        name = cached[1].replace("--", "/", 1)
    return name if _HUB_ID.fullmatch(name) else ""


def _hub_id(origin: Any) -> str:
    """Return the name on the hub of what was pruned, or of what that was made from; empty where none is known."""
    return _own_hub_id(origin) or ("" if origin.made_from is None else _own_hub_id(origin.made_from))


def _meaning(pattern: str) -> str:
    try:
        parsed = Pattern(pattern)
    except PatternError:
        return "zeros stand where the pattern has them"
    if parsed.text.endswith("%"):
        return f"{parsed.text} of the weights of each row of a matrix are zero"
    kept, _, group = parsed.text.partition(":")
    return f"of every {group} weights side by side along a matrix's inputs, at most {kept} are not zero"


def _accelerate(pattern: str) -> str:
    try:
        other = Pattern(pattern).text != "2:4"
    except PatternError:
        other = False
    return f'halve.accelerate(model, pattern="{pattern}")' if other else "halve.accelerate(model)"


def _share(run: RunFacts) -> float | None:
    every = run.weights + run.dense_weights
    return run.weights / every if every > 0 else None


def _calibration(facts: Mapping[str, str]) -> str:
    if "sha256" not in facts:
        return "none was needed"
    source = _code(_local(facts.get("source", "—")))
    what = "pictures" if saw_pictures(facts) else "sequences"
    size = f"{_plain(facts['samples'])} {what}" if facts.get("samples") else what
    length = f" of {_plain(facts['seq_len'])} tokens" if facts.get("seq_len", "—") != "—" else ""
    return f"{source}, {size}{length} (sha256 {_code(facts['sha256'])})"


def _licence(fields: Mapping[str, str | list[str]]) -> str:
    named = fields.get("license_name") or fields.get("license") or ""
    name = ", ".join(named) if isinstance(named, list) else named
    link = fields.get("license_link", "")
    return f"{name} ({link})" if name and link else name


def _loader(architecture: str) -> str:
    if architecture.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    if architecture.endswith("ForImageClassification"):
        return "AutoModelForImageClassification"
    return architecture if _CLASS.fullmatch(architecture) and architecture.isascii() else ""


def _architecture(directory: Path) -> str:
    """Return the name of a checkpoint's class, as its config has it."""
    try:
        named = read_json(directory / CONFIG).get("architectures")
    except HalveError:
        return ""
    return named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else ""


def _without_paths(sentence: str, run: RunFacts) -> str:
    """Return a sentence in which files of this machine have lost their directories."""
    paths = {run.calibration.get("source", ""), *(score.source for score in run.perplexity)}
    paths |= {score.source for score in run.top_one}
    paths |= {source for training in run.trainings for source in training.sources}
    for path in sorted(filter(None, paths), key=len, reverse=True):
        sentence = sentence.replace(path, _local(path))
    return sentence


def _local(name: str) -> str:
    """Return a name without the directories of the machine that it was on.

    One of two parts without the ending of a text file, such as ``allenai/c4``, may be of the hub, and is left.
    """
    if not (_ON_A_MACHINE.match(name) or _TEXT_FILE.search(name)):
        return name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] or name


def _code(text: str) -> str:
    """Return a stranger's text as code in Markdown, also in a table."""
    line = shown(" ".join(text.split())).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else "—"


def _plain(text: str) -> str:
    """Return a stranger's text as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", " ".join(str(text).split()))


def _number(value: float | None) -> str:
    if value is None:
        return "—"
    return "infinite" if math.isinf(value) else f"{value:.3f}"


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("halve.report", "templates"),
        autoescape=False,  # noqa: S701 - Markdown: each text goes through `code` or `plain`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "counted": counted,
        "number": _number,
        "code": _code,
        "plain": _plain,
        "local": _local,
    }
    return environment
