"""CodeMatrix: a matrix of small codes in lane16 order, and what turns codes into weights.

A segment is a run of columns whose codes have one width, cut into column groups:

    weight = scale[row, group] * (value(code) - offset[row, group]) + mean[row, group]
    value(code) = table[code], or step * code + base

without the parts that are None. A residual binary weight has one segment of 2-bit codes (first sign, then group or
residual sign) and seven constants a (row, group); its salient columns come first in each group and are multiplied by
inputs of their own. Sparse entries are added on top: scale[row] * (table[code] - zero[row]) - base[row, group].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts import BinaryWeight, CodebookWeight, PackedWeight, PartialBinaryWeight, UniformWeight
from kernels.layouts.bitpack import unpack_bits
from kernels.layouts.residual_binary import ResidualBinaryWeight
from kernels.resident import lane16
from kernels.resident.arrange import arrange_columns, or_none, row_constants, salient_first, take_columns
from kernels.resident.lane16 import Tile
from kernels.resident.sparse import SparseRows, sparse_rows


@dataclass(frozen=True)
class Segment:
    """See the module. words: as lane16.pack makes them. group: columns a group, padding included; None for one group.
    table: float32 [2**width], or [row blocks, 2**width]. scales, means: [row blocks, groups, rows], float16 or
    float32. offsets: int8 of that shape. four: [row blocks, groups, 7, rows] (means of group 0, group 1, salient;
    scales of group 0, group 1, salient first, salient residual). signs: of codes that lie without, see
    kernels/cpu/signs.py."""

    width: int
    words: Tensor
    group: int | None = None
    table: Tensor | None = None
    step: float = 1.0
    base: float = 0.0
    scales: Tensor | None = None
    offsets: Tensor | None = None
    means: Tensor | None = None
    four: Tensor | None = None
    salient_most: int = 0
    signs: Tensor | None = None

    @property
    def columns(self) -> int:
        """Columns of the segment, padding included."""
        return int(self.words.shape[1]) * 2 * lane16.CODES * int(self.words.shape[4])


@dataclass(frozen=True)
class SparsePart:
    """rows: the entries. table: float32 [2**code bits]. scales: [m]; zeros: uint8 [m] or None. base: [m, groups]
    float32, what the dense part gives where an entry is, or None for 0; group: columns of one of its groups."""

    rows: SparseRows
    table: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    base: Tensor | None = None
    group: int = 0


@dataclass(frozen=True)
class CodeMatrix:
    """shape: of the weight. order: int64 [padded columns], the input that each position multiplies, shape[1] for none;
    None: as they are. order_salient: the same for the salient columns of a residual binary weight."""

    layout: str
    shape: tuple[int, int]
    tile: Tile
    segments: tuple[Segment, ...]
    order: Tensor | None = None
    order_salient: Tensor | None = None
    sparse: SparsePart | None = None

    @property
    def padded_columns(self) -> int:
        return sum(segment.columns for segment in self.segments)


def code_matrix(weight: PackedWeight, tile: Tile, *, widest: int = 8) -> CodeMatrix | None:
    """The resident form of `weight`, or None if its layout has none here.

    widest: codes of more bits are split into their low 4 bits and the rest, a segment each.
    """
    if isinstance(weight, CodebookWeight):
        return _codebook(weight, tile) if weight.index_bits + 1 <= min(widest, 5) else None
    if isinstance(weight, UniformWeight):
        return _uniform(weight, tile, widest)
    if isinstance(weight, BinaryWeight):
        return _signs(weight, weight.negative(), weight.scales(), weight.means(), weight.group_size, tile, None)
    if isinstance(weight, PartialBinaryWeight):
        return _partial_binary(weight, tile)
    if isinstance(weight, ResidualBinaryWeight):
        return _residual_binary(weight, tile)
    return None


def padded_group(group: int, columns: int, tile: Tile) -> int | None:
    """Columns that a group takes in a form, or None if one group is all: whole tiles, or an even share of a wide
    one."""
    if group >= columns:
        return None
    if group < tile.columns and tile.words > 1:
        size = 2 * tile.words
        while size < group:
            size *= 2
        return size
    return -(-group // tile.columns) * tile.columns


def _codebook(weight: CodebookWeight, tile: Tile) -> CodeMatrix:
    levels = weight.tensors()["levels"].float()
    half = 1 << weight.index_bits
    table = levels.new_zeros(2 * half)
    table[1 : 1 + levels.numel()] = levels
    table[half + 1 : half + 1 + levels.numel()] = -levels
    codes = weight.index() + half * weight.negative().to(torch.uint8)
    width = weight.index_bits + 1
    segment = Segment(width, lane16.pack(codes, width, tile), table=table)
    return CodeMatrix(weight.layout, weight.shape, tile, (segment,), sparse=codebook_sparse(weight))


def codebook_sparse(weight: CodebookWeight) -> SparsePart | None:
    """The salient weights: code = magnitude, and the sign above it."""
    if not weight.salient:
        return None
    mask = weight.index() == 0
    magnitudes = torch.arange(1 << (weight.salient_bits - 1), device=mask.device)
    values = (2 * magnitudes.float() + 1) / (1 << weight.salient_bits)
    found = ((weight.salient_magnitudes() * (1 << weight.salient_bits) - 1) / 2).round().long()
    codes = found + (weight.negative()[mask].long() << (weight.salient_bits - 1))
    rows = sparse_rows(mask, codes, weight.salient_bits)
    return SparsePart(rows, torch.cat([values, -values]), weight.tensors()["row_scales"])


def _uniform(weight: UniformWeight, tile: Tile, widest: int) -> CodeMatrix:
    columns = weight.shape[1]
    codes, zeros, scales = weight.codes(), weight.zeros(), weight.scales()
    original = weight.permutation()
    widths = torch.tensor(weight.group_widths(), device=codes.device)
    of_column = widths[torch.arange(columns, device=codes.device) // weight.group_size]
    size = padded_group(weight.group_size, columns, tile)
    segments, orders = [], []
    for width in sorted(set(widths.tolist())):
        places = (of_column == width).nonzero().view(-1)
        kept = size or -(-columns // tile.columns) * tile.columns
        order = arrange_columns(places, min(weight.group_size, columns), kept, tile.columns, columns)
        ids = (widths == width).nonzero().view(-1)
        offsets = None if weight.symmetric else (zeros[:, ids].int() - (1 << (width - 1))).to(torch.int8)
        own = take_columns(codes, order)
        groups = order.numel() // size if size else 1  # the last tile may have groups of padding alone
        constants = row_constants(scales[:, ids], tile.rows, groups)
        shifts = None if offsets is None else row_constants(offsets, tile.rows, groups)
        middle = float(1 << (width - 1))
        parts = [(width, own, 1.0, -middle, shifts)]
        if width > widest:
            parts = [(4, own & 15, 1.0, 0.0, shifts), (width - 4, own >> 4, 16.0, -middle, None)]
        for bits, part, step, base, shift in parts:
            words = lane16.pack(part, bits, tile)
            segments.append(Segment(bits, words, size, step=step, base=base, scales=constants, offsets=shift))
            orders.append(order)
    order = torch.cat(orders)
    if original is not None:
        order = torch.cat([original, original.new_tensor([columns])])[order]
    return CodeMatrix(weight.layout, weight.shape, tile, tuple(segments), or_none(order, columns))


def _signs(
    weight: PackedWeight,
    negative: Tensor,
    scales: Tensor,
    means: Tensor | None,
    group: int,
    tile: Tile,
    sparse: SparsePart | None,
) -> CodeMatrix:
    columns = weight.shape[1]
    size = padded_group(group, columns, tile)
    kept = size or -(-columns // tile.columns) * tile.columns
    places = torch.arange(columns, device=negative.device)
    order = arrange_columns(places, min(group, columns), kept, tile.columns, columns)
    groups = order.numel() // size if size else 1
    segment = Segment(
        1,
        lane16.pack(take_columns(negative.to(torch.uint8), order), 1, tile),
        size,
        step=-2.0,
        base=1.0,
        scales=row_constants(scales, tile.rows, groups),
        means=None if means is None else row_constants(means, tile.rows, groups),
    )
    return CodeMatrix(weight.layout, weight.shape, tile, (segment,), or_none(order, columns), sparse=sparse)


def _partial_binary(weight: PartialBinaryWeight, tile: Tile) -> CodeMatrix | None:
    slab = sparse_slab(weight)
    if slab is None:
        return None
    tensors = weight.tensors()
    negative = full_signs(weight)
    sparse = partial_binary_sparse(weight, slab)
    return _signs(weight, negative, tensors["scales"], tensors["means"], weight.group_size, tile, sparse)


def full_signs(weight: PartialBinaryWeight) -> Tensor:
    """[m, n] bool: the signs of a partial binary weight, False where it is salient."""
    mask = weight.mask()
    negative = torch.zeros_like(mask)
    negative[~mask] = weight.negative()
    return negative


def sparse_slab(weight: PartialBinaryWeight) -> int | None:
    """Columns a slab: no slab may reach over two groups. None if the groups do not allow it."""
    most = 1 << (16 - weight.salient_bits)
    if weight.group_size >= weight.shape[1]:
        return most
    divisors = [size for size in range(1, min(most, weight.group_size) + 1) if weight.group_size % size == 0]
    return divisors[-1] if divisors[-1] >= 16 else None


def partial_binary_sparse(weight: PartialBinaryWeight, slab: int) -> SparsePart | None:
    """The salient weights. The dense part sees sign 0 there, so what it gives, mean + scale, is taken off again."""
    if not weight.salient:
        return None
    tensors, bits = weight.tensors(), weight.salient_bits
    codes = unpack_bits(tensors["salient_codes"], bits, weight.salient)
    return SparsePart(
        sparse_rows(weight.mask(), codes, bits, slab),
        torch.arange(1 << bits, device=codes.device).float(),
        tensors["salient_scales"],
        zeros=unpack_bits(tensors["salient_zeros"], bits, weight.shape[0]),
        base=tensors["means"].float() + tensors["scales"].float(),
        group=min(weight.group_size, weight.shape[1]),
    )


def _residual_binary(weight: ResidualBinaryWeight, tile: Tile) -> CodeMatrix:
    columns = weight.shape[1]
    salient = weight.salient_columns()
    second = torch.zeros(weight.shape, dtype=torch.bool, device=salient.device)
    second[:, salient] = weight.residual_negative()
    second[:, ~salient] = weight.sparse()
    first, _, most = salient_first(weight)
    size = padded_group(weight.block_size, columns, tile)
    kept = size or -(-columns // tile.columns) * tile.columns
    order = arrange_columns(first, min(weight.block_size, columns), kept, tile.columns, columns)
    codes = weight.negative().to(torch.uint8) | (second.to(torch.uint8) << 1)
    constants = torch.cat([weight.means(), weight.scales()], dim=2)
    segment = Segment(
        2,
        lane16.pack(take_columns(codes, order), 2, tile),
        size,
        four=row_constants(constants, tile.rows, order.numel() // size if size else 1),
        salient_most=most,
    )
    nothing = torch.full_like(order, columns)
    marked = torch.cat([salient, salient.new_zeros(1)])[order]
    return CodeMatrix(
        weight.layout,
        weight.shape,
        tile,
        (segment,),
        torch.where(marked, nothing, order),
        torch.where(marked, order, nothing),
    )
