"""How far a pruned language model comes back: fine-tuned against the dense model, and masks learned, at equal tokens.

One table for a machine and a sitting. Every stage appends a JSON line to ``results.jsonl`` as it ends, so that nothing
is lost when the time is up, and a second call goes on. The texts are given; perplexities are of 32 windows of 512
tokens of each, as in ``docs/benchmarks.md``::

    python bench/recovery.py MODEL --train c4-calibration.jsonl --evaluate c4-validation.jsonl wikitext2-test.txt \
        --work DIR --stages starts headline short --until 500

``--share 0.01`` runs everything at a hundredth of the tokens.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import halve
from halve.learning.lesson import Taught
from halve.learning.options import AUTO
from halve.learning.training.trainer import Point
from halve.learning.training.watching import Watch


class Reporter(Watch):
    """Prints what happens, with the seconds since the script began."""

    def __init__(self, since: float) -> None:
        self._since = since

    def phase(self, name: str) -> None:
        print(f"[{time.monotonic() - self._since:6.1f} s] {name}", flush=True)

    def point(self, point: Point) -> None:
        if point.perplexity is not None:
            kl = "" if point.kl is None else f"KL {point.kl:.4f}"
            since = time.monotonic() - self._since
            print(f"[{since:6.1f} s] {point.tokens:>9} tokens: held-out perplexity {point.perplexity:.2f} {kl}")
            sys.stdout.flush()


class Recovery:
    """The stages, and what they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = Path(options.work)
        self.results = self.work / "results.jsonl"
        self.begun = time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        self.done = {json.loads(line)["name"] for line in lines}

    # What is done

    def start(self, name: str, **options: Any) -> None:
        """Prune to one of the starts."""
        out = self.work / name
        if out.exists() and not (out / "halve.json").exists():
            shutil.rmtree(out)
        pruned = halve.prune(
            self.options.model,
            out,
            calibration=self.options.train,
            seq_len=self.options.seq_len,
            device=self.options.device,
            dtype=self.options.dtype if self.options.model.endswith(".gguf") else None,
            eval_data=self.options.evaluate,
            eval_seq_len=self.options.seq_len,
            eval_max_windows=self.options.windows,
            **options,
        )
        seconds = sum(pruned.report.seconds.values())
        self.note(name, {"kind": "start", "seconds_of_pruning": seconds, **self.scores(pruned.before, pruned.after)})

    def train(self, name: str, start: str, tokens: int, *, keep: bool = False, **options: Any) -> None:
        """Fine-tune a start."""
        tokens = self.shared(tokens)
        out = self.work / name
        data = options.pop("data", [self.options.train])
        began = time.monotonic()
        taught = halve.finetune(
            self.work / start,
            out,
            watch=Reporter(self.begun),
            data=data,
            tokens=tokens,
            seq_len=self.options.seq_len,
            batch_tokens=self.options.batch_tokens,
            forward_tokens=self.options.forward_tokens,
            learning_rate=self.options.learning_rate,
            device=self.options.device,
            eval_data=self.options.evaluate,
            eval_seq_len=self.options.seq_len,
            eval_max_windows=self.options.windows,
            **options,
        )
        self.note(name, self.told(taught, start, time.monotonic() - began))
        if not keep:
            shutil.rmtree(out)

    def learn(self, name: str, method: str, tokens: int, **options: Any) -> None:
        """Learn masks from the dense model."""
        tokens = self.shared(tokens)
        began = time.monotonic()
        taught = halve.learn(
            self.options.model,
            self.work / name,
            method=method,
            watch=Reporter(self.begun),
            data=[self.options.train],
            tokens=tokens,
            seq_len=self.options.seq_len,
            batch_tokens=self.options.batch_tokens,
            forward_tokens=self.options.forward_tokens,
            learning_rate=self.options.learning_rate,
            device=self.options.device,
            eval_data=self.options.evaluate,
            eval_seq_len=self.options.seq_len,
            eval_max_windows=self.options.windows,
            **options,
        )
        self.note(name, self.told(taught, "dense", time.monotonic() - began))
        shutil.rmtree(self.work / name)

    def shared(self, tokens: int) -> int:
        """Return the share of these tokens that is asked for, two steps at least."""
        asked: str = self.options.batch_tokens
        step: int = self.options.seq_len if asked == AUTO else int(asked)
        share: float = self.options.share
        return max(2 * step, round(tokens * share))

    # What is said of it

    def told(self, taught: Taught, start: str, seconds: float) -> dict[str, Any]:
        entry = taught.record["trainings"][-1]
        measured = json.loads((taught.out / "halve-measured.json").read_text())
        return {
            "kind": entry["kind"],
            "method": entry["method"],
            "start": start,
            "tokens": entry["tokens"],
            "steps": entry["steps"],
            "best_step": entry["best_step"],
            "learning_rate": entry["learning_rate"],
            "rates_tried": entry["rates_tried"],
            "options": entry["options"],
            "seconds": round(seconds, 1),
            "seconds_by_phase": measured["seconds"],
            "peak_device_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "before": [score.value for score in taught.before],
            "curve": [asdict(point) for point in taught.trained.curve],
            **self.scores(taught.dense, taught.after),
        }

    @staticmethod
    def scores(dense: tuple[Any, ...], after: tuple[Any, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "texts": [Path(score.source).name for score in after],
            "after": [score.value for score in after],
            "after_windows": [score.window_nll for score in after],
        }
        if dense:
            found["dense"] = [score.value for score in dense]
            found["ratio"] = [new.value / old.value for new, old in zip(after, dense, strict=True)]
        return found

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Append a line to the results, and print the short of it."""
        place = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        line = {"name": name, "machine": place, "since_start": round(time.monotonic() - self.begun, 1), **facts}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.options.copy_to:
            shutil.copy(self.results, self.options.copy_to)
        ratios = " / ".join(f"{value:.3f}" for value in facts.get("ratio", ()))
        values = " / ".join(f"{value:.2f}" for value in facts["after"])
        print(f"== {name}: {values}, {ratios} x dense, {facts.get('seconds', 0)} s", flush=True)

    def stages(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        """Yield stage, name and deed of everything there is, in the order of importance."""
        asked = self.options
        best = {"method": "auto", "effort": "best", "samples": asked.samples, "time_limit": asked.time_limit}
        fast = {"method": "auto", "effort": "fast", "samples": min(32, asked.samples)}
        wanda = {"method": "wanda", "refit": "none", "samples": min(32, asked.samples)}
        yield "starts", "auto+block", partial(self.start, "auto+block", **best)
        yield "starts", "wanda", partial(self.start, "wanda", **wanda)
        for tokens in asked.headline:
            name = f"headline {tokens}"
            yield "headline", name, partial(self.train, name, "auto+block", tokens, keep=True, ce_share=asked.ce_share)
        yield "starts", "auto", partial(self.start, "auto", **fast)
        short: tuple[tuple[str, str, dict[str, Any]], ...] = (
            ("short: from auto", "auto", {}),
            ("short: from wanda", "wanda", {}),
            ("short: from auto, cross-entropy", "auto", {"ce_share": 1.0}),
            ("short: from auto, norms and biases", "auto", {"train": "norms"}),
        )
        for name, start, options in short:
            deed = partial(self.train, name, start, asked.short, **options)
            yield "short", name, deed
        for method in asked.methods:
            name = f"short: {method}"
            yield "short", name, partial(self.learn, name, method, asked.short)
        if asked.own_text:
            data = [asked.train, f"self={asked.own_share}"]
            name = f"own text {asked.own_text}"
            deed = partial(self.train, name, "auto+block", asked.own_text, data=data, ce_share=asked.ce_share)
            yield "own", name, deed
        deed = partial(self.train, "wanda 1000000", "wanda", 1_000_000, ce_share=asked.ce_share)
        yield "wanda", "wanda 1000000", deed

    def run(self) -> None:
        """Run the stages that were asked for while there is time."""
        for stage, name, deed in self.stages():
            if stage not in self.options.stages or name in self.done:
                continue
            if time.monotonic() - self.begun > self.options.until:
                print(f"the time is up before {name!r}", flush=True)
                return
            print(f"-- {name}", flush=True)
            try:
                deed()
            except halve.HalveError as error:
                print(f"== {name} failed: {error}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense model: a directory, a .gguf file, or a hub id")
    parser.add_argument("--train", required=True, help="text to calibrate and train on")
    parser.add_argument("--evaluate", nargs="+", required=True, help="texts to measure perplexity on")
    parser.add_argument("--work", required=True, help="directory for checkpoints and results")
    parser.add_argument("--copy-to", help="directory that gets a copy of the results after every stage")
    parser.add_argument("--stages", nargs="+", default=["starts", "headline", "short", "own", "wanda"])
    parser.add_argument("--headline", nargs="+", type=int, default=[1_000_000], help="tokens of the headline runs")
    parser.add_argument("--own-text", type=int, default=0, help="tokens of a run partly on the dense model's own text")
    parser.add_argument("--own-share", type=float, default=1.0, help="of its own text, relative to the given text")
    parser.add_argument("--methods", nargs="*", default=["prox-admm"], help="free-mask methods of the short runs")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of auto+block")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of solving for auto+block")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="of each text that perplexity is measured on")
    parser.add_argument("--short", type=int, default=32_768, help="tokens of the short runs")
    parser.add_argument("--batch-tokens", default=AUTO, help="of a step")
    parser.add_argument("--ce-share", type=float, default=0.3, help="of the text's cross-entropy, in all long runs")
    parser.add_argument("--forward-tokens", type=int, default=4096)
    parser.add_argument("--share", type=float, default=1.0, help="of the tokens, for a quick look")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no stage begins")
    parser.add_argument("--learning-rate", type=float, help="of all runs; several are tried where none is given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", help="of the written weights, for a .gguf file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    Recovery(parse()).run()
