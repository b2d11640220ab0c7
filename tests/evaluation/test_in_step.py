"""Passes that go through the blocks in step: what comes out is what comes out of one after the other, bit for bit."""

from collections import Counter
from contextvars import ContextVar
from functools import partial

import pytest
import torch
import transformers as tf

import halve
import halve.evaluation.in_step
from halve.checkpoint.load import resolve
from halve.checkpoint.streamed import ALWAYS, NEVER, load_streamed, loaded_to_measure
from halve.errors import InputError
from halve.evaluation.in_step import ready
from halve.evaluation.perplexity import evaluate, perplexity
from halve.text.halves import evaluation_halves
from halve.text.tokens import TokenSet, hash_ids
from models import DECODERS, ENCODER_DECODERS, decoder, edit_json, encoder_decoder, save, tokens
from tiny_tokenizers import SENTENCES, surrounding, word_level


def windows(count=5, length=24, seed=0):
    ids = tokens(count, length, seed)
    return TokenSet(ids, "random", hash_ids(ids), 1)


def both(source, data, **options):
    """Return the losses of all windows, of weights in memory and of weights on disk."""
    found = []
    for stream in (NEVER, ALWAYS):
        with loaded_to_measure(resolve(source), stream) as loaded:
            assert loaded.weights.mapped == (stream == ALWAYS)
            found.append(perplexity(loaded.model, data, weights=loaded.weights, **options))
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_it_is_the_same_for_every_family(family, tmp_path):
    source = save(decoder(family), tmp_path / "model", max_shard_size="20KB")
    one, other = both(source, windows(), batch_size=2)
    assert one.window_nll == other.window_nll
    assert (one.note, one.dtype) == (other.note, other.dtype)


@pytest.mark.parametrize("family", [name for name in ENCODER_DECODERS if name in {"t5", "bart"}])
def test_it_is_the_same_for_encoder_decoders(family, tmp_path):
    model = encoder_decoder(family)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 20))
    tokenizer = surrounding(word_level(), {"t5": "$A </s>", "bart": "<s> $A </s>"}[family])
    data = evaluation_halves(text, tokenizer, model, seq_len=48, max_windows=7, text_field="text", bos="auto")
    one, other = both(save(model, tmp_path / "model"), data, batch_size=2)
    assert one.window_nll == other.window_nll


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
@pytest.mark.parametrize(
    ("stored", "products"), [(torch.bfloat16, "float32"), (torch.bfloat16, "auto"), (torch.float32, "bfloat16")]
)
def test_it_is_the_same_in_every_precision(family, stored, products, tmp_path):
    one, other = both(save(decoder(family).to(stored), tmp_path / "model"), windows(), forward_dtype=products)
    assert one.window_nll == other.window_nll
    assert one.dtype == other.dtype


def begun(monkeypatch):
    """Count how often each block is taken up by `halve.evaluation.in_step`."""
    seen = Counter()
    real = halve.evaluation.in_step._InStep._use

    def watched(self, block):
        if block is not None and block is not self._used:
            seen[self._names[block]] += 1
        real(self, block)

    monkeypatch.setattr(halve.evaluation.in_step._InStep, "_use", watched)
    return seen


def test_the_weights_are_read_once_for_all_windows(tmp_path, monkeypatch):
    seen = begun(monkeypatch)
    both(save(decoder("llama"), tmp_path / "model"), windows(), batch_size=1)
    assert set(seen.values()) == {3}  # two looks at how the model is built, and the five windows


def test_as_many_windows_as_memory_allows_go_together(tmp_path, monkeypatch):
    seen = begun(monkeypatch)
    source = save(decoder("llama"), tmp_path / "model")
    state = 24 * 32 * 4  # of one window, in float32; a block is given little else
    monkeypatch.setattr(halve.evaluation.in_step, "available_memory", lambda: 4 * 4 * state)
    one, other = both(source, windows(), batch_size=1)
    assert one.window_nll == other.window_nll
    assert 3 < next(iter(seen.values())) < 8


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(tmp_path, stored):
    source = resolve(save(decoder("llama").to(stored), tmp_path / "model"))
    loaded = load_streamed(source, tmp_path / "beside")
    model = loaded.model
    places = [(parameter.data_ptr(), parameter.dtype) for parameter in model.parameters()]
    broken = windows()
    model.lm_head.register_forward_hook(lambda _module, _args, output: output.masked_fill(output == output.max(), 1e38))
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 10)
    with pytest.raises(InputError, match="is not finite"):
        perplexity(model, broken, batch_size=1, forward_dtype="float32", weights=loaded.weights)
    assert [(parameter.data_ptr(), parameter.dtype) for parameter in model.parameters()] == places
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_pass_that_fails_ends_those_that_wait(tmp_path):
    loaded = load_streamed(resolve(save(decoder("llama"), tmp_path / "model")), tmp_path / "beside")
    ended = []

    def job(index):
        try:
            loaded.model(input_ids=windows().ids[:1])
            raise ValueError(index)
        finally:
            ended.append(index)

    with (
        ready(loaded.model, torch.device("cpu"), "float32", loaded.weights) as passes,
        pytest.raises(ValueError, match="0"),
    ):
        passes.run([lambda index=index: job(index) for index in range(4)])
    assert sorted(ended) == [0, 1, 2, 3]


def test_what_a_model_sets_for_a_while_stays_in_its_own_pass(tmp_path):
    loaded = load_streamed(resolve(save(decoder("llama"), tmp_path / "model")), tmp_path / "beside")
    seen = []

    def job(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.set_grad_enabled(enabled):
            for _ in range(2):
                loaded.model.model.layers[0](torch.ones(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8),) * 2)
                seen.append((enabled, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    with ready(loaded.model, torch.device("cpu"), "float32", loaded.weights) as passes:
        passes.run([partial(job, enabled) for enabled in (True, False, True)])
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert len(seen) == 6
    assert all(one == two == three for one, two, three in seen)


def test_a_pass_sees_the_context_variables_that_are_set(tmp_path):
    loaded = load_streamed(resolve(save(decoder("llama"), tmp_path / "model")), tmp_path / "beside")
    variable = ContextVar("variable", default="nothing")
    variable.set("something")
    with ready(loaded.model, torch.device("cpu"), "float32", loaded.weights) as passes:
        assert passes.run([variable.get, variable.get]) == ["something"] * 2


def test_a_run_measures_before_and_after_from_disk(tmp_path):
    source = save(decoder("llama"), tmp_path / "model")
    word_level().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 5))
    options = {"calibration": text, "samples": 4, "seq_len": 16, "method": "wanda", "eval_data": [str(text)]}
    one, other = (halve.prune(source, tmp_path / stream, stream=stream, **options) for stream in (NEVER, ALWAYS))
    for before, after in ((one.before, other.before), (one.after, other.after)):
        assert [score.window_nll for score in before] == [score.window_nll for score in after]
    assert one.before[0].nll != one.after[0].nll


def test_a_checkpoint_and_text_are_measured_from_disk(tmp_path):
    source = save(decoder("llama"), tmp_path / "model")
    word_level().save_pretrained(source)
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 5))
    asked = {"seq_len": 16, "max_windows": 4, "device": "cpu"}
    one, other = (evaluate(source, tmp_path / "text.txt", stream=stream, **asked) for stream in (NEVER, ALWAYS))
    assert one.window_nll == other.window_nll


def test_what_has_to_be_converted_does_not_stay_on_disk(tmp_path):
    source = save(decoder("llama"), tmp_path / "model")
    edit_json(source / "config.json", dtype="bfloat16")
    with pytest.raises(InputError, match="cannot be measured with its weights on disk, since the weights are float32"):
        evaluate(source, windows(), stream=ALWAYS)
    assert evaluate(source, windows(), device="cpu").dtype == "bfloat16"


def test_an_answer_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="stream = 'maybe' is not known: choose one of auto, always, never"):
        evaluate(save(decoder("llama"), tmp_path / "model"), windows(), stream="maybe")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_blocks_come_and_go(tmp_path):
    source = save(tf.LlamaForCausalLM(decoder("llama").config), tmp_path / "model")
    one, other = both(source, windows(), batch_size=1, device="cuda", forward_dtype="float32")
    assert one.nll == pytest.approx(other.nll, rel=1e-5)
