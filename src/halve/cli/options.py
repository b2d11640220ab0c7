"""Arguments and options that several commands share, with their help texts."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="A directory, a .gguf file, or a Hugging Face hub id.")]
PatternOption = Annotated[str, typer.Option(help="N:M keeps N of every M weights; S% zeroes S percent of a row.")]
CalibrationOption = Annotated[
    str, typer.Option(help="A .txt, .jsonl or .parquet file, a directory, c4, wikitext2, or self (the model writes).")
]
SamplesOption = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLenOption = Annotated[
    int | None, typer.Option(help="Tokens in a sequence.", show_default="2048, or the model's maximum if less")
]
SeedOption = Annotated[
    int, typer.Option(help="Of the choice among documents; a .txt file is one, and read from its start.")
]
FieldOption = Annotated[str, typer.Option(help="Text field of .jsonl and .parquet files.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
ForwardOption = Annotated[str, typer.Option(help="Products of forward passes: auto, float32 or bfloat16.")]
SkipOption = Annotated[list[str] | None, typer.Option(help="Leave parameters dense, e.g. '*.down_proj.*'. Repeatable.")]
FallbackOption = Annotated[
    str | None,
    typer.Option(help="magnitude or wanda, where the asked method fails; default: stop there."),
]
OffloadOption = Annotated[Path | None, typer.Option(help="Keep hidden states in this directory, not in memory.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="Written dtype for GGUF input: float32 (default), bfloat16, float16.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Stop where a method fails; else as with --fallback magnitude.")
]
ExpertOption = Annotated[int, typer.Option(help="With --fallback, experts with fewer tokens are pruned by magnitude.")]
ShrinkageOption = Annotated[
    str | None,
    typer.Option(
        help="How far statistics are shrunk to their diagonal: 0 to 1, or auto (by held-out loss).",
        show_default="auto for method auto, else 0",
    ),
]
MatchOption = Annotated[
    float | None,
    typer.Option(
        help="How far targets are the dense model's outputs, 0 to 1.",
        show_default="0.25 for method auto but with --effort fast, else 0; 0 with experts",
    ),
]
RidgeOption = Annotated[float, typer.Option(help="Holds the weights of such targets near the dense ones.")]
FasterOption = Annotated[
    float | None,
    typer.Option(help="Leave matrices dense that are not this many times as fast sparse on this machine."),
]
FasterBatchOption = Annotated[
    int | None, typer.Option(help="Of --only-where-faster: rows of the products measured.", show_default="1")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Of the CPU.", show_default="as torch chooses")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it first.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
