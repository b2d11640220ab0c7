"""The command for a first taste of a model: ``halve generate``."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli_errors import reporting
from halve.cli_options import DeviceOption, ModelArgument, TrustOption
from halve.cli_values import parse_dtype
from halve.errors import InputError
from halve.terminal import err, say

if TYPE_CHECKING:
    from halve.checkpoint import LoadedModel


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to answer, through the tokenizer's chat template if it has one.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Do not run pruned layers sparse, for comparison.")] = False,
    threads: Annotated[int | None, typer.Option(help="On the CPU.", show_default="as many as torch takes")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: float32, bfloat16, float16.", show_default="the checkpoint's own"),
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Generate text, pruned layers run sparse where that is faster, and say at the end how fast it came."""
    with reporting():
        import torch

        from halve.device import resolve_device
        from halve.options import check_count
        from halve.runtime.load import load
        from halve.runtime.streaming import stream

        place = resolve_device(device)
        if threads is not None:
            check_count("threads", threads)
            torch.set_num_threads(threads)
        loaded = load(model, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code)
        loaded.model.to(place)  # type: ignore[arg-type]
        for note in loaded.notes:
            say(err, note, label="note", style="yellow")
        how = "dense, as asked" if dense else _accelerate(loaded)

        def write(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        done = stream(
            loaded,
            prompt,
            write,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            raw=raw,
        )
        sys.stdout.write("\n")
        speed = done.tokens_per_second
        count = f"{done.new_tokens} token{'' if done.new_tokens == 1 else 's'}"
        rate = "" if speed is None else f" at {speed:.1f} a second"
        say(
            err,
            f"{count}{rate}, the first after {done.first_seconds:.2f} s "
            f"({done.prompt_tokens} tokens of prompt); {torch.get_num_threads()} threads; {how}",
        )


def _accelerate(loaded: "LoadedModel") -> str:
    """Run a model's pruned layers sparse, and return what came of it."""
    from halve.runtime.accelerate import accelerate
    from halve.runtime.linear import SparseLinear
    from halve.runtime.speed import describe

    layers = [module for module in loaded.model.modules() if isinstance(module, SparseLinear)]
    if layers:
        return f"{len(layers)} packed layers; {describe(loaded.model.device)}"
    try:
        done = accelerate(loaded.model, pattern=_pattern(loaded))
    except InputError as error:
        return f"dense: {error}"
    saved = 1 - done.bytes_after / done.bytes_before
    return f"{len(done.swapped)} layers run sparse, {saved:.0%} smaller; {done.kernel}"


def _pattern(loaded: "LoadedModel") -> str:
    """Return the pattern that a checkpoint's record says it was pruned to, 2:4 if it has none."""
    from halve.checkpoint_files import REPORT
    from halve.shards import read_json

    directory = None if loaded.source is None else loaded.source.path
    if directory is None or not (directory / REPORT).is_file():
        return "2:4"
    pattern = read_json(directory / REPORT).get("pattern")
    return pattern if isinstance(pattern, str) else "2:4"
