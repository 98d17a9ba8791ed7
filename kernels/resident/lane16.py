"""lane16: the order of bits that kernels read codes in. Any width of 1 to 8 bits, no bit wasted, wide loads.

A matrix is cut into tiles of `rows` rows and 32 * words columns. In a tile each row owns `words` 32-bit words a
chunk, and `width` chunks; a word is two 16-bit lanes, so a row has 2 * words lanes, and each lane holds 16 codes in
its `width` halves. Code e of lane l is column e * lanes + l of the tile: one field of a chunk is a run of consecutive
columns.

    16 // width codes lie in a half as plain fields; what is left of the halves of a unit holds the other codes, the
    first half's bits lowest. A unit is width / gcd(width, 16) chunks, the fewest that hold whole codes.

Stored as int32 [row blocks, column blocks, width, rows, words], so that the words that neighbouring threads (or vector
lanes) read are neighbours in memory. Padding holds code 0. The map is a bijection: `unpack(pack(codes)) == codes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

CODES = 16
"""Codes of one lane in one tile."""


@dataclass(frozen=True)
class Tile:
    """rows of a tile; words: 32-bit words a row and chunk."""

    rows: int
    words: int

    @property
    def columns(self) -> int:
        return 2 * CODES * self.words


@dataclass(frozen=True)
class Field:
    """`bits` bits of code `code`, from its bit `low` on, lie in chunk `chunk` of a lane, from bit `shift` on."""

    code: int
    low: int
    bits: int
    chunk: int
    shift: int


@cache
def fields(width: int) -> tuple[Field, ...]:
    """Where the 16 codes of a lane lie."""
    chunks, codes = width // gcd(width, CODES), CODES // gcd(width, CODES)
    plain = 16 // width
    left = 16 - plain * width
    found = []
    for code in range(CODES):
        unit, place = divmod(code, codes)
        if place < chunks * plain:
            found.append(Field(code, 0, width, unit * chunks + place // plain, place % plain * width))
            continue
        # Bits of the string that the remnants of the unit's chunks make up.
        for low in range(width):
            chunk, bit = divmod((place - chunks * plain) * width + low, left)
            found.append(Field(code, low, 1, unit * chunks + chunk, plain * width + bit))
    return tuple(found)


def pack(codes: Tensor, width: int, tile: Tile) -> Tensor:
    """codes [m, n], integers below 2**width: int32 [row blocks, column blocks, width, rows, words]."""
    padded = F.pad(codes, (0, -codes.shape[1] % tile.columns, 0, -codes.shape[0] % tile.rows))
    tiles = padded.view(-1, tile.rows, padded.shape[1] // tile.columns, CODES, 2 * tile.words)
    halves = torch.zeros(width, *tiles.shape[:3], 2 * tile.words, dtype=torch.int32, device=codes.device)
    for part in fields(width):
        piece = (tiles[:, :, :, part.code].to(torch.int32) >> part.low) & ((1 << part.bits) - 1)
        halves[part.chunk] |= piece << part.shift
    words = halves[..., 0::2] | (halves[..., 1::2] << 16)
    return words.permute(1, 3, 0, 2, 4).contiguous()


def unpack(words: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes [m, n], uint8, of what `pack` made."""
    row_blocks, column_blocks, width, rows, count = words.shape
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=-1).flatten(-2)
    lanes = 2 * count
    codes = torch.zeros(row_blocks, rows, column_blocks, CODES, lanes, dtype=torch.uint8, device=words.device)
    for part in fields(width):
        piece = (halves[:, :, part.chunk] >> part.shift) & ((1 << part.bits) - 1)
        codes[:, :, :, part.code] |= (piece << part.low).to(torch.uint8).transpose(1, 2)
    flat = codes.reshape(row_blocks * rows, column_blocks * CODES * lanes)
    return flat[: shape[0], : shape[1]]
