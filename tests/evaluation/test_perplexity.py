import math
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

import halve.checkpoint.load
import halve.evaluation.perplexity
from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.evaluation.perplexity import evaluate, evaluation_texts, perplexity
from halve.text.tokens import TokenSet, evaluation_tokens, hash_ids
from models import DECODERS, VOCAB, bert, decoder, tokens
from tiny_tokenizers import SENTENCES, surrounding, word_level


def windows(count=5, length=24, seed=0):
    ids = tokens(count, length, seed)
    return TokenSet(ids, "random", hash_ids(ids), 1)


@torch.no_grad()
def reference(model, ids):
    """Mean negative log-likelihood: one window at a time, one token at a time, in float64."""
    model = model.double()
    if hasattr(model, "config"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    losses = []
    for window in ids:
        logits = model(input_ids=window[None]).logits[0]
        for position in range(len(window) - 1):
            scores = logits[position]
            losses.append((scores.logsumexp(-1) - scores[window[position + 1]]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_against_float64(family):
    found = perplexity(decoder(family), windows(), forward_dtype="float32")
    expected = reference(decoder(family), windows().ids)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert bool(found.note) == (family == "gemma2"), found.note  # the only one here with soft-capped logits
    assert (found.windows, found.seq_len, found.dtype, found.source) == (5, 24, "float32", "random")
    assert found.tokens_sha256 == windows().sha256
    assert found.seconds > 0


def test_it_is_the_loss_of_transformers():
    model = decoder("llama")
    with torch.no_grad():
        expected = model(input_ids=windows().ids, labels=windows().ids).loss.item()
    assert perplexity(model, windows(), forward_dtype="float32").nll == pytest.approx(expected, rel=1e-6)


def granite(**scales):
    torch.manual_seed(0)
    settings = {**DECODERS["llama"][1], "embedding_multiplier": 20.0, **scales}
    return tf.GraniteForCausalLM(tf.GraniteConfig(**settings)).eval()


def test_scaled_logits_use_the_models_own_forward():
    found = perplexity(granite(logits_scaling=0.25), windows(), forward_dtype="float32")
    assert found.note == "the model changes its logits after the output head, so its own forward was used"
    assert found.nll == pytest.approx(reference(granite(logits_scaling=0.25), windows().ids), rel=1e-5)
    assert found.nll != pytest.approx(perplexity(granite(logits_scaling=1.0), windows()).nll, rel=1e-2)


class Odd(nn.Module):
    """Like a causal language model of transformers, with something between the base model and the head."""

    def __init__(self, between=nn.Identity, *, by_module=True, shift=0):
        super().__init__()
        self.inner = decoder("llama")
        self.base_model = self.inner.model
        self.between = between
        self.by_module = by_module
        self.shift = shift

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids):
        hidden = self.between()(self.base_model(input_ids=(input_ids + self.shift) % VOCAB)[0])
        head = self.inner.lm_head
        return SimpleNamespace(logits=head(hidden) if self.by_module else hidden @ head.weight.T)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (Odd(), ""),
        (Odd(Doubled), "the model changes the hidden states before the output head"),
        (Odd(shift=1), "the base model does something else when run on its own"),
        (Odd(by_module=False), "the model does not call its output head or its base model"),
    ],
)
def test_what_lies_between_base_and_head_is_noticed(model, note):
    found = perplexity(model, windows(), forward_dtype="float32")
    assert found.note.startswith(note)
    assert bool(found.note) == bool(note)
    assert found.nll == pytest.approx(reference(model, windows().ids), rel=1e-5)


class Unigram(nn.Module):
    """A plain module whose logits depend on nothing; returns them as a tensor."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    found = perplexity(Unigram([0.0] * VOCAB), windows(), forward_dtype="float32")
    assert found.value == pytest.approx(VOCAB, rel=1e-6)
    assert "no plain linear output head" in found.note


def test_the_softmax_of_narrow_logits_is_float32():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    found = perplexity(Unigram(logits.tolist()).bfloat16(), windows())
    exact = -logits.bfloat16().double().log_softmax(-1)[windows().ids[:, 1:]].mean().item()
    assert found.dtype == "bfloat16"
    assert found.nll == pytest.approx(exact, rel=1e-6)


def test_perplexity_that_overflows_is_infinite():
    found = perplexity(Unigram([1e5] + [0.0] * (VOCAB - 1)), windows(), forward_dtype="float32")
    assert found.value == math.inf
    assert found.nll == pytest.approx(1e5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100, None])
def test_batches_and_slices_change_nothing(family, batch_size, monkeypatch):
    expected = reference(decoder(family), windows().ids)
    monkeypatch.setattr(halve.evaluation.perplexity, "LOGITS_AT_ONCE", 7 * VOCAB)
    calls = []
    found = perplexity(
        decoder(family),
        windows(),
        batch_size=batch_size,
        forward_dtype="float32",
        progress=lambda *done: calls.append(done),
    )
    assert found.nll == pytest.approx(expected, rel=1e-5)
    step = 1 if family == "gemma2" else min(batch_size or 5, 5)
    assert calls == [(min(done, 5), 5) for done in range(step, 5 + step, step)]


def test_logits_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(halve.evaluation.perplexity, "LOGITS_AT_ONCE", 7 * VOCAB + 5)
    model, rows = decoder("llama"), []
    model.lm_head.register_forward_hook(lambda _module, _args, output: rows.append(output.numel() // VOCAB))
    perplexity(model, windows())
    probes, slices = rows[:2], rows[2:]
    assert probes == [16, 16]  # whether the model is causal, and whether its head may be sliced
    assert max(slices) == 7
    assert sum(slices) == 5 * 23


def test_bfloat16_products_are_close_and_recorded():
    found = perplexity(decoder("llama"), windows(), forward_dtype="bfloat16")
    exact = reference(decoder("llama"), windows().ids)
    assert found.dtype == "bfloat16"
    assert found.note == ""
    assert found.nll == pytest.approx(exact, rel=0.02)
    assert found.nll != pytest.approx(exact, rel=1e-7)


def test_auto_follows_the_hardware(monkeypatch):
    for native in (True, False):
        known = {"amx_bf16": native, "avx512_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert perplexity(decoder("llama"), windows()).dtype == ("bfloat16" if native else "float32")
    assert perplexity(decoder("llama").double(), windows()).dtype == "float64"
    assert perplexity(decoder("llama").bfloat16(), windows()).dtype == "bfloat16"


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_float32_is_forced_on_narrow_weights(family):
    model = decoder(family).bfloat16()
    model.config._attn_implementation = "eager"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = perplexity(model, windows(), forward_dtype="float32")
    assert found.dtype == "float32"
    assert found.nll == pytest.approx(reference(decoder(family).bfloat16(), windows().ids), rel=1e-5)
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_left_as_it_was():
    model = decoder("llama", attention_dropout=0.5).train().requires_grad_(False)
    found = perplexity(model, windows(), forward_dtype="float32")
    assert found.nll == pytest.approx(reference(decoder("llama"), windows().ids), rel=1e-5)  # no dropout
    assert model.training
    perplexity(model, windows(), forward_dtype="bfloat16")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.lm_head._forward_hooks
    assert not model.model._forward_hooks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_and_the_model_comes_back():
    model = decoder("llama")
    found = perplexity(model, windows(), device="cuda", forward_dtype="float32")
    assert found.nll == pytest.approx(reference(decoder("llama"), windows().ids), rel=1e-4)
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_broken_window_is_named(family):
    model, data = decoder(family, tie_word_embeddings=False), windows(count=7)
    data.ids[data.ids == 5] = 6
    data.ids[4, 10] = 5
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(InputError, match=r"loss of window 4 of 'random' \(counted from 0\) is not finite"):
        perplexity(model, data, batch_size=3)


def test_refusals():
    model = decoder("llama")
    with pytest.raises(InputError, match="seq_len = 129 exceeds the model's max_position_embeddings = 128"):
        perplexity(model, windows(length=129))
    with pytest.raises(InputError, match="seq_len = 1 leave no token"):
        perplexity(model, windows(length=1))
    with pytest.raises(InputError, match="batch_size must be a whole number of at least 1, got 0"):
        perplexity(model, windows(), batch_size=0)
    with pytest.raises(InputError, match="'half' is not understood"):
        perplexity(model, windows(), forward_dtype="half")
    with pytest.raises(InputError, match="device 'tpu2x' is not understood"):
        perplexity(model, windows(), device="tpu2x")
    data = windows()
    data.ids[0, 0] = VOCAB
    with pytest.raises(InputError, match=f"hold the id {VOCAB}, but the model's vocabulary has {VOCAB} entries"):
        perplexity(model, data)


# From a checkpoint and text


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES * 5))
    return path


@pytest.fixture
def directory(tmp_path):
    decoder("llama").save_pretrained(tmp_path / "model")
    word_level().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_evaluate_a_directory(directory, text):
    found = evaluate(str(directory), text, seq_len=16, max_windows=4, forward_dtype="float32", device="cpu")
    data = evaluation_tokens(text, word_level(), seq_len=16)
    assert data.samples > 4
    assert found.nll == pytest.approx(reference(decoder("llama"), data.ids[:4]), rel=1e-5)
    assert (found.source, found.windows) == (str(text), 4)


def test_evaluate_a_model_in_memory(text):
    data = evaluation_tokens(text, word_level(), seq_len=16)
    found = evaluate(decoder("llama"), text, seq_len=16, tokenizer=word_level(), forward_dtype="float32")
    assert found.nll == pytest.approx(reference(decoder("llama"), data.ids), rel=1e-5)
    assert evaluate(decoder("llama"), data, forward_dtype="float32").nll == found.nll


def test_evaluate_refuses_before_loading(directory, text, monkeypatch):
    with pytest.raises(InputError, match="text needs a tokenizer"):
        evaluate(decoder("llama"), text, seq_len=16)
    with pytest.raises(InputError, match="seq_len = 2048 exceeds the model's max_position_embeddings = 128"):
        evaluate(directory, text)

    def never(*_arguments, **_options):
        raise AssertionError("loaded")

    monkeypatch.setattr(halve.evaluation.perplexity, "loaded_to_measure", never)
    for wrong, message in (
        ({"data": "missing.txt"}, "'missing.txt' does not exist"),
        ({"data": "self"}, "'self' is for calibration"),
        ({"seq_len": 0}, "seq_len must be a whole number of at least 1, got 0"),
        ({"max_windows": 0}, "max_windows must be a whole number of at least 1, got 0"),
        ({"forward_dtype": "int8"}, "'int8' is not understood"),
        ({"device": "abacus"}, "'abacus' is not understood"),
        ({"bos": "first"}, "bos = 'first' is not known: choose one of auto, always, never, once"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(directory, **{"data": text, "seq_len": 16, **wrong})


def test_a_model_without_tokenizer_cannot_read_text():
    with pytest.raises(InputError, match="has no tokenizer"):
        evaluation_texts(LoadedModel(decoder("llama"), None, None), ["x.txt"], seq_len=8, max_windows=1, text_field="")


# BOS


def by_hand(tokenizer, text, lead, seq_len):
    """Losses (windows, scored) in float64 of the plain model, each window and token on its own; BOS is no target."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = [token for token in tokenizer(text)["input_ids"] if token not in special]
    room = seq_len - len(lead)
    model, losses = decoder("llama").double(), []
    for start in range(0, len(ids) // room * room, room):
        window = torch.tensor([[*lead, *ids[start : start + room]]])
        with torch.no_grad():
            scores = model(input_ids=window).logits[0].log_softmax(-1)
        targets = range(max(1, len(lead)), seq_len)
        losses.append([-scores[place - 1, window[0, place]].item() for place in targets])
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("template", "lead"),
    [("$A", []), ("<s> $A", ["<s>"]), ("<s> $A </s>", ["<s>"]), ("$A </s>", []), ("</s> <s> $A", ["</s>", "<s>"])],
)
def test_every_window_is_scored_after_what_the_tokenizer_puts_before_text(text, template, lead, special):
    tokenizer = surrounding(word_level(), template)
    expected = by_hand(tokenizer, text.read_text(), tokenizer.convert_tokens_to_ids(lead), 16)
    bos = "auto" if special else "never"
    if not special:
        expected = by_hand(word_level(), text.read_text(), [], 16)
    found = evaluate(decoder("llama"), text, seq_len=16, tokenizer=tokenizer, forward_dtype="float32", bos=bos)
    assert found.window_nll == pytest.approx(expected.mean(1).tolist(), rel=1e-5)
    assert found.nll == pytest.approx(expected.mean().item(), rel=1e-5)
    assert (found.windows, found.bos) == (len(expected), "each" if lead and special else "none")


def test_once_is_the_protocol_of_the_literature(text):
    """The whole text with its special tokens, cut through: what other code has measured."""
    tokenizer = surrounding(word_level(), "<s> $A")
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    found = evaluate(decoder("llama"), text, seq_len=16, tokenizer=tokenizer, forward_dtype="float32", bos="once")
    assert found.nll == pytest.approx(reference(decoder("llama"), windows), rel=1e-5)
    assert (found.bos, found.windows) == ("once", len(windows))
    assert found.versions == {"halve": version("halve"), "torch": torch.__version__, "transformers": tf.__version__}


def test_windows_without_a_token_to_predict_are_refused():
    data = replace(windows(length=3), lead=3)
    with pytest.raises(InputError, match="seq_len = 3 leave no token to predict: give at least 4"):
        perplexity(decoder("llama"), data)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_of_every_window_is_kept_in_order(batch_size):
    found = perplexity(decoder("llama"), windows(), batch_size=batch_size, forward_dtype="float32")
    expected = [reference(decoder("llama"), windows().ids[index : index + 1]) for index in range(5)]
    assert found.window_nll == pytest.approx(expected, rel=1e-5)
    assert found.nll == pytest.approx(sum(found.window_nll) / 5, rel=1e-12)


def classifier():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=VOCAB, **settings)).eval()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (bert(), r"^BertForMaskedLM sees the tokens that it is to predict \(a last token changes"),
        (bert().bert, r"^BertModel has no perplexity, since it predicts no tokens \(.*logits"),
        (
            classifier(),
            r"^BertForSequenceClassification has no perplexity: its logits have shape \(1, 2\)",
        ),
    ],
)
def test_what_has_no_perplexity_is_refused(model, reason):
    with pytest.raises(InputError, match=reason):
        perplexity(model, windows())
