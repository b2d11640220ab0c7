"""How fast vLLM serves a 2:4 model packed, beside the dense model in the same engine: real servers, real requests.

    python bench/vllm_serving.py --python ENGINE/bin/python --dense DIR --sparse DIR [--packed DIR ...] [--out FILE]

All servers run at once, with the same settings, and idle but for the one whose turn it is: round after round each gets
1, 4 and 16 requests at a time, of random tokens, and answers with so many tokens each. What is measured is all that the
client sees: tokens answered, by the seconds from the first request to the last answer; medians of the rounds count.
``bench/vllm_environment.sh`` sets the engine up. ``--running NAME=PORT`` measures servers that run already.

With ``--check DIR`` tokens of running servers are compared instead with what transformers makes of a plain checkpoint
in float32: each served token has to be the likeliest there, or as likely as it up to rounding.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HALVE = ("--quantization", "halve")
PACKED = (*HALVE, "--load-format", "halve")
SETTINGS = ("--max-model-len", "1024", "--max-num-seqs", "16", "--no-enable-prefix-caching", "--served-model-name", "m")
PATIENCE = 900.0
"""Seconds that a server may take to compile its model."""
FAREWELL = 60.0
"""Seconds that it may take to end once it is told to."""


def ask(port: int, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    """Send one request, and return its answer."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
        return dict(json.load(answer))


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end(process: "subprocess.Popen[bytes]", patience: float = FAREWELL) -> None:
    """Tell a process to end; if it does not, end it, and all that it has started in its session."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def server(python: Path, model: Path, extra: tuple[str, ...], log: Path) -> Iterator[int]:
    """Yield the port of a server that is ready."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as told:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *SETTINGS, *extra],
            stdout=told,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a server of {model} did not start: {log} tells why")
            time.sleep(1)
        yield port
    finally:
        end(process)


def throughput(port: int, requests: int, prompt: int, tokens: int, seed: int) -> float:
    """Return the tokens a second that a server answers so many simultaneous requests with."""
    chosen = random.Random(seed)  # noqa: S311 - the same prompts for every server
    prompts = [[chosen.randrange(100, 30000) for _ in range(prompt)] for _ in range(requests)]
    with ThreadPoolExecutor(requests) as pool:
        begun = time.perf_counter()
        answers = list(pool.map(lambda each: ask(port, each, tokens), prompts))
        seconds = time.perf_counter() - begun
    return float(sum(answer["usage"]["completion_tokens"] for answer in answers)) / seconds


def measure(ports: dict[str, int], options: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Return tokens a second by server and number of requests, one for each round; one goes before that is not kept."""
    found: dict[str, dict[int, list[float]]] = {name: {many: [] for many in options.requests} for name in ports}
    for number in range(options.rounds + 1):
        for many in options.requests:
            for name, port in ports.items():
                rate = throughput(port, many, options.prompt, options.tokens, seed=100 * number + many)
                if number:
                    found[name][many].append(rate)
    return found


def table(found: dict[str, dict[int, list[float]]]) -> str:
    """Return the medians, each with its lowest and highest, and by the first row's."""
    dense, *_ = found.values()
    lines = ["| | " + " | ".join(f"{many} at a time" for many in dense) + " |", "|---" * (len(dense) + 1) + "|"]
    for name, by_many in found.items():
        cells = []
        for many, rates in by_many.items():
            middle = statistics.median(rates)
            gain = middle / statistics.median(dense[many])
            cells.append(f"{middle:.1f} ({min(rates):.1f} to {max(rates):.1f}), {gain:.2f}x")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(port: int, directory: Path, prompts: list[str], tokens: int) -> str:
    """Compare served tokens with transformers' in float32, all of the answer given."""
    import torch
    from transformers import AutoTokenizer

    import halve

    model: Any = halve.load(directory, dtype=torch.float32).model
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    same, worst, told = 0, 0.0, 0
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        answer = ask(port, ids, tokens, return_token_ids=True)["choices"][0]["token_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
        best = logits.max(-1)
        chosen = logits.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)
        told += len(answer)
        same += int((best.indices == torch.tensor(answer)).sum())
        worst = max(worst, float((best.values - chosen).max() / logits.std()))
    return f"{same} of {told} tokens are the likeliest; at most {worst:.4f} of the logits' spread below it otherwise"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of the environment that vLLM is in")
    parser.add_argument("--dense", type=Path, help="the dense checkpoint")
    parser.add_argument("--sparse", type=Path, help="a plain checkpoint at 2:4")
    parser.add_argument("--packed", type=Path, nargs="*", default=[], help="packed ones")
    parser.add_argument("--running", nargs="*", default=[], metavar="NAME=PORT", help="servers that run already")
    parser.add_argument("--check", type=Path, help="compare their tokens with this plain checkpoint's")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16], help="at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for every round")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    ports = {name: int(port) for name, _, port in (each.partition("=") for each in options.running)}
    if options.check:
        prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time there was"]
        for name, port in ports.items():
            print(f"{name}: {check(port, options.check, prompts, options.tokens)}")
        return
    with ExitStack() as stack:
        wanted = [("dense", options.dense, ()), ("2:4, own values", options.sparse, HALVE)]
        wanted += [(path.name, path, PACKED) for path in options.packed]
        for number, (name, path, extra) in enumerate(() if options.running else wanted):
            if path is not None:
                log = Path(f"vllm-{number}.log").absolute()
                ports[name] = stack.enter_context(server(options.python, path, extra, log))
        if not ports:
            sys.exit("there is nothing to measure: give --python with --dense and --sparse, or --running")
        found = measure(ports, options)
    print(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
