"""The sparse part of a matrix in the form that kernels read: rows of 16-bit entries, a column and a code each.

Columns are cut into slabs, short enough for a column to share 16 bits with its code: 4096 columns beside a 4-bit
code, 256 beside an 8-bit one. The entries of row i in slab s are entries[pointers[s, i] : pointers[s, i + 1]].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseRows:
    """entries: int16 [count], bit pattern column | code << column_bits. pointers: int32 [slabs, m + 1]."""

    entries: Tensor
    pointers: Tensor
    slab: int
    column_bits: int

    @property
    def slabs(self) -> int:
        return self.pointers.shape[0]

    def dense(self, columns: int) -> tuple[Tensor, Tensor]:
        """(mask [m, n] bool, codes [m, n] int32): for tests and for other forms."""
        rows = self.pointers.shape[1] - 1
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=self.entries.device)
        codes = torch.zeros(rows, columns, dtype=torch.int32, device=self.entries.device)
        found = self.entries.to(torch.int32) & 0xFFFF
        starts = self.pointers[:, :-1].reshape(-1).long()
        counts = self.pointers[:, 1:].reshape(-1).long() - starts
        place = torch.repeat_interleave(torch.arange(counts.numel(), device=found.device), counts)
        column = place // rows * self.slab + (found & ((1 << self.column_bits) - 1))
        mask[place % rows, column] = True
        codes[place % rows, column] = found >> self.column_bits
        return mask, codes


def sparse_rows(mask: Tensor, codes: Tensor, code_bits: int, slab: int | None = None) -> SparseRows:
    """mask: [m, n] bool. codes: [entries] integers below 2**code_bits, in row-major order of the mask.

    slab: columns a slab; the most that fit beside a code if not given.
    """
    column_bits = 16 - code_bits
    slab = 1 << column_bits if slab is None else slab
    rows, columns = mask.shape
    row, column = mask.nonzero(as_tuple=True)
    place = column // slab * rows + row
    order = torch.argsort(place, stable=True)
    entries = (column % slab) | (codes.long() << column_bits)
    slabs = -(-columns // slab)
    counts = torch.bincount(place, minlength=slabs * rows).view(slabs, rows)
    pointers = torch.zeros(slabs, rows + 1, dtype=torch.int64, device=mask.device)
    pointers[:, 1:] = counts.cumsum(1)
    pointers[1:] += counts.sum(1).cumsum(0)[:-1, None]
    return SparseRows(entries[order].to(torch.int16), pointers.to(torch.int32), slab, column_bits)
