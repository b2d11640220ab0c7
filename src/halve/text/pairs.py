"""Pairs for encoder-decoders: what is read or heard, and what is to be said of it, each of its own length."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from halve.checkpoint.shards import hash_tensors
from halve.errors import InputError
from halve.model.blocks import Batch
from halve.model.layers import is_fused
from halve.text.documents import Pair, read_pairs, shuffled
from halve.text.halves import shift_right, without_start
from halve.text.limits import DECODER, ENCODER, check_side, check_vocabulary, longest_side
from halve.text.packing import LOCAL_SHUFFLE
from halve.text.special_tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS, MASK, FED, FED_MASK = "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"
"""Keyword arguments of encoder-decoders that read tokens."""


@dataclass(frozen=True)
class PairSet:
    """Pairs, and where they come from. Equal when source and content are.

    Attributes:
        rows: of each pair, the keyword arguments of the model's forward but for the masks, as a batch of one: what
            enters the encoder (``input_ids`` (1, tokens), or features), and ``decoder_input_ids`` (1, tokens).
        source: the file or directory that the user named.
        fields: names of the two fields.
        sha256: hexadecimal hash of the rows.
        seq_len: tokens on each side at most.
        pad: id that stands in places that do not count.
        seed: of the order of the batches.
        bos: empty: what stands around each side is what the tokenizer puts there.
    """

    rows: tuple[Mapping[str, Tensor], ...] = field(compare=False, repr=False)
    source: str
    fields: tuple[str, str]
    sha256: str
    seq_len: int
    pad: int = 0
    seed: int = 0
    bos: str = ""

    @property
    def samples(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    @property
    def encoder_tokens(self) -> int | None:
        """Tokens that the encoder reads in all; None where it does not read tokens."""
        return sum(row[IDS].numel() for row in self.rows) if IDS in self.rows[0] else None

    @property
    def decoder_tokens(self) -> int:
        """Tokens that the decoder is fed in all."""
        return sum(row[FED].numel() for row in self.rows)

    def batches(self, model: nn.Module, most: int) -> list[Batch]:
        """Put pairs of nearly the same length into batches, padded, with masks; none where padding would be counted.

        Args:
            model: the model. One that mixes experts, or takes no masks, gets batches of pairs of equal lengths.
            most: tokens that a batch holds at most, on both sides together (at least one pair).
        """
        pads = not _mixes_experts(model) and _takes(model, FED_MASK)
        batches = [_batch(rows, self.pad, masked=pads) for rows in _groups(self.rows, most, equal=not pads)]
        random.Random(self.seed).shuffle(batches)  # noqa: S311 - else the last, which judge, are the longest
        return batches


def text_pairs(
    source: str | Path,
    fields: tuple[str, str],
    tokenizer: "PreTrainedTokenizerBase",
    model: nn.Module,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
) -> PairSet:
    """Tokenise pairs of texts as for fine-tuning: with special tokens, the second as a target, cut to ``seq_len``.

    Args:
        source: see `halve.text.documents.read_pairs`.
        fields: likewise.
        tokenizer: of the model.
        model: an encoder-decoder that reads text.
        samples: pairs, chosen at random.
        seq_len: tokens on each side at most; None is as many as the model was built for, and 2048 at most.
        seed: of the choice.

    Raises:
        InputError: a pair is not usable, there are fewer than ``samples``, or ``seq_len`` does not fit the model.
    """
    pairs = chosen_pairs(source, fields, samples, seed)
    length = side_length(seq_len, model, (ENCODER, DECODER))
    read = encode(tokenizer, [pair.first for pair in pairs], add_special_tokens=True, longest=length)
    rows = []
    for pair, ids, fed in zip(pairs, read, fed_to_decoder(pairs, tokenizer, model, length), strict=True):
        if not ids:
            raise InputError(f"{pair.where} has nothing that the tokenizer knows in field {fields[0]!r}: remove it")
        rows.append({IDS: torch.tensor([ids]), FED: fed})
        check_vocabulary(rows[-1][IDS], model, pair.where, ENCODER)
    return pair_set(rows, source, fields, length, tokenizer, seed)


def chosen_pairs(source: str | Path, fields: tuple[str, str], samples: int, seed: int) -> list[Pair]:
    """Choose pairs of a source at random.

    Raises:
        InputError: a pair is not usable, or there are fewer than ``samples``.
    """
    order = shuffled(read_pairs(source, fields), seed, max_documents=LOCAL_SHUFFLE)
    pairs = list(islice(order, samples))
    if len(pairs) < samples:
        raise InputError(
            f"source {str(source)!r} has {len(pairs)} pairs, but samples = {samples}: give more pairs, or fewer samples"
        )
    return pairs


def side_length(seq_len: int | None, model: nn.Module, sides: Sequence[str]) -> int:
    """Return how many tokens a side may have: as many as asked for, or as the model was built for.

    Args:
        seq_len: what is asked for; None is 2048, or the model's limit if that is less.
        model: an encoder-decoder.
        sides: those that have tokens.

    Raises:
        InputError: more is asked for than the model was built for.
    """
    if seq_len is None:
        return min([2048, *(limit for side in sides if (limit := longest_side(model, side)) is not None)])
    for side in sides:
        check_side(side, seq_len, seq_len, model)
    return seq_len


def fed_to_decoder(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", model: nn.Module, longest: int
) -> list[Tensor]:
    """Return what the decoder is fed to say the second text of each pair, (1, tokens).

    Raises:
        InputError: the tokens do not fit the model, or it does not say what its decoder begins with.
    """
    labels = encode(tokenizer, [pair.second for pair in pairs], add_special_tokens=True, target=True, longest=longest)
    fed = []
    for pair, ids in zip(pairs, labels, strict=True):
        said = torch.tensor([without_start(ids, model)])
        if said.shape[1] < 2:
            raise InputError(f"{pair.where} leaves the decoder nothing but its start token: remove it from the file")
        check_vocabulary(said, model, pair.where, DECODER)
        fed.append(shift_right(model, said))
    return fed


def pair_set(
    rows: Sequence[Mapping[str, Tensor]],
    source: str | Path,
    fields: tuple[str, str],
    seq_len: int,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
) -> PairSet:
    """Put pairs together with where they come from."""
    digest = hash_tensors(named for row in rows for named in sorted(row.items()))
    pad = tokenizer.pad_token_id
    return PairSet(tuple(rows), str(source), fields, digest, seq_len, 0 if pad is None else pad, seed)


def _groups(rows: Sequence[Mapping[str, Tensor]], most: int, *, equal: bool) -> Iterator[list[Mapping[str, Tensor]]]:
    """Yield groups of rows that make a batch, from the shortest to the longest."""
    group: list[Mapping[str, Tensor]] = []
    for row in sorted(rows, key=_lengths):
        apart = group and (
            (equal and _lengths(row) != _lengths(group[0]))
            or (IDS not in row and _lengths(row)[0] != _lengths(group[0])[0])  # features are not padded
            or (len(group) + 1) * sum(map(max, zip(*map(_lengths, [*group, row]), strict=True))) > most
        )
        if apart:
            yield group
            group = []
        group.append(row)
    yield group


def _lengths(row: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the positions on both sides; those of features are counted along their longer dimension."""
    (read,) = (tensor for name, tensor in row.items() if name != FED)
    return max(read.shape[1:]), row[FED].shape[1]


def _batch(rows: Sequence[Mapping[str, Tensor]], pad: int, *, masked: bool) -> Batch:
    batch = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name not in (IDS, FED):
            batch[name] = torch.cat(tensors)
            continue
        length = max(tensor.shape[1] for tensor in tensors)
        batch[name] = torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=pad) for tensor in tensors])
        if masked:
            valid = [F.pad(torch.ones_like(tensor), (0, length - tensor.shape[1])) for tensor in tensors]
            batch[MASK if name == IDS else FED_MASK] = torch.cat(valid)
    return batch


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an argument."""
    accepted = signature(getattr(model, "base_model", model).forward).parameters
    return name in accepted or any(each.kind is Parameter.VAR_KEYWORD for each in accepted.values())


def _mixes_experts(model: nn.Module) -> bool:
    """Whether a model has lists of like modules inside its blocks, or fused ones: experts lose the tokens' places."""
    for path, module in model.named_modules():
        if any(is_fused(module, parameter) for parameter in module.parameters(recurse=False)):
            return True
        inside = any(part.isdecimal() for part in path.split("."))
        kinds = [type(each) for each in module.children()]
        if inside and isinstance(module, nn.ModuleList | nn.ModuleDict) and len(kinds) > 1 == len(set(kinds)):
            return True
    return False
