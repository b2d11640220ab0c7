"""What distillation with a mask costs against plain fine-tuning of the dense model: time and memory of a step.

    python bench/training_cost.py --layers 30
    python bench/training_cost.py --layers 4 --tokens 1024

Both are steps of transformers' Trainer, on a Llama of SmolLM2-135M's shape with random weights (``--layers`` of its 30)
and the same rows: the plain one trains all weights of the dense model on the cross-entropy, ours trains the kept
weights of a 2:4 model against the dense one. They are timed in turns, and the medians are compared. The memory is what
each needs beyond the weights of its models: gradients, moments, and the activations of one forward pass.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from halve.device import compute_dtype
from halve.learning.learner import Step
from halve.learning.methods.fixed_mask import FixedMaskLearner
from halve.learning.training.heads import Speaker
from halve.learning.training.losses import Target, loss_sums
from halve.learning.training.needs import activation_bytes
from halve.maths.pattern import Pattern
from halve.model.masked import FixedMasks, pruned_parameters
from halve.text.rows import Passage, rows_of

VOCABULARY = 49_152


def model_of(layers: int) -> LlamaForCausalLM:
    """Return a Llama of SmolLM2-135M's shape, with so many of its blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Plain:
    """A step of the Trainer on the dense model: the cross-entropy of the text, all weights."""

    def __init__(self, model: LlamaForCausalLM, place: str, rows: int, *, low: bool) -> None:
        arguments = TrainingArguments(
            output_dir=place, per_device_train_batch_size=rows, bf16=low, use_cpu=True, report_to="none", max_steps=1
        )
        self._trainer = Trainer(model=model, args=arguments)
        self._trainer.create_optimizer()
        self._model = self._trainer.accelerator.prepare_model(model)
        self.trained = list(model.parameters())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        found = self._trainer.compute_loss(self._model, dict(batch))
        assert isinstance(found, Tensor)  # noqa: S101 - no outputs were asked for
        return found

    def step(self, batch: dict[str, Tensor]) -> None:
        self._model.train()
        self._trainer.accelerator.backward(self.loss(batch))
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        optimiser = self._trainer.optimizer
        assert optimiser is not None  # noqa: S101 - made above
        optimiser.step()
        optimiser.zero_grad()


class Distilled:
    """The same on a 2:4 model: the divergence from the dense one, kept weights alone."""

    def __init__(self, model: LlamaForCausalLM, teacher: LlamaForCausalLM, probe: Tensor, dtype: torch.dtype) -> None:
        layouts = {name: "out_in" for name, each in model.named_parameters() if "layers" in name and each.ndim == 2}
        targets = list(pruned_parameters(model, layouts))  # type: ignore[arg-type]
        for target in targets:
            target.tensor.data.copy_(Pattern("2:4").project(target.tensor.data))
        self._learner = FixedMaskLearner(FixedMasks(targets))
        self.trained = list(self._learner.attach(model))
        self._optimiser = self._learner.optimiser(self.trained, 1e-4, 0.0)
        self._model, self._dtype = model, dtype
        self._student = Speaker(model, probe, apart=False)
        self._teacher = Speaker(teacher.to(dtype).eval(), probe, apart=False)  # type: ignore[arg-type]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        judge = self._teacher.scores(batch)
        labels = batch["labels"][:, 1:].flatten()
        labels = labels[labels >= 0]
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            return self._student.say(
                self._model, batch, lambda said: loss_sums(said, judge, labels, Target(), self._dtype)[0] / len(labels)
            )

    def step(self, batch: dict[str, Tensor]) -> None:
        self._model.train()
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimiser.step()
        self._learner.after_update(Step(0, 1), self._optimiser)
        self._optimiser.zero_grad()


def seconds(step: Callable[[dict[str, Tensor]], None], batch: dict[str, Tensor]) -> float:
    begun = time.perf_counter()
    step(batch)
    return time.perf_counter() - begun


def extra_bytes(way: Plain | Distilled, batch: dict[str, Tensor]) -> int:
    """Return gradients, moments and activations, in bytes."""
    return 3 * sum(each.numel() * 4 for each in way.trained) + activation_bytes(lambda: way.loss(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    dtype = compute_dtype(torch.device("cpu"))
    ids = torch.randint(VOCABULARY, (asked.tokens,), generator=torch.Generator().manual_seed(0))
    rows = rows_of([Passage(ids.int())], asked.seq_len, 0)
    batch = {"input_ids": rows.ids, "position_ids": rows.positions, "labels": rows.labels}
    with tempfile.TemporaryDirectory() as place:
        plain = Plain(model_of(asked.layers), str(Path(place)), len(rows), low=dtype == torch.bfloat16)
        ours = Distilled(model_of(asked.layers), model_of(asked.layers), rows.ids[:1, :16], dtype)
        taken: dict[str, list[float]] = {"plain": [], "ours": []}
        for number in range(asked.rounds + 1):
            pair = {"plain": seconds(plain.step, batch), "ours": seconds(ours.step, batch)}
            for name, value in pair.items() if number else ():  # the first round warms up
                taken[name].append(value)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        where = f"products in {dtype}, {torch.get_num_threads()} threads"
        print(f"{asked.layers} blocks, {asked.tokens} tokens a step, {where}")
        for name, value in medians.items():
            spread = f"{min(taken[name]):.2f} to {max(taken[name]):.2f}"
            print(f"{name:>6}: {value:.2f} s a step ({spread}), {asked.tokens / value:.0f} tokens/s")
        ratios = [one / other for one, other in zip(taken["ours"], taken["plain"], strict=True)]
        print(f" ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        memory = extra_bytes(ours, batch) / extra_bytes(plain, batch)
        print(f"memory beside the models' weights: {memory:.2f} of plain; the teacher adds its weights")


if __name__ == "__main__":
    main()
