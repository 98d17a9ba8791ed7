"""Trellis: every column of the rotated weight is a circular bit stream, a state of its last bits a value. sage-x.

    W = diag(row_scale) H^T R,   R[i, j] = 2^(-column_scale[j] / 16) * table_c(state[i, j]),   c = rate_class[j]

H is the orthonormal Hadamard transform of the rows (kernels/hadamard.py); its random signs are those of the row
scales, so that they cost nothing. A column belongs to one of 16 rate classes (trellis_tables.py), 0 to 7 bits a
weight; class 0 stores no code and stands for zeros. A column's rows are cut into equal segments of at most SEGMENT
rows. Each is one circular stream of whole bytes, or as few bytes as hold it: weight t brings the class's next 1 to 7
bits, and its state are the STATE_BITS bits that end with them, the oldest lowest. So every weight can be decoded by
itself: a load, a shift, a mask and a table lookup.

Bits per weight: the mean rate, (4 + 8) / out_features for class and scale of a column, 16 / in_features for row
scales. Sources: QTIP (Tseng et al. 2024, arXiv 2406.11235, section 3) for the bit-shift trellis; QuIP# (arXiv
2402.04396) for the rotation. One-sided rotation, streams along columns and a rate a column are this project's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kernels.errors import InputError
from kernels.hadamard import rotate
from kernels.layouts.base import SCALE_DTYPES, PackedWeight, Role, check_no_extra, check_shape, check_tensor
from kernels.layouts.bitpack import pack_bits, packed_size, unpack_bits
from kernels.layouts.trellis_tables import STATE_BITS, WIDTHS, rate_table

SEGMENT = 256
# A column of fewer rows cannot fill a state at one bit a weight.
LEAST_ROWS = 16
# Column scales are 2^(-code / SCALE_STEPS), code 0 .. 255: 16 octaves in steps of 4.4 %. The codes of a column are
# chosen for its rounded scale, so the coarse step costs next to nothing.
SCALE_STEPS = 16
CLASS_BITS = 4

# Columns decoded at once.
_CHUNK = 256


@cache
def segment_starts(rows: int) -> tuple[int, ...]:
    """Where the segments of a column begin, and `rows`: as few segments as need be, their lengths at most 1 apart."""
    count = -(-rows // SEGMENT)
    return tuple(rows * i // count for i in range(count + 1))


@cache
def column_bytes(rows: int, rate_class: int) -> int:
    """Bytes of the stream of one column."""
    starts = segment_starts(rows)
    lengths = (stop - start for start, stop in itertools.pairwise(starts))
    return sum(-(-new_bits(length, rate_class) // 8) for length in lengths)


def check_rows(rows: int) -> None:
    """Raise InputError if a matrix of so many rows has no trellis form."""
    if rows < LEAST_ROWS:
        raise InputError(f"out_features={rows}: the trellis layout needs {LEAST_ROWS} or more")


class TrellisWeight(PackedWeight):
    """See the module. Build one with `TrellisWeight.pack`."""

    layout = "trellis"

    def __init__(self, shape: tuple[int, int], rotated: bool, tensors: dict[str, Tensor]) -> None:
        self.shape = shape
        self.rotated = rotated
        self._tensors = tensors

    @classmethod
    def pack(
        cls, codes: Tensor, classes: Tensor, column_scales: Tensor, row_scales: Tensor, *, rotated: bool = True
    ) -> Self:
        """Pack what a method computed.

        codes: [m, n] uint8, the new bits of each weight, the oldest highest; read where the class is not 0. classes:
        [n], integers 0 .. 15. column_scales: [n] uint8. row_scales: [m], one of the scale dtypes, signed. rotated:
        False for H = 1."""
        rows, columns = codes.shape
        streams = [torch.empty(0, dtype=torch.uint8, device=codes.device)] * columns
        by_column = codes.T.contiguous()
        for rate_class in classes.unique().tolist():
            if rate_class:
                members = (classes == rate_class).nonzero()[:, 0]
                for column, stream in zip(members.tolist(), _streams(by_column[members], rate_class), strict=True):
                    streams[column] = stream
        tensors = {
            "codes": torch.cat(streams),
            "classes": pack_bits(classes.to(torch.uint8), CLASS_BITS),
            "column_scales": column_scales.contiguous(),
            "row_scales": row_scales.contiguous(),
        }
        return cls.from_tensors(tensors, {"shape": [rows, columns], "rotated": rotated})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {"codes": "code", "classes": "index", "column_scales": "scale", "row_scales": "scale"}
        return roles[name]

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "rotated": self.rotated}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        check_rows(rows)
        rotated = metadata.get("rotated")
        if type(rotated) is not bool:
            raise InputError(f"rotated={rotated!r} of a trellis weight; it must be true or false")
        classes = check_tensor(tensors, "classes", (packed_size(columns, CLASS_BITS),), (torch.uint8,))
        check_tensor(tensors, "column_scales", (columns,), (torch.uint8,))
        check_tensor(tensors, "row_scales", (rows,), tuple(SCALE_DTYPES.values()))
        count = torch.bincount(unpack_bits(classes, CLASS_BITS, columns).long().cpu(), minlength=len(WIDTHS)).tolist()
        size = sum(number * column_bytes(rows, rate_class) for rate_class, number in enumerate(count))
        check_tensor(tensors, "codes", (size,), (torch.uint8,))
        known = ("classes", "codes", "column_scales", "row_scales")
        check_no_extra(tensors, set(known))
        return cls(shape, rotated, {name: tensors[name] for name in known})

    def classes(self) -> Tensor:
        """The rate class of each column: [n], uint8."""
        return unpack_bits(self._tensors["classes"], CLASS_BITS, self.shape[1])

    def row_scales(self) -> Tensor:
        """[m], signed, in the dtype they are stored in."""
        return self._tensors["row_scales"]

    def column_factors(self) -> Tensor:
        """2^(-code / 16) of each column: [n], float32."""
        return scale_factors(self._tensors["column_scales"].device)[self._tensors["column_scales"].long()]

    def column_offsets(self) -> Tensor:
        """Where each column's stream begins in the codes, in bytes: [n], int64."""
        sizes = torch.tensor([column_bytes(self.shape[0], c) for c in range(len(WIDTHS))])
        sizes = sizes.to(self._tensors["codes"].device)[self.classes().long()]
        return sizes.cumsum(0) - sizes

    def values(self) -> Tensor:
        """Table values of all weights, rotated and without scales, a column a row: [n, m], float32."""
        rows, columns = self.shape
        codes, classes, offsets = self._tensors["codes"], self.classes(), self.column_offsets()
        result = torch.zeros(columns, rows, device=codes.device)
        for rate_class in classes.unique().tolist():
            if rate_class == 0:
                continue
            table = rate_table(rate_class).values.to(codes.device)
            span = torch.arange(column_bytes(rows, rate_class), device=codes.device)
            for members in (classes == rate_class).nonzero()[:, 0].split(_CHUNK):
                streams = codes[offsets[members][:, None] + span]
                result[members] = table[_states(streams, rows, rate_class)]
        return result

    def unscaled_rows(self) -> Tensor:
        """What the row scales multiply: [m, n], float32."""
        columns = self.values() * self.column_factors()[:, None]
        return (rotate(columns, inverse=True) if self.rotated else columns).T.contiguous()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.unscaled_rows() * self.row_scales().float()[:, None]).to(dtype)

    def with_row_scales(self, scales: Tensor) -> Self:
        """This weight with other row scales [m], rounded to the dtype they are stored in."""
        kept = self.row_scales()
        tensors = {**self._tensors, "row_scales": scales.to(kept)}
        return type(self)(self.shape, self.rotated, tensors)


@cache
def scale_factors(device: torch.device | str = "cpu") -> Tensor:
    """2^(-code / SCALE_STEPS) for code 0 .. 255: [256], float32, computed once in float64 so that all devices agree."""
    return torch.exp2(-torch.arange(256, dtype=torch.float64) / SCALE_STEPS).float().to(device)


def new_bits(length: int, rate_class: int) -> int:
    widths = WIDTHS[rate_class]
    whole, rest = divmod(length, max(len(widths), 1))
    return whole * sum(widths) + sum(widths[:rest])


def _streams(codes: Tensor, rate_class: int) -> Tensor:
    """codes [columns, m] of one class -> their streams [columns, bytes], uint8."""
    row, shift = (part.to(codes.device) for part in _stream_bits(codes.shape[1], rate_class))
    octets = ((codes[:, row] >> shift) & 1).view(codes.shape[0], -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (octets << places).sum(dim=2, dtype=torch.int32).to(torch.uint8)


@cache
def _stream_bits(rows: int, rate_class: int) -> tuple[Tensor, Tensor]:
    """For each bit of a column's stream the row that it comes from, int64, and its place in the row's code, uint8."""
    widths = WIDTHS[rate_class]
    sources: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(segment_starts(rows)):
        for t in range(stop - start):
            width = widths[t % len(widths)]
            sources += [(start + t, width - 1 - place) for place in range(width)]
        # Whole bytes: codes have at most 7 bits, so that bit 7 is a zero.
        sources += [(start, 7)] * (-len(sources) % 8)
    row, shift = zip(*sources, strict=True)
    return torch.tensor(row), torch.tensor(shift, dtype=torch.uint8)


def _states(streams: Tensor, rows: int, rate_class: int) -> Tensor:
    """streams [columns, bytes] of one class -> the state of each weight: [columns, m], int64."""
    places = torch.arange(8, dtype=torch.uint8, device=streams.device)
    bits = ((streams[:, :, None] >> places) & 1).view(streams.shape[0], -1)
    where = _window_bits(rows, rate_class).to(streams.device)
    states = torch.zeros(streams.shape[0], rows, dtype=torch.int64, device=streams.device)
    for place in range(STATE_BITS):
        states |= bits[:, where[place]].long() << place
    return states


@cache
def _window_bits(rows: int, rate_class: int) -> Tensor:
    """Which bits of a column's stream make up the state of each weight: [STATE_BITS, m], int64, oldest first."""
    starts = segment_starts(rows)
    result, offset = torch.empty(STATE_BITS, rows, dtype=torch.int64), 0
    for start, stop in itertools.pairwise(starts):
        total = new_bits(stop - start, rate_class)
        ends = torch.tensor([new_bits(t + 1, rate_class) for t in range(stop - start)])
        window = torch.arange(STATE_BITS)[:, None] - STATE_BITS + ends
        result[:, start:stop] = window % total + offset
        offset += 8 * -(-total // 8)
    return result
