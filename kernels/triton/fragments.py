"""What the kernels share: fields of lane16 words as weights, and the sparse entries.

A tile is [BN rows, 8 words] a chunk, 256 columns; field e of it is columns 16 e .. 16 e + 15 of the tile, the two
halves of word c being columns 2 c and 2 c + 1. Everything is unrolled over the 16 fields, so shifts are constants.
"""

import math

import triton
import triton.language as tl


@triton.constexpr_function
def is_plain(e, width):
    """True if field e lies in one chunk, False if it is made up of what is left of several."""
    chunks, codes = width // math.gcd(width, 16), 16 // math.gcd(width, 16)
    return e % codes < chunks * (16 // width)


@triton.constexpr_function
def starts_chunk(e, width):
    """True if field e is the first of a chunk."""
    return e % (16 // math.gcd(width, 16)) % (16 // width) == 0 and is_plain(e, width)


@triton.constexpr_function
def chunk_of(e, width):
    """The chunk of plain field e."""
    chunks, codes = width // math.gcd(width, 16), 16 // math.gcd(width, 16)
    return e // codes * chunks + e % codes // (16 // width)


@triton.constexpr_function
def chunk_in_unit(e, width):
    """The number of plain field e's chunk in its unit."""
    return e % (16 // math.gcd(width, 16)) // (16 // width)


@triton.constexpr_function
def bit_of(e, width):
    """The lowest bit of field e, in its chunk or in what is left of a unit's chunks."""
    chunks, codes = width // math.gcd(width, 16), 16 // math.gcd(width, 16)
    plain = 16 // width
    return e % codes % plain * width if is_plain(e, width) else (e % codes - chunks * plain) * width


@triton.jit
def load_chunk(words, tile, chunk, WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """[BN, BW] uint32 words of one chunk; `words` points at the row block."""
    r = tl.arange(0, BN)
    c = tl.arange(0, BW)
    at = (tile * WIDTH + chunk) * (BN * BW) + r[:, None] * BW + c[None, :]
    return tl.load(words + at).to(tl.uint32, bitcast=True)


@triton.jit
def next_words(own, tile, word, rest, e: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """The words and the collected remnants, [BN, BW] uint32 each, from which field e can be read.

    own: the words of the row block. word, rest: those of the field before.
    """
    PLAIN: tl.constexpr = 16 // WIDTH
    LEFT: tl.constexpr = 16 - PLAIN * WIDTH
    REST: tl.constexpr = ((1 << LEFT) - 1) * 0x00010001
    if starts_chunk(e, WIDTH):
        word = load_chunk(own, tile, chunk_of(e, WIDTH), WIDTH, BN, BW)
        if LEFT > 0:
            piece = (word >> (PLAIN * WIDTH)) & REST
            if chunk_in_unit(e, WIDTH) == 0:
                rest = piece
            else:
                rest = rest | (piece << (chunk_in_unit(e, WIDTH) * LEFT))
    return word, rest


@triton.jit
def join_halves(low, high, BN: tl.constexpr, BW: tl.constexpr):
    """[BN, BW] values of the two halves: [BN, 2 * BW] in column order."""
    return tl.join(low, high).reshape(BN, 2 * BW)


@triton.jit
def affine_values(
    word, shift: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr
):
    """1 + code / 2**WIDTH, [BN, 2 * BW]: the code's bits at the top of the mantissa of 1.0, exact in 16 bits."""
    if DTYPE == tl.float32:
        low = ((word >> shift) & ((1 << WIDTH) - 1)).to(tl.float32) * (1.0 / (1 << WIDTH)) + 1.0
        high = ((word >> (shift + 16)) & ((1 << WIDTH) - 1)).to(tl.float32) * (1.0 / (1 << WIDTH)) + 1.0
        return join_halves(low, high, BN, BW)
    else:
        MANTISSA: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
        ONE: tl.constexpr = 0x3F803F80 if DTYPE == tl.bfloat16 else 0x3C003C00
        TOP: tl.constexpr = MANTISSA - WIDTH
        MASK: tl.constexpr = (((1 << WIDTH) - 1) << TOP) * 0x00010001
        if TOP >= shift:
            moved = word << (TOP - shift)
        else:
            moved = word >> (shift - TOP)
        both = (moved & MASK) | ONE
        low = (both & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        return join_halves(low, high, BN, BW)


@triton.jit
def table_values(word, shift: tl.constexpr, table, MASK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """(low, high) [BN, BW] float32: entries of `table` [32], which one warp holds in its lanes."""
    low = tl.gather(table, ((word >> shift) & MASK).to(tl.int32).reshape(BN * BW), 0).reshape(BN, BW)
    high = tl.gather(table, ((word >> (shift + 16)) & MASK).to(tl.int32).reshape(BN * BW), 0).reshape(BN, BW)
    return low, high


@triton.jit
def choose(word, shift: tl.constexpr, t0, t1, t2, t3):
    """[BN, BW]: t<code> of the row, for the 2-bit code at `shift`; t0 .. t3 are [BN]."""
    first = ((word >> shift) & 1) != 0
    second = ((word >> (shift + 1)) & 1) != 0
    return tl.where(second, tl.where(first, t3[:, None], t2[:, None]), tl.where(first, t1[:, None], t0[:, None]))


@triton.jit
def four_values(word, shift: tl.constexpr, t0, t1, t2, t3, DTYPE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """[BN, 2 * BW] of DTYPE: one of the row's four values."""
    low = choose(word, shift, t0, t1, t2, t3).to(DTYPE)
    high = choose(word, shift + 16, t0, t1, t2, t3).to(DTYPE)
    return join_halves(low, high, BN, BW)


@triton.jit
def load_four(four, at, BN: tl.constexpr):
    """The four values of a (row, group), of columns that are not salient and of those that are; each [BN] float32.

    four: [.., 7, BN] (see kernels/resident/codes.py); `at` is the first constant of the group.
    """
    r = tl.arange(0, BN)
    mean0 = tl.load(four + at + r).to(tl.float32)
    mean1 = tl.load(four + at + BN + r).to(tl.float32)
    mean2 = tl.load(four + at + 2 * BN + r).to(tl.float32)
    scale0 = tl.load(four + at + 3 * BN + r).to(tl.float32)
    scale1 = tl.load(four + at + 4 * BN + r).to(tl.float32)
    scale2 = tl.load(four + at + 5 * BN + r).to(tl.float32)
    scale3 = tl.load(four + at + 6 * BN + r).to(tl.float32)
    high, low = mean2 + scale2, mean2 - scale2
    return (
        mean0 + scale0, mean0 - scale0, mean1 + scale1, mean1 - scale1,
        high + scale3, low + scale3, high - scale3, low - scale3,
    )  # fmt: skip


@triton.jit
def sparse_sum(
    x, entries, pointers, table, scales, zeros, base, block, first, step, slabs, rows, columns,
    SLAB: tl.constexpr, COLUMN_BITS: tl.constexpr, HAS_BASE: tl.constexpr, BASE_GROUP: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[BN] float32: what the sparse entries of a row block add for the inputs at `x`, the share of program `first` of
    `step`.

    Programs share the slabs, and where there are fewer slabs than programs, the chunks of a slab: a row has about 40
    entries a slab, in loads that wait for each other, and one program would still be at them when all others are done.
    """
    row = block * BN + tl.arange(0, BN)
    there = row < rows
    q = tl.arange(0, CHUNK)
    total = tl.zeros([BN], tl.float32)
    scale = tl.load(scales + row, mask=there, other=0.0).to(tl.float32)
    if HAS_BASE:
        zero = tl.load(zeros + row, mask=there, other=0).to(tl.float32)
        groups = (columns + BASE_GROUP - 1) // BASE_GROUP
    ways = tl.maximum(step // slabs, 1)
    for unit in range(first, slabs * ways, step):
        slab = unit // ways
        start = tl.load(pointers + slab * (rows + 1) + row, mask=there, other=0)
        end = tl.load(pointers + slab * (rows + 1) + row + 1, mask=there, other=0)
        weighted = tl.zeros([BN, CHUNK], tl.float32)
        plain = tl.zeros([BN, CHUNK], tl.float32)
        for done in range(unit % ways * CHUNK, tl.max(end - start, 0), ways * CHUNK):
            at = start[:, None] + done + q[None, :]
            ok = at < end[:, None]
            entry = tl.load(entries + at, mask=ok, other=0).to(tl.int32) & 0xFFFF
            column = slab * SLAB + (entry & ((1 << COLUMN_BITS) - 1))
            value = tl.load(x + column, mask=ok, other=0.0).to(tl.float32)
            weighted += tl.load(table + (entry >> COLUMN_BITS), mask=ok, other=0.0) * value
            if HAS_BASE:
                plain += value
        found = tl.sum(weighted, 1)
        if HAS_BASE:
            inputs = tl.sum(plain, 1)
            given = tl.load(base + row * groups + slab * SLAB // BASE_GROUP, mask=there, other=0.0)
            total += scale * (found - zero * inputs) - given * inputs
        else:
            total += scale * found
    return total
