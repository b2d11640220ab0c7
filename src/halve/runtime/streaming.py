"""A first taste of a model: text streamed as it is generated, and how fast it came."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from halve.checkpoint import LoadedModel
from halve.device import model_device
from halve.errors import InputError
from halve.generation import text_config
from halve.options import check_count


@dataclass(frozen=True)
class Streamed:
    """What was generated, and when.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated.
        first_seconds: until the first of them.
        seconds: from the first to the last.
    """

    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, the first token not counted; None if there is only one."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else None


class _Timed(TextStreamer):
    """Hands finished words on, and notes when each token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.begun = time.perf_counter()
        self.moments: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.moments.append(time.perf_counter())
        self._prompt_seen = True
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        del stream_end
        self._write(text)


def stream(
    loaded: LoadedModel,
    prompt: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> Streamed:
    """Generate text, calling ``write`` with every piece of it as soon as it is there.

    Args:
        loaded: a causal language model with its tokenizer.
        prompt: text, put into the tokenizer's chat template if it has one.
        write: is handed the text, word by word.
        max_new_tokens: tokens at most; the model may end earlier.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
        raw: leave the chat template out.

    Raises:
        InputError: there is no tokenizer, the model generates no text, or an argument cannot be used.
    """
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    if tokenizer is None or not model.can_generate():
        raise InputError(f"{type(model).__name__} has no tokenizer or generates no text: give a causal language model")
    check_count("max_new_tokens", max_new_tokens)
    if not prompt or not 0.0 <= temperature < float("inf"):
        raise InputError(f"the prompt is {prompt!r} and the temperature {temperature}: give some text, and at least 0")
    if tokenizer.chat_template and not raw:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=raw or not tokenizer.chat_template)
    length, most = given["input_ids"].shape[1], getattr(text_config(model), "max_position_embeddings", None)
    if most is not None and length + max_new_tokens > most:
        raise InputError(
            f"the prompt has {length} tokens, and with {max_new_tokens} new ones it exceeds the model's {most}: "
            "shorten it, or ask for fewer"
        )
    settings = deepcopy(model.generation_config)
    sampling = temperature > 0.0
    settings.update(max_new_tokens=max_new_tokens, do_sample=sampling, temperature=temperature if sampling else None)
    if not sampling:
        settings.update(top_k=None, top_p=None)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id
    timed = _Timed(tokenizer, write)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        model.generate(**given.to(model_device(model)), generation_config=settings, streamer=timed)
    moments = timed.moments
    return Streamed(length, len(moments), moments[0] - timed.begun, moments[-1] - moments[0])
