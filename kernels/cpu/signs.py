"""Codes of 5 bits as 4 bits and a plane of signs, for instruction sets whose lookups know 16 entries (AVX2).

The bytes are as many as before. The sign plane is lane16 of width 1 with the columns of a tile in an order of its own:
bit p of a byte is the sign of the code that the p-th lookup of 32 codes takes from that byte (see code_bytes.h).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.resident import CodeMatrix, lane16
from kernels.resident.codes import Segment


def signs_apart(form: CodeMatrix) -> CodeMatrix:
    """`form` with the signs apart in each segment whose upper half of the table is the lower one, negative."""
    return replace(form, segments=tuple(_signs_apart(part, form.tile) for part in form.segments))


def _signs_apart(part: Segment, tile: lane16.Tile) -> Segment:
    table = part.table
    if part.width != 5 or table is None or table.dim() != 1 or not torch.equal(table[:16], -table[16:]):
        return part
    row_blocks, tiles, _, rows, _ = part.words.shape
    codes = lane16.unpack(part.words, (row_blocks * rows, tiles * tile.columns))
    negative = (codes >> 4).view(-1, tiles, tile.columns)[:, :, _sign_columns()].view_as(codes)
    words, signs = lane16.pack(codes & 15, 4, tile), lane16.pack(negative, 1, tile)
    return replace(part, width=4, words=words, signs=signs, table=table[:16])


def _sign_columns() -> Tensor:
    """[32]: the column of a tile whose sign stands at each column of the plane.

    Lookup p takes code 4 (p // 2) + p % 2 and the code 8 bits above it, two further; of signs, bits 8 apart are 8 codes
    apart. A code is two columns, one in each lane.
    """
    lookup = torch.arange(8)
    first = 4 * (lookup // 2) + lookup % 2
    codes = torch.cat([first, first + 2])
    return (2 * codes[:, None] + torch.arange(2)).view(-1)
