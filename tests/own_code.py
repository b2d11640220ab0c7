"""A model that comes with Python code of its own, which leaves a mark where it is run."""

from halve.text.tokens import TokenSet, hash_ids
from models import tokens

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""


MODELLING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        output.logits = output.logits * 0.5
        return output
"""


def some_tokens():
    ids = tokens(4, 16)
    return TokenSet(ids, "test", len(ids), "", "", hash_ids(ids))
