"""Small tokenizers built in code; nothing is downloaded."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

UNKNOWN = "<unk>"
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "pruning removes weights that a network can do without",
    "a sparse matrix keeps two of every four numbers",
    "perplexity is the exponential of the mean negative log-likelihood",
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "the lazy dog"},
]


def byte_bpe(vocabulary=320, *, bos="<s>", eos="</s>", adds_bos=False, **settings):
    """Return a byte-level BPE like GPT-2's; ``adds_bos`` makes it start every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos) if token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **settings)


def surrounding(tokenizer, template):
    """Let a fast tokenizer put special tokens around every text: ``<s> $A </s>``."""
    names = [name for name in template.split() if name != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in dict.fromkeys(names)]
    )
    return tokenizer


class InPython(PreTrainedTokenizer):
    """A slow tokenizer, one token a letter, that adds its own BOS and EOS."""

    def __init__(self, **settings):
        letters = sorted(set("".join(SENTENCES)) | {"T"})
        self.letters = {name: index for index, name in enumerate(["<s>", "</s>", UNKNOWN, *letters])}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": UNKNOWN}
        super().__init__(**names, **settings)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return dict(self.letters)

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, self.letters[UNKNOWN])

    def _convert_id_to_token(self, index):
        return list(self.letters)[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or ()), self.eos_token_id]


def word_level(*, bos="<s>", eos="</s>", **settings):
    """Return a tokenizer with one token a word of `SENTENCES`, 32 + specials."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    names = [UNKNOWN, *(token for token in (bos, eos) if token), *words]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=bos, eos_token=eos, **settings
    )


def sentinels(count, **settings):
    """Return a tokenizer as `word_level`'s with T5's sentinels, ``<extra_id_0>`` having the last id."""
    tokenizer = word_level(bos=None, **settings)
    tokenizer.add_tokens([f"<extra_id_{index}>" for index in reversed(range(count))], special_tokens=True)
    return tokenizer


def chatting():
    """Return `byte_bpe` with a chat template like SmolLM2's, in a vocabulary of 320 tokens."""
    tokenizer = byte_bpe(318, chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer
