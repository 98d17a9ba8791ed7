"""The kernels of the trellis layout: few vectors times a trellis matrix, and its values written out for many vectors.

A program owns a block of rows of one segment and a slab of live columns, which stand in order of their rate classes:
what depends on the class, the first bits of the states and the table, is read once for a run of columns. A weight
costs two loads of 16 bits, which its neighbours share, and a table lookup in the first-level cache. Everything is in
float32; the rotation comes after the product (kernels/triton/trellis.py).
"""

import triton
import triton.language as tl

CLASSES = tl.constexpr(16)
SEGMENT = tl.constexpr(256)
STATES = tl.constexpr(4096)


@triton.jit
def load_values(words, table, bit, start, ok):
    """[BN, BC]: table values of the states at bits `bit` [BN] of the streams at words `start` [BC]; 0 if not ok."""
    at = words + start[None, :] + (bit >> 4)[:, None]
    low = tl.load(at, mask=ok, other=0).to(tl.int32) & 0xFFFF
    high = tl.load(at + 1, mask=ok, other=0).to(tl.int32) << 16
    state = ((low | high) >> (bit & 15)[:, None]) & (STATES - 1)
    return tl.load(table + state, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["rows", "live", "segments", "blocks", "each", "vectors"])
def product_kernel(
    words, x, tables, bounds, begins, windows, segment_words, starts, out,
    rows, live, segments, blocks, each, vectors,
    BN: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out[split, m, row], float32: the sums over live columns split * each .. of value * x[m, column], not rotated.

    x: [vectors, live], float32, in the order of the live columns and times their factors. blocks: row blocks of a
    segment. Every element of `out` is written.
    """
    segment = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    first_row = tl.load(starts + segment)
    there = t < tl.load(starts + segment + 1) - first_row
    split = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    first = split * each
    last = tl.minimum(live, first + each)
    alone = tl.zeros([BN, BC], tl.float32)  # BM = 1: added up over columns at the end
    total = tl.zeros([BN, BM], tl.float32)
    for rate_class in range(1, CLASSES):
        begin = tl.maximum(first, tl.load(bounds + rate_class))
        end = tl.minimum(last, tl.load(bounds + rate_class + 1))
        bit = tl.load(windows + rate_class * SEGMENT + t)
        size = tl.load(segment_words + rate_class * (segments + 1) + segments)
        origin = tl.load(begins + rate_class) + tl.load(segment_words + rate_class * (segments + 1) + segment)
        for done in range(begin, end, BC):
            column = done + c
            some = column < end
            start = origin + (column - tl.load(bounds + rate_class)) * size
            value = load_values(words, tables + rate_class * STATES, bit, start, there[:, None] & some[None, :])
            if BM == 1:
                alone += value * tl.load(x + tl.program_id(2) * live + column, mask=some, other=0.0)[None, :]
            else:
                known = some[:, None] & (m < vectors)[None, :]
                xv = tl.load(x + column[:, None] + m[None, :] * live, mask=known, other=0.0)
                total += tl.sum(value[:, :, None] * xv[None, :, :], 1)
    if BM == 1:
        total = tl.sum(alone, 1)[:, None]
    to = (split * vectors + m[None, :]) * rows + (first_row + t)[:, None]
    tl.store(out + to, total, mask=there[:, None] & (m < vectors)[None, :])


@triton.jit(do_not_specialize=["rows", "segments", "blocks", "start_column", "columns"])
def values_kernel(
    words, tables, factors, bounds, begins, windows, segment_words, starts, out,
    rows, segments, blocks, start_column, columns,
    BN: tl.constexpr, BC: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """out[i, row], float32, i < columns: value * factor of live column start_column + i, not rotated."""
    segment = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    first_row = tl.load(starts + segment)
    there = t < tl.load(starts + segment + 1) - first_row
    c = tl.arange(0, BC)
    first = start_column + tl.program_id(1) * SLAB
    last = tl.minimum(start_column + columns, first + SLAB)
    for rate_class in range(1, CLASSES):
        begin = tl.maximum(first, tl.load(bounds + rate_class))
        end = tl.minimum(last, tl.load(bounds + rate_class + 1))
        bit = tl.load(windows + rate_class * SEGMENT + t)
        size = tl.load(segment_words + rate_class * (segments + 1) + segments)
        origin = tl.load(begins + rate_class) + tl.load(segment_words + rate_class * (segments + 1) + segment)
        for done in range(begin, end, BC):
            column = done + c
            some = column < end
            start = origin + (column - tl.load(bounds + rate_class)) * size
            ok = there[:, None] & some[None, :]
            value = load_values(words, tables + rate_class * STATES, bit, start, ok)
            value *= tl.load(factors + column, mask=some, other=0.0)[None, :]
            to = (column - start_column)[None, :].to(tl.int64) * rows + (first_row + t)[:, None]
            tl.store(out + to, value, mask=ok)
