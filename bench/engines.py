"""What people would run instead: tokens a second and memory of llama.cpp, PyTorch and Halve, in one run, in turns.

    python bench/engines.py [PRUNED] [--threads 1 2] [--contexts 64 512] [--new 32] [--rounds 3] [--json PATH]

PRUNED is a checkpoint at 2:4 of a family that `halve export` writes; without one a Llama of random weights takes its
place, in the shape of TinyLlama (1.1B). Every contender is a process of its own that has its model loaded; they take
turns, each time with one prompt of random tokens, and medians are reported. Contenders whose package is not installed
are left out by name. llama.cpp (the package xllamacpp) multiplies all matrices in its format, embedding and head of
Q4_0 in Q8_0; Halve those of the blocks, beside int8 and int4 with the head in int8. Halve dense has the blocks' dense
matrices multiplied by its own kernels: what lies between it and packed bf16 is sparsity. PyTorch generates by
transformers' generate, Halve as `halve generate` does, each next token in one call.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import decode

LLAMA = {"llama.cpp bf16": "bf16", "llama.cpp Q8_0": "q8_0", "llama.cpp Q4_0": "q4_0"}
OPENVINO = {"OpenVINO int8": ["int8"], "OpenVINO int4": ["int4", "--group-size", "64"]}
"""How its exporter is asked for them: groups of 64 weights, since its 128 do not divide SmolLM2's 576 inputs."""
DENSE = "PyTorch bf16"
OWN_DENSE = "Halve dense bf16"
OURS = {
    "Halve packed bf16": ("own", "own"),
    "Halve packed int8": ("int8", "int8"),
    "Halve packed int4": ("int4", "int8"),
}
"""What the packed matrices and the head hold."""
AIMS = {"Halve packed int8": ("llama.cpp Q8_0", 1.35), "Halve packed int4": ("llama.cpp Q4_0", 1.15)}
TOKENS = 250
"""Of which prompts are made: any vocabulary has so many."""

Turn = Callable[[list[int], int], tuple[float, float]]
"""Take a prompt and a number of tokens; return the prompt's and the new tokens' tokens a second."""


def random_checkpoint(place: Path) -> Path:
    """Write a Llama of random weights at 2:4, with a tokenizer of bytes and one pair, without which none is loaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = decode.random_model("1b", torch.bfloat16)
    model.save_pretrained(place)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(place)
    return place


def llama_cpp(path: str, threads: int, context: int) -> Turn:
    """Load a GGUF file."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel = path, context, 1
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(asked)

    def turn(prompt: list[int], new: int) -> tuple[float, float]:
        told = server.handle_completions(
            {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        )
        found = told["timings"]
        return found["prompt_per_second"], found["predicted_per_second"]

    return turn


def transformers(path: str, threads: int, name: str) -> Turn:
    """Load a checkpoint, and run it dense or with its pruned matrices packed."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    import halve
    from halve.runtime.decoding.next_token import decode_in_one_call
    from halve.runtime.streaming import continue_text

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    if name == OWN_DENSE and (reason := decode_in_one_call(model)):
        raise SystemExit(f"no next token in one call: {reason}")
    if name in OURS:
        values, head = OURS[name]
        done = halve.accelerate(model, values=values, head=head, only_where_faster=None)  # type: ignore[arg-type]
        if done.decoding:
            raise SystemExit(f"{name}: no next token in one call: {done.decoding}")

    def turn(prompt: list[int], new: int) -> tuple[float, float]:
        ids, watch = torch.tensor([prompt]), decode.Watch()
        with torch.inference_mode():
            if name == DENSE:
                _, first, rate = decode.generate(model, ids, new)
                return len(prompt) / first, rate
            continue_text(model, ids, GenerationConfig(max_new_tokens=new), watch)  # type: ignore[no-untyped-call]
        first, last = watch.moments[1], watch.moments[-1]
        return len(prompt) / (first - watch.moments[0]), (new - 1) / (last - first)

    return turn


def serve(name: str, path: str, threads: int, context: int) -> None:
    """Be a contender: read a prompt and a number of tokens from each line, and answer with what a turn has shown."""
    import psutil

    turn = llama_cpp(path, threads, context) if name in LLAMA else transformers(path, threads, name)
    for line in sys.stdin:
        asked = json.loads(line)
        prompt, new = turn(asked["prompt"], asked["new"])
        answer = {"prompt": prompt, "decode": new, "memory": psutil.Process().memory_info().rss}
        sys.stdout.write(f"\nanswer {json.dumps(answer)}\n")
        sys.stdout.flush()


class Contender:
    """A process that has its model loaded, and waits for its turn."""

    def __init__(self, name: str, path: Path, threads: int, context: int, openvino: Path | None) -> None:
        command = [sys.executable, __file__, str(path), "--serve", name, "--threads", str(threads)]
        command += ["--contexts", str(context)]
        if name in OPENVINO:
            command = [str(openvino), str(Path(__file__).with_name("openvino_worker.py")), str(path), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.name = name

    def turn(self, prompt: list[int], new: int) -> dict[str, float]:
        """Let it generate once."""
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # among which its libraries may write what they like
            if line.startswith("answer "):
                return dict(json.loads(line.removeprefix("answer ")))
        raise SystemExit(f"{self.name} ended: run it alone to see why")

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.wait()


def files(source: Path, work: Path, openvino: Path | None) -> dict[str, Path]:
    """Return what each contender loads; those whose package is not there are named and left out."""
    import halve

    found = {}
    if find_spec("xllamacpp") is None:
        print("left out, since the package xllamacpp is not installed: llama.cpp")
    else:
        for name, kind in LLAMA.items():
            halve.export(source, work / f"{kind}.gguf", kind)
            found[name] = work / f"{kind}.gguf"
    if openvino is None:
        print("left out, since no Python that has it was given (--openvino): OpenVINO")
    else:
        for name, asked in OPENVINO.items():
            found[name] = work / name.replace(" ", "-")
            command = [openvino.with_name("optimum-cli"), "export", "openvino", "--model", source]
            command += ["--task", "text-generation-with-past", "--weight-format", *asked, found[name]]
            subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return found | dict.fromkeys([DENSE, OWN_DENSE, *OURS], source)


def measure(places: dict[str, Path], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender, number of threads and length of the context."""
    rows = []
    random = torch.Generator().manual_seed(0)
    for threads in given.threads:
        most = max(given.contexts) + given.new + 8
        contenders = [Contender(name, path, threads, most, given.openvino) for name, path in places.items()]
        for context in given.contexts:
            told: dict[str, list[dict[str, float]]] = defaultdict(list)
            for number in range(given.rounds + 1):
                for contender in contenders:
                    prompt = torch.randint(3, TOKENS, (context,), generator=random).tolist()
                    answer = contender.turn(prompt, given.new)
                    if number:
                        told[contender.name].append(answer)
            for name, answers in told.items():
                medians = {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}
                rows.append({"contender": name, "threads": threads, "context": context, **medians})
                print(
                    f"{name:18} {threads} threads, context {context:4}: {medians['decode']:8.2f} tokens/s, prompt "
                    f"{medians['prompt']:8.1f}, {medians['memory'] / 1e9:5.2f} GB",
                    flush=True,
                )
        for contender in contenders:
            contender.end()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print geometric means over threads and contexts, and what they are beside the aims."""
    names = dict.fromkeys(row["contender"] for row in rows)
    means = {
        name: statistics.geometric_mean(row["decode"] for row in rows if row["contender"] == name) for name in names
    }
    for name in names:
        print(f"{name:18} {means[name]:8.2f} tokens/s, {means[name] / means[DENSE]:.2f} times {DENSE}")
    for name, (peer, aim) in AIMS.items():
        if peer in means:
            print(f"{name}: {means[name] / means[peer]:.2f} times {peer}, aim {aim}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path, nargs="?")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--openvino", type=Path, help="a Python that has openvino-genai and optimum-intel")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, str(given.pruned), given.threads[0], given.contexts[0])
        return
    with tempfile.TemporaryDirectory(prefix="halve-engines-") as name:
        work = Path(name)
        source = random_checkpoint(work / "model") if given.pruned is None else given.pruned
        rows = measure(files(source, work, given.openvino), given)
    show(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
