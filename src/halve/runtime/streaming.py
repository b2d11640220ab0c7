"""A first taste of a model: text streamed as it is generated, and how fast it came."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from halve.checkpoint.load import LoadedModel
from halve.checks import check_count
from halve.device import model_device
from halve.errors import InputError, counted
from halve.runtime.decoding.next_token import computes_in_one_call
from halve.text.generation import text_config
from halve.transformers_internals import DynamicCache, cache_keyword


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
    check_asked(prompt, max_new_tokens, temperature)
    given = _tokenized(loaded, prompt, max_new_tokens, raw=raw)
    model: Any = loaded.model
    settings = _settings(model, loaded.tokenizer, max_new_tokens, temperature)
    timed = _Timed(loaded.tokenizer, write)
    given = given.to(model_device(model))
    with torch.random.fork_rng(), torch.inference_mode(), _instead_of_its_own(model, settings):
        torch.manual_seed(seed)
        if computes_in_one_call(model):
            continue_text(model, given["input_ids"], settings, timed)
        else:
            model.generate(**given, streamer=timed)
    moments = timed.moments
    return Streamed(given["input_ids"].shape[1], len(moments), moments[0] - timed.begun, moments[-1] - moments[0])


def continue_text(model: Any, ids: Tensor, settings: GenerationConfig, streamer: Any) -> Tensor:
    """Continue one text as ``model.generate`` does, without what that does around each token, a millisecond or so.

    Args:
        model: a causal language model with a plain cache of keys and values.
        ids: (1, tokens), the text.
        settings: ``max_new_tokens`` and ``eos_token_id``; ``temperature`` where ``do_sample`` is set, without which the
            likeliest token is taken. Nothing else is looked at.
        streamer: as ``generate`` takes one; it is handed the text, then every new token.

    Returns:
        Tensor: (1, tokens), the text with its continuation.

    Raises:
        InputError: there are several texts, or none.
    """
    if len(ids) != 1:
        raise InputError(f"one text is continued, not {len(ids)}: give ids of shape (1, tokens)")
    ends = settings.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    asked = {cache_keyword(model.forward): DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
    streamer.put(ids.cpu())
    found, new = [ids], ids
    for _ in range(settings.max_new_tokens or 0):
        logits = model(input_ids=new, **asked).logits[:, -1].float()
        if settings.do_sample:
            new = torch.multinomial((logits / settings.temperature).softmax(-1), 1)
        else:
            new = logits.argmax(-1, keepdim=True)
        found.append(new)
        streamer.put(new.cpu()[0])
        if int(new) in ends:
            break
    streamer.end()
    return torch.cat(found, dim=1)


def check_asked(prompt: str, max_new_tokens: int, temperature: float) -> None:
    """Check arguments of `stream` without a model.

    Raises:
        InputError: one of them cannot be used.
    """
    check_count("max_new_tokens", max_new_tokens)
    if not prompt:
        raise InputError("the prompt is empty: give some text")
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}: give a finite number of at least 0")


def check_prompt(loaded: LoadedModel, prompt: str, *, max_new_tokens: int = 128, raw: bool = False) -> None:
    """Check that `stream` can generate from a prompt, before anything is spent on making the model faster.

    Raises:
        InputError: there is no tokenizer, its chat template fails, the model generates no text, or not that much.
    """
    _tokenized(loaded, prompt, max_new_tokens, raw=raw)


def _tokenized(loaded: LoadedModel, prompt: str, max_new_tokens: int, *, raw: bool) -> Any:
    """Return what ``generate`` takes of a prompt."""
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} generates no text: give a causal language model")
    if model.main_input_name != "input_ids":
        raise InputError(f"{type(model).__name__} takes {model.main_input_name}, not text: it has no use for a prompt")
    if tokenizer is None:
        raise InputError(f"this {type(model).__name__} comes without a tokenizer: put its files beside the model")
    if tokenizer.chat_template and not raw:
        prompt = _in_template(tokenizer, prompt)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=raw or not tokenizer.chat_template)
    length, most = given["input_ids"].shape[1], getattr(text_config(model), "max_position_embeddings", None)
    if most is not None and length + max_new_tokens > most:
        raise InputError(
            f"the prompt has {counted(length, 'token')}, and with {max_new_tokens} new ones it exceeds the model's "
            f"{most}: shorten it, or ask for fewer"
        )
    return given


def _in_template(tokenizer: Any, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs of their own
        raise InputError(f"the tokenizer's chat template fails ({error}): leave it out with raw (--raw)") from error


@contextmanager
def _instead_of_its_own(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """What is left unset in settings that ``generate`` is given, it takes from the model's own."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Return only what was asked for, and the tokens that end a text: no beams or penalties of the model's own.

    What ends a text is the model's to say; where it does not, the tokenizer's end does.
    """
    own = model.generation_config
    end = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    pad = own.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": pad}
    for name in ("bos_token_id", "decoder_start_token_id"):  # what a text begins with, which encoder-decoders need
        found = getattr(own, name, None)
        asked[name] = getattr(model.config, name, None) if found is None else found
    if temperature > 0.0:
        asked |= {"do_sample": True, "temperature": temperature, "top_k": 0}
    return GenerationConfig(**asked)  # type: ignore[no-untyped-call]
