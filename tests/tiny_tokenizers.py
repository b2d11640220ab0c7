"""Small tokenizers built in code; nothing is downloaded."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

UNKNOWN = "<unk>"
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "pruning removes weights that a network can do without",
    "a sparse matrix keeps two of every four numbers",
    "perplexity is the exponential of the mean negative log-likelihood",
)


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


def ends_texts():
    """Return a `byte_bpe` that puts a token after every text."""
    tokenizer = byte_bpe()
    eos = [("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    template = processors.TemplateProcessing(single="$A </s>", special_tokens=eos)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def word_level(*, bos="<s>", eos="</s>", **settings):
    """Return a tokenizer with one token a word of `SENTENCES`, 32 + specials."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    names = [UNKNOWN, *(token for token in (bos, eos) if token), *words]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=bos, eos_token=eos, **settings
    )
