import pytest
import torch

import models
from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.runtime.compiled import instruction_sets
from halve.runtime.decoding.next_token import decode_in_one_call
from halve.runtime.streaming import Streamed, stream
from tiny_tokenizers import byte_bpe

CHAT = "{% for m in messages %}<s>user: {{ m['content'] }}</s>{% endfor %}model:"


WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@pytest.fixture(scope="module", params=["module by module", "in one call"])
def loaded(request):
    tokenizer, one_call = byte_bpe(), request.param == "in one call"
    if one_call and not instruction_sets():
        pytest.skip("the compiled kernels are not built")
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    model = models.decoder("llama", vocab_size=len(tokenizer), **ends, **(WIDE if one_call else {}))
    model.generation_config.eos_token_id = None
    if one_call:
        assert decode_in_one_call(model) == ""
    return LoadedModel(model, tokenizer, None)


def run(loaded, prompt="Some words", **options):
    pieces = []
    return stream(loaded, prompt, pieces.append, **options), "".join(pieces)


def greedy(loaded, text, count):
    """Token by token, without cache or generate."""
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    length = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, loaded.model(ids).logits[:, -1:].argmax(-1)), 1)
    return length, loaded.tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_streams_the_likeliest_text(loaded):
    length, text = greedy(loaded, "Some words", 9)
    done, got = run(loaded, max_new_tokens=9)
    assert got == text
    assert (done.prompt_tokens, done.new_tokens) == (length, 9)
    assert done.first_seconds > 0
    assert done.tokens_per_second == pytest.approx(8 / done.seconds)


def test_a_chat_template_is_used_unless_raw(loaded):
    tokenizer = byte_bpe()
    tokenizer.chat_template = CHAT
    chatting = LoadedModel(loaded.model, tokenizer, None)
    expected = greedy(loaded, "<s>user: Hello</s>model:", 6)
    done, text = run(chatting, "Hello", max_new_tokens=6)
    assert (done.prompt_tokens, text) == expected
    raw, text = run(chatting, "Hello", max_new_tokens=6, raw=True)
    assert text == greedy(loaded, "Hello", 6)[1]
    assert raw.prompt_tokens < done.prompt_tokens


def test_sampling_goes_by_its_seed_and_leaves_torchs_alone(loaded):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    texts = [run(loaded, max_new_tokens=12, temperature=1.5, seed=seed)[1] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.rand(1) == expected


def test_a_model_without_an_end_stops_at_its_tokenizers(loaded):
    ids = loaded.tokenizer("Some words", return_tensors="pt", add_special_tokens=False)["input_ids"]
    length = ids.shape[1]
    ids = loaded.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, length:].tolist()
    last = next(token for token in ids if token != ids[0])
    tokenizer = byte_bpe()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    assert tokenizer.eos_token_id == last
    done, _ = run(LoadedModel(loaded.model, tokenizer, None), max_new_tokens=9)
    assert done.new_tokens == ids.index(last) + 1 < 9


def test_one_token_has_no_rate():
    assert Streamed(3, 1, 0.1, 0.0).tokens_per_second is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": ""}, r"the prompt is empty: give some text"),
        ({"temperature": -1.0}, r"temperature is -1.0: give"),
        ({"temperature": float("nan")}, r"temperature is nan: give"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be a whole number of at least 1"),
        ({"max_new_tokens": 127}, r"with 127 new ones it exceeds the model's 128"),
    ],
)
def test_bad_arguments_are_refused(loaded, options, says):
    with pytest.raises(InputError, match=says):
        run(loaded, **options)


def test_models_without_text_are_refused(loaded):
    with pytest.raises(InputError, match=r"this LlamaForCausalLM comes without a tokenizer"):
        run(LoadedModel(loaded.model, None, None))
    with pytest.raises(InputError, match=r"BertForMaskedLM generates no text"):
        run(LoadedModel(models.bert(), loaded.tokenizer, None))


def test_the_models_own_settings_change_nothing(loaded, monkeypatch):
    expected = run(loaded, max_new_tokens=9)
    for name, value in {"num_beams": 3, "repetition_penalty": 9.0, "do_sample": True, "max_length": 3}.items():
        monkeypatch.setattr(loaded.model.generation_config, name, value)
    assert run(loaded, max_new_tokens=9)[1] == expected[1]


def test_a_template_that_fails_can_be_left_out(loaded):
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"chat template fails \(no system role\): leave it out with raw"):
        run(LoadedModel(loaded.model, tokenizer, None))
    run(LoadedModel(loaded.model, tokenizer, None), raw=True, max_new_tokens=1)
