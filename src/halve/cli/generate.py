"""The command for a first taste of a model: ``halve generate``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from halve.cli.errors import reporting
from halve.cli.options import DeviceOption, ModelArgument, ThreadsOption, TrustOption
from halve.cli.terminal import counting, err, say
from halve.cli.values import on_threads
from halve.device import parse_dtype
from halve.errors import InputError, counted

if TYPE_CHECKING:
    from halve.checkpoint.load import LoadedModel
    from halve.maths.grid import Bits
    from halve.runtime.heads import Head
    from halve.runtime.quantised_matrix import Values


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to answer, through the tokenizer's chat template if it has one.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Do not run pruned layers sparse, for comparison.")] = False,
    values: Annotated[
        str, typer.Option(help="What pruned layers hold: own (as they are), bf16, int8 or int4 (rounded).")
    ] = "own",
    head: Annotated[
        str, typer.Option(help="What a dense output layer multiplies with: own, or int8 (rounded, on the CPU).")
    ] = "own",
    threads: ThreadsOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: float32, bfloat16, float16.", show_default="the checkpoint's own"),
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Generate text, pruned layers run sparse where that is faster, and say at the end how fast it came."""
    with reporting(), on_threads(threads):
        import torch

        from halve.device import resolve_device
        from halve.packed.load import load
        from halve.runtime.streaming import check_asked, check_prompt, stream

        place = resolve_device(_device_of(model, device, dense=dense))
        check_asked(prompt, max_new_tokens, temperature)
        _check_values(model, values, head, dense=dense)
        say(err, "loading …")
        loaded = load(model, dtype=None if dtype is None else parse_dtype(dtype), trust_remote_code=trust_remote_code)
        loaded.model.to(place)  # type: ignore[arg-type]
        for note in loaded.notes:
            say(err, note, label="note", style="yellow")
        check_prompt(loaded, prompt, max_new_tokens=max_new_tokens, raw=raw)
        how = "dense, as asked" if dense else _accelerate(loaded, values, head)

        def write(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        try:
            done = stream(
                loaded,
                prompt,
                write,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                raw=raw,
            )
        finally:
            write("\n")
        speed = done.tokens_per_second
        if done.new_tokens == 1 < max_new_tokens:
            say(err, "the model ended its answer at once: try another prompt, or --raw", label="note", style="yellow")
        count = counted(done.new_tokens, "token")
        rate = "" if speed is None else f" at {speed:.1f} a second"
        say(
            err,
            f"{count}{rate}, the first after {done.first_seconds:.2f} s "
            f"({counted(done.prompt_tokens, 'token')} of prompt); {counted(torch.get_num_threads(), 'thread')}; {how}",
        )


def _device_of(model: str, device: str, *, dense: bool) -> str:
    """Return where to run, which for a packed checkpoint is the CPU.

    Raises:
        InputError: a packed checkpoint is asked to run elsewhere, or dense.
    """
    from halve.checkpoint.directory import is_packed

    if not is_packed(Path(model).expanduser()):
        return device
    if dense or device not in {"auto", "cpu"}:
        raise InputError(
            f"{model} is packed, and runs sparse on the CPU: restore the plain checkpoint with "
            f"`halve unpack {model} --out DIR`, and generate from that"
        )
    return "cpu"


def _check_values(model: str, values: str, head: str, *, dense: bool) -> None:
    """Check what was asked of a model's values and of its head, before it is loaded.

    Raises:
        InputError: there is no such kind; the model runs dense, or is packed and has the values that it was packed
            with.
    """
    from halve.checkpoint.directory import is_packed
    from halve.maths.pattern import Pattern
    from halve.runtime.heads import Head
    from halve.runtime.quantised_matrix import bits_of

    bits_of(values, Pattern("2:4"))
    if head not in get_args(Head):
        raise InputError(f"--head is {head!r}: give {' or '.join(get_args(Head))}")
    if dense and head != "own":
        raise InputError("--dense rounds nothing: leave --head out")
    if values == "own":
        return
    if dense:
        raise InputError("--dense runs no layer sparse: leave --values out")
    if is_packed(Path(model).expanduser()):
        raise InputError(f"{model} is packed, and runs with the values that it was packed with: leave --values out")


def _accelerate(loaded: "LoadedModel", values: str, head: str) -> str:
    """Run a model's pruned layers sparse, and return what came of it."""
    from halve.runtime.accelerate import accelerate
    from halve.runtime.heads import quantise_head
    from halve.runtime.linear import SparseLinear
    from halve.runtime.speed import describe

    in_head = "" if head == "own" else f", the head in {head}"
    layers = [module for module in loaded.model.modules() if isinstance(module, SparseLinear)]
    if layers:
        bits = cast("Bits | None", layers[0].bits or None)
        if head != "own":
            quantise_head(loaded.model)
        how = _decoding(loaded.decoding)
        return f"{counted(len(layers), 'packed layer')}; {describe(loaded.model.device, bits)}{in_head}{how}"
    try:
        with counting("packing layers", slow=values == "int4") as listen:
            done = accelerate(
                loaded.model,
                pattern=_pattern(loaded),
                values=cast("Values", values),
                head=cast("Head", head),
                listen=listen,
            )
    except InputError as error:
        if values != "own" or head != "own":  # which was asked for in so many words
            raise
        return f"dense: {error}"
    saved = 1 - done.bytes_after / done.bytes_before
    dense = f", {len(done.slower)} left dense that would be no faster" if done.slower else ""
    swapped = counted(len(done.swapped), "layer runs sparse, its", "layers run sparse, their")
    return f"{swapped} weights {saved:.0%} smaller{dense}; {done.kernel}{in_head}{_decoding(done.decoding)}"


def _decoding(reason: str) -> str:
    """Return how next tokens are computed: in one call, or module by module for a reason."""
    return f"; each next token module by module, since {reason}" if reason else ", each next token in one call"


def _pattern(loaded: "LoadedModel") -> str:
    """Return the pattern that a checkpoint's record says it was pruned to, 2:4 if it has none."""
    from halve.recorded import pattern_on_disk

    directory = None if loaded.source is None else loaded.source.path
    found = None if directory is None else pattern_on_disk(directory)
    return "2:4" if found is None else found.text
