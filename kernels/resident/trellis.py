"""TrellisMatrix: the bit streams of a trellis weight, laid out so that each weight's state is one window of a stream.

Columns stand in order of their rate classes, so that a kernel reads one table at a time; those of class 0, all zeros,
are left out. The stream of each segment begins at a 16-bit word and is led by one word that holds its own last
STATE_BITS bits at the top: there the circle is closed, and the state of weight t is the STATE_BITS bits from bit
LEAD + (new bits of weights 0 .. t) on. A product is

    y = row_scale * H^T z,    z[i] = sum over columns of table[class][state[i, column]] * factor[column] * x[column]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.hadamard import factors, hadamard
from kernels.layouts import TrellisWeight
from kernels.layouts.trellis import SEGMENT, column_bytes, new_bits, segment_starts
from kernels.layouts.trellis_tables import STATE_BITS, WIDTHS, rate_table

WORD = 16
LEAD = WORD - STATE_BITS
# Words after the last stream: kernels load more bits than they need.
_SPARE = 8


@dataclass(frozen=True)
class TrellisMatrix:
    """words: int16. columns: int32 [k], the live columns by class; factors: float32 [k]. bounds: int32 [17], where each
    class begins among them, and k. begins: int32 [16], the word where its first column begins; the others of the class
    follow, all of one size. row_scales: [m] as stored."""

    shape: tuple[int, int]
    rotated: bool
    words: Tensor
    columns: Tensor
    factors: Tensor
    bounds: Tensor
    begins: Tensor
    row_scales: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.words, self.columns, self.factors, self.bounds, self.begins, self.row_scales]


def trellis_matrix(weight: TrellisWeight) -> TrellisMatrix:
    """The resident form of `weight`, on its device."""
    rows = weight.shape[0]
    codes, classes, starts = weight.tensors()["codes"], weight.classes().long(), weight.column_offsets()
    columns = classes.argsort(stable=True)
    count = torch.bincount(classes, minlength=len(WIDTHS)).tolist()
    pieces, begins = [], [0]
    for rate_class, members in enumerate(columns.split(count)):
        if rate_class and len(members):
            span = torch.arange(column_bytes(rows, rate_class), device=codes.device)
            pieces.append(_led(codes[starts[members][:, None] + span], rows, rate_class).reshape(-1))
        begins.append(sum(piece.numel() for piece in pieces) // 2)
    pieces.append(codes.new_zeros(2 * _SPARE))
    live = columns[count[0] :]
    return TrellisMatrix(
        shape=weight.shape,
        rotated=weight.rotated,
        words=torch.cat(pieces).view(torch.int16),
        columns=live.to(torch.int32),
        factors=weight.column_factors()[live].contiguous(),
        bounds=torch.tensor([0, *itertools.accumulate([0, *count[1:]])], dtype=torch.int32, device=codes.device),
        begins=torch.tensor(begins[:-1], dtype=torch.int32, device=codes.device),
        row_scales=weight.row_scales(),
    )


@cache
def tables(device: torch.device | str = "cpu") -> Tensor:
    """The tables of all classes, by class and state: [16, 2^STATE_BITS], float32. Constants of the format."""
    return torch.stack(
        [torch.zeros(1 << STATE_BITS), *(rate_table(rate_class).values for rate_class in range(1, len(WIDTHS)))]
    ).to(device)


@cache
def window_starts(device: torch.device | str = "cpu") -> Tensor:
    """The first bit of the state of weight t of a segment, by class: [16, SEGMENT], int32."""
    return torch.tensor(
        [[LEAD + new_bits(t + 1, rate_class) for t in range(SEGMENT)] for rate_class in range(len(WIDTHS))],
        dtype=torch.int32,
    ).to(device)


@cache
def segment_words(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of a column before each of its segments, and all of them, by class: [16, segments + 1], int32."""
    lengths = [stop - start for start, stop in itertools.pairwise(segment_starts(rows))]
    return torch.tensor(
        [
            [0, *itertools.accumulate(_words(new_bits(length, rate_class)) for length in lengths)]
            for rate_class in range(len(WIDTHS))
        ],
        dtype=torch.int32,
    ).to(device)


@cache
def rotation_pieces(rows: int, device: torch.device | str = "cpu") -> tuple[tuple[int, int, Tensor, Tensor], ...]:
    """H of order `rows` as Kronecker products: (start, stop, A, B) for rows start .. stop - 1 of H = A x B, with A and
    B float32 and of about one size, scaled so that H is orthonormal."""
    pieces, start = [], 0
    for core, power in factors(rows):
        size, second = core * power, 1
        while power % (2 * second) == 0 and 4 * second * second <= size:
            second *= 2
        first = hadamard(core, power // second) * size**-0.5
        pieces.append((start, start + size, first.float().to(device), hadamard(1, second).float().to(device)))
        start += size
    return tuple(pieces)


def rotate_back(z: Tensor) -> Tensor:
    """z [..., rows], float32 -> z H, as `kernels.hadamard.rotate(z, inverse=True)` but in two small products a piece,
    so not bit for bit."""
    parts = []
    for start, stop, first, second in rotation_pieces(z.shape[-1], z.device):
        part = z[..., start:stop].unflatten(-1, (first.shape[0], second.shape[0]))
        parts.append((first.T @ part @ second).flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _words(bits: int) -> int:
    """Words of a stream of so many bits, with the word before it."""
    return 1 + -(-bits // WORD)


def _led(streams: Tensor, rows: int, rate_class: int) -> Tensor:
    """streams [columns, bytes] of one class -> the same with a leading word for each segment, [columns, bytes]."""
    parts, at = [], 0
    for start, stop in itertools.pairwise(segment_starts(rows)):
        bits = new_bits(stop - start, rate_class)
        own = streams[:, at : at + -(-bits // 8)]
        at += own.shape[1]
        first, shift = divmod(bits - STATE_BITS, 8)
        tail = own[:, first:].int() << 8 * torch.arange(own.shape[1] - first, device=own.device)
        lead = (tail.sum(dim=1, dtype=torch.int32) >> shift & (1 << STATE_BITS) - 1) << LEAD
        parts += [(lead & 255).to(torch.uint8)[:, None], (lead >> 8).to(torch.uint8)[:, None], own]
        if own.shape[1] % 2:
            parts.append(torch.zeros_like(own[:, :1]))
    return torch.cat(parts, dim=1)
