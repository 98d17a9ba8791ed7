"""The kernels: few vectors times a packed matrix, and a packed matrix decoded into a dense one.

A program owns one row block and one slab of columns (split-K); it writes partial sums, which `reduce_kernel` adds up in
a fixed order, so that results do not change from run to run. Table lookups are warp shuffles, which is why every
program that looks up is one warp. Widths, groups and kinds are compile-time constants; sizes are not, so that shapes
share code.
"""

import triton
import triton.language as tl

from kernels.triton.fragments import (
    affine_values,
    bit_of,
    four_values,
    is_plain,
    join_halves,
    load_four,
    next_words,
    sparse_sum,
    table_values,
)

AFFINE = tl.constexpr(0)
TABLE = tl.constexpr(1)
FOUR = tl.constexpr(2)


@triton.jit
def field_values(
    word, shift: tl.constexpr, table, t0, t1, t2, t3,
    KIND: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """[BN, 2 * BW] of DTYPE: the weights of one field, before the scale where there is one."""
    if KIND == AFFINE:
        return affine_values(word, shift, WIDTH, DTYPE, BN, BW)
    elif KIND == TABLE:
        low, high = table_values(word, shift, table, (1 << WIDTH) - 1, BN, BW)
        return join_halves(low.to(DTYPE), high.to(DTYPE), BN, BW)
    else:
        return four_values(word, shift, t0, t1, t2, t3, DTYPE, BN, BW)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "plain_columns", "vectors", "stride", "tiles", "tiles_a_split", "groups", "slabs"
    ]
)  # fmt: skip
def dot_kernel(
    words, x, x_salient, table, scales, offsets, means, four, out,
    plain, entries, pointers, sparse_table, sparse_scales, sparse_zeros, sparse_base,
    rows, columns, plain_columns, vectors, stride, tiles, tiles_a_split, groups, slabs,
    step, base,
    KIND: tl.constexpr, WIDTH: tl.constexpr,
    GROUP_FIELDS: tl.constexpr, GROUP_TILES: tl.constexpr, SALIENT_FIELDS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, HAS_MEANS: tl.constexpr, HAS_SPARSE: tl.constexpr, HAS_BASE: tl.constexpr,
    SLAB: tl.constexpr, COLUMN_BITS: tl.constexpr, BASE_GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, DTYPE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """out[split, m, row], float32: the products of one slab of columns, for BM of the vectors.

    x, x_salient: [vectors, stride]; columns from `columns` on count as 0. plain: the inputs in their own order,
    [vectors, plain_columns], for the sparse entries. GROUP_FIELDS: fields a group, where groups are
    smaller than a tile, else 16; GROUP_TILES: tiles a group otherwise. SALIENT_FIELDS: fields at the start of each
    group that may hold salient columns (FOUR). UP: multiply in float32 (the interpreter cannot multiply bfloat16).
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    BW: tl.constexpr = 8
    own = words + block.to(tl.int64) * tiles * (WIDTH * BN * BW)
    r = tl.arange(0, BN)
    k = tl.arange(0, 16)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    inputs = m[None, :] * stride + k[:, None]
    some = m[None, :] < vectors
    total = tl.zeros([BN, BM], tl.float32)
    sums = tl.zeros([BN, BM], tl.float32)
    of_x = tl.zeros([16, BM], tl.float32)
    held = tl.zeros([BN], tl.float32)
    t0, t1, t2, t3, s0, s1, s2, s3 = held, held, held, held, held, held, held, held
    if KIND == TABLE:
        held_table = tl.load(table + block * 32 + tl.arange(0, 32))
    else:
        held_table = tl.zeros([32], tl.float32)
    rest = tl.zeros([BN, BW], tl.uint32)
    word = tl.zeros([BN, BW], tl.uint32)
    for tile in range(split * tiles_a_split, tl.minimum(tiles, (split + 1) * tiles_a_split)):
        for e in tl.static_range(16):
            if KIND == FOUR and e % GROUP_FIELDS == 0:
                group = tile * (16 // GROUP_FIELDS) // GROUP_TILES + e // GROUP_FIELDS
                at = (block * groups + group) * (7 * BN)
                t0, t1, t2, t3, s0, s1, s2, s3 = load_four(four, at, BN)
            word, rest = next_words(own, tile, word, rest, e, WIDTH, BN, BW)
            source = word if is_plain(e, WIDTH) else rest
            w = field_values(source, bit_of(e, WIDTH), held_table, t0, t1, t2, t3, KIND, WIDTH, DTYPE, BN, BW)
            column = tile * 256 + e * 16
            ok = some & ((column + k)[:, None] < columns)
            xv = tl.load(x + inputs + column, mask=ok, other=0.0)
            if KIND == AFFINE:
                of_x += xv.to(tl.float32)
            if UP:
                sums = tl.dot(w.to(tl.float32), xv.to(tl.float32), sums, input_precision="ieee")
            else:
                sums = tl.dot(w, xv, sums, input_precision="ieee")
            if KIND == FOUR and e % GROUP_FIELDS < SALIENT_FIELDS:
                ws = four_values(source, bit_of(e, WIDTH), s0, s1, s2, s3, DTYPE, BN, BW)
                xs = tl.load(x_salient + inputs + column, mask=ok, other=0.0)
                if UP:
                    sums = tl.dot(ws.to(tl.float32), xs.to(tl.float32), sums, input_precision="ieee")
                else:
                    sums = tl.dot(ws, xs, sums, input_precision="ieee")
            if KIND == AFFINE and e % GROUP_FIELDS == GROUP_FIELDS - 1:
                # sums holds x * (1 + code / 2**WIDTH); constants are [row blocks, groups, BN].
                group = tile * (16 // GROUP_FIELDS) // GROUP_TILES + e // GROUP_FIELDS
                at = (block * groups + group) * BN + r
                inputs_sum = tl.sum(of_x, 0)
                codes = (sums - inputs_sum[None, :]) * (1 << WIDTH)
                constant = tl.zeros([BN], tl.float32) + base
                if HAS_OFFSETS:
                    constant = constant - tl.load(offsets + at).to(tl.float32)
                scale = tl.load(scales + at).to(tl.float32)
                total += scale[:, None] * (codes * step + constant[:, None] * inputs_sum[None, :])
                if HAS_MEANS:
                    total += tl.load(means + at).to(tl.float32)[:, None] * inputs_sum[None, :]
                sums = tl.zeros([BN, BM], tl.float32)
                of_x = tl.zeros([16, BM], tl.float32)
    if KIND != AFFINE:
        total = sums
    if HAS_SPARSE:
        for one in range(tl.program_id(2) * BM, tl.minimum(vectors, (tl.program_id(2) + 1) * BM)):
            added = sparse_sum(
                plain + one * plain_columns, entries, pointers, sparse_table, sparse_scales, sparse_zeros, sparse_base,
                block, split, tl.num_programs(1), slabs, rows, plain_columns,
                SLAB, COLUMN_BITS, HAS_BASE, BASE_GROUP, BN, 8,
            )  # fmt: skip
            total += tl.where(m[None, :] == one, added[:, None], 0.0)
    row = block * BN + r
    to = (split * vectors + m[None, :]) * rows + row[:, None]
    tl.store(out + to, total, mask=some & (row[:, None] < rows))


@triton.jit(do_not_specialize=["rows", "columns", "tiles", "tiles_a_split", "slabs"])
def table_kernel(
    words, x, table, out,
    entries, pointers, sparse_table, sparse_scales, sparse_zeros, sparse_base,
    rows, columns, tiles, tiles_a_split, slabs,
    WIDTH: tl.constexpr, HAS_SPARSE: tl.constexpr,
    SLAB: tl.constexpr, COLUMN_BITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[split, row], float32: one vector times a codebook matrix, with exact levels, in float32 whatever x is."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    BW: tl.constexpr = 8
    own = words + block.to(tl.int64) * tiles * (WIDTH * BN * BW)
    k = tl.arange(0, 16)
    held = tl.load(table + block * 32 + tl.arange(0, 32))
    total = tl.zeros([BN, BW], tl.float32)
    rest = tl.zeros([BN, BW], tl.uint32)
    word = tl.zeros([BN, BW], tl.uint32)
    for tile in range(split * tiles_a_split, tl.minimum(tiles, (split + 1) * tiles_a_split)):
        for e in tl.static_range(16):
            column = tile * 256 + e * 16
            xv = tl.load(x + column + k, mask=column + k < columns, other=0.0).to(tl.float32)
            x0, x1 = tl.split(xv.reshape(BW, 2))
            word, rest = next_words(own, tile, word, rest, e, WIDTH, BN, BW)
            source = word if is_plain(e, WIDTH) else rest
            low, high = table_values(source, bit_of(e, WIDTH), held, (1 << WIDTH) - 1, BN, BW)
            total += low * x0[None, :]
            total += high * x1[None, :]
    sums = tl.sum(total, 1)
    if HAS_SPARSE:
        sums += sparse_sum(
            x, entries, pointers, sparse_table, sparse_scales, sparse_zeros, sparse_base,
            block, split, tl.num_programs(1), slabs, rows, columns, SLAB, COLUMN_BITS, False, 1, BN, 8,
        )  # fmt: skip
    row = block * BN + tl.arange(0, BN)
    tl.store(out + split * rows + row, sums, mask=row < rows)


@triton.jit(do_not_specialize=["count", "splits"])
def reduce_kernel(partial, bias, out, count, splits, rows, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    """out[i] = the sum over splits of partial[split, i] (and bias[i % rows]), i < count, in the dtype of out."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    ok = i < count
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * count + i, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + i % rows, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "tiles", "groups", "stride", "start", "first"])
def decode_kernel(
    words, marked, table, scales, offsets, means, four, out,
    rows, tiles, groups, stride, start, first, step, base,
    KIND: tl.constexpr, WIDTH: tl.constexpr, GROUP_FIELDS: tl.constexpr, GROUP_TILES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, HAS_MEANS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[row, start + column], [rows, stride]: the dense weights of one tile, columns in prepared order, without the
    sparse entries. The first row of `out` is that of row block `first`. marked: int8 [columns], 1 where a column is
    salient (FOUR).
    """
    block = first + tl.program_id(0)
    tile = tl.program_id(1)
    BW: tl.constexpr = 8
    own = words + block.to(tl.int64) * tiles * (WIDTH * BN * BW)
    r = tl.arange(0, BN)
    row = tl.program_id(0) * BN + r
    held = tl.zeros([BN], tl.float32)
    t0, t1, t2, t3 = held, held, held, held
    if KIND == TABLE:
        held_table = tl.load(table + block * 32 + tl.arange(0, 32))
    else:
        held_table = tl.zeros([32], tl.float32)
    rest = tl.zeros([BN, BW], tl.uint32)
    word = tl.zeros([BN, BW], tl.uint32)
    for e in tl.static_range(16):
        group = tile * (16 // GROUP_FIELDS) // GROUP_TILES + e // GROUP_FIELDS
        column = tile * 256 + e * 16 + tl.arange(0, 16)
        word, rest = next_words(own, tile, word, rest, e, WIDTH, BN, BW)
        source = word if is_plain(e, WIDTH) else rest
        if KIND == FOUR:
            at = (block * groups + group) * (7 * BN)
            t0, t1, t2, t3, s0, s1, s2, s3 = load_four(four, at, BN)
            w = four_values(source, bit_of(e, WIDTH), t0, t1, t2, t3, tl.float32, BN, BW)
            ws = four_values(source, bit_of(e, WIDTH), s0, s1, s2, s3, tl.float32, BN, BW)
            w = tl.where(tl.load(marked + column)[None, :] != 0, ws, w)
        else:
            w = field_values(source, bit_of(e, WIDTH), held_table, t0, t1, t2, t3, KIND, WIDTH, tl.float32, BN, BW)
        if KIND == AFFINE:
            at = (block * groups + group) * BN + r
            constant = tl.zeros([BN], tl.float32) + base
            if HAS_OFFSETS:
                constant = constant - tl.load(offsets + at).to(tl.float32)
            w = tl.load(scales + at).to(tl.float32)[:, None] * ((w - 1.0) * (1 << WIDTH) * step + constant[:, None])
            if HAS_MEANS:
                w += tl.load(means + at).to(tl.float32)[:, None]
        to = out + row[:, None].to(tl.int64) * stride + (start + column)[None, :]
        tl.store(to, w.to(out.dtype.element_ty), mask=row[:, None] < rows)


@triton.jit(do_not_specialize=["rows", "all_rows", "stride", "first"])
def scatter_kernel(
    entries, pointers, table, scales, zeros, places, out, rows, all_rows, stride, first,
    SLAB: tl.constexpr, COLUMN_BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_PLACES: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sparse entries into a dense [rows, stride] whose first row is row `first`. places: int32, where a column lies."""
    slab = tl.program_id(1)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < rows
    start = tl.load(pointers + slab * (all_rows + 1) + first + row, mask=there, other=0)
    end = tl.load(pointers + slab * (all_rows + 1) + first + row + 1, mask=there, other=0)
    scale = tl.load(scales + first + row, mask=there, other=0.0).to(tl.float32)
    zero = tl.zeros([BN], tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros + first + row, mask=there, other=0).to(tl.float32)
    for done in range(0, tl.max(end - start, 0), CHUNK):
        at = start[:, None] + done + tl.arange(0, CHUNK)[None, :]
        ok = at < end[:, None]
        entry = tl.load(entries + at, mask=ok, other=0).to(tl.int32) & 0xFFFF
        column = slab * SLAB + (entry & ((1 << COLUMN_BITS) - 1))
        if HAS_PLACES:
            column = tl.load(places + column, mask=ok, other=0)
        value = scale[:, None] * (tl.load(table + (entry >> COLUMN_BITS), mask=ok, other=0.0) - zero[:, None])
        to = out + row[:, None].to(tl.int64) * stride + column
        tl.store(to, value.to(out.dtype.element_ty), mask=ok)
