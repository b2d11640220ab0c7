"""What the kernels of `halve.runtime.kernels.triton_packed` make of a group of four columns, in registers.

Where the two kept weights of groups are is said by four tiles of truth values: the first one is at 0 if ``at0``, else
at 1 if ``at1``, else at 2; the last at 3 if ``at3``, else at 2 if ``at2``, else at 1. Groups are a tile's columns, rows
of W its rows.
"""

import triton
import triton.language as tl


@triton.jit
def two_numbers(pair, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Return the two numbers of 16 bits in a word, the lower half first, in float32 if wide."""
    if WIDE and KIND == tl.bfloat16:  # noqa: SIM300 - the upper half of a float32
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pair & 0xFFFF).to(tl.int16).to(KIND, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(KIND, bitcast=True)
        if WIDE:
            low = low.to(tl.float32)
            high = high.to(tl.float32)
    return low, high


@triton.jit
def four_numbers(word, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Return the four numbers of x in words, in float32 if wide."""
    x0, x1 = two_numbers(word.to(tl.int32), KIND, WIDE)
    x2, x3 = two_numbers((word >> 32).to(tl.int32), KIND, WIDE)
    return x0, x1, x2, x3


@triton.jit
def spread(first, last, at0, at1, at2, at3):
    """Return the weights at each of the four columns of groups."""
    zero = tl.zeros_like(first)
    w0 = tl.where(at0, first, zero)
    w1 = tl.where(at0, tl.where(at2 | at3, zero, last), tl.where(at1, first, zero))
    w2 = tl.where(at3, tl.where(at0 | at1, zero, first), tl.where(at2, last, zero))
    w3 = tl.where(at3, last, zero)
    return w0, w1, w2, w3


@triton.jit
def places_of_bits(mask_ptr, row, group, groups, mask_words):
    """Return ``at0, at1, at2, at3`` of groups, whose mask has eight to a word; nothing is kept beyond the last."""
    at = row[:, None] * mask_words + (group // 8)[None, :]
    bits = tl.load(mask_ptr + at, mask=(group < groups)[None, :], other=0) >> ((group % 8) * 4)[None, :]
    return (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0


@triton.jit
def places_of_bytes(word, q: tl.constexpr):
    """Return ``at0, at1, at2, at3`` of the groups that the q-th two bits of words of two bytes of places belong to."""
    first = word & (3 << (2 * q))
    last = word & (3 << (2 * q + 8))
    return first == 0, first == (1 << (2 * q)), last == (2 << (2 * q + 8)), last == (3 << (2 * q + 8))


@triton.jit
def scales(scales_ptr, row, word, half: tl.constexpr, words):
    """Return the scales of the groups in one half of a strip; ``word`` counts words of places, 8 a strip."""
    at = row[:, None] * (words // 4) + (word // 8 * 2 + half)[None, :]
    return tl.load(scales_ptr + at, mask=(word < words)[None, :], other=0.0).to(tl.float32)


@triton.jit
def integers(codes_ptr, row, word, q: tl.constexpr, words, BITS: tl.constexpr):
    """Return the two integers of the groups that the q-th two bits of places belong to, in float32."""
    inside = (word < words)[None, :]
    if BITS == 8:
        at = row[:, None] * (4 * words) + (word // 8 * 32 + 8 * q + word % 8)[None, :]
        both = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32) ^ 0x8080
        low = both & 0xFF
        high = (both >> 8) & 0xFF
        zero = 128.0
    else:
        at = row[:, None] * (2 * words) + (word // 8 * 16 + 8 * (q % 2) + word % 8)[None, :]
        both = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
        low = (both >> (4 * (q // 2))) & 0xF
        high = (both >> (4 * (q // 2) + 8)) & 0xF
        zero = 8.0
    # Or-ed into the last bits of 2^23, whose unit is 1, an integer is 2^23 + itself: no conversion is needed.
    low = (low | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
    high = (high | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
    return low, high


@triton.jit
def narrowed(weight, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Return float32 rounded to a kind of 16 bits; in float32 again if wide."""
    weight = weight.to(KIND)
    if WIDE:
        weight = weight.to(tl.float32)
    return weight


@triton.jit
def bits_of(number):
    """Return the 16 bits of numbers, in the lower halves of words."""
    return number.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
