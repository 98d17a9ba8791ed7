"""Error compensation: quantize columns one by one and move each column's error to those that follow.

Source: GPTQ (arXiv 2210.17323, algorithm 1). With H^-1 = U^T U, column j's error e = (w_j - q_j) / U_jj lowers every
later column k by e * U_jk. Updates are applied at once inside a block of columns and in one product beyond it.
Identity (holds for any rounding rule, tested): sum e^2 = tr((W - Q) H (W - Q)^T) with the damped H.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class WorkingColumns:
    """The weight while it is being compensated, as a quantizer may look at it when it fits a group's grid."""

    def __init__(self, work: Tensor, block: Tensor, start: int) -> None:
        self._work = work
        self._block = block
        self._start = start

    def current(self, first: int, last: int) -> Tensor:
        """Columns first .. last - 1 with every update made so far: [m, last - first]. `first` lies in this block."""
        stop = self._start + self._block.shape[0]
        inside = self._block[first - self._start : last - self._start]
        return (inside if last <= stop else torch.cat([inside, self._work[stop:last]])).T

    def stale(self, first: int, last: int) -> Tensor:
        """The same columns without the updates made inside this block: what the released GPTQ fits groups on."""
        return self._work[first:last].T


class ColumnQuantizer(Protocol):
    """What is rounded: fits its grids when a column begins a group, and rounds one column."""

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        """Called before `column` is rounded."""

    def round_column(self, column: int, values: Tensor) -> Tensor:
        """The dequantized values [m] that `column`, now `values` [m], is stored as; they are copied at once."""


def compensate_columns(
    weight: Tensor, upper: Tensor, quantizer: ColumnQuantizer, block_size: int
) -> tuple[Tensor, float]:
    """Run the column loop over `weight` [m, n] (float32, unchanged) with `upper` = U [n, n].

    Returns the dequantized weight [m, n] and sum e^2. The arithmetic is float32, as in the released code.
    """
    count = weight.shape[1]
    work = weight.T.contiguous().clone()  # transposed: a column of the weight is contiguous
    result = torch.empty_like(work)
    squared = 0.0
    for start in range(0, count, block_size):
        stop = min(start + block_size, count)
        block = work[start:stop].clone()
        errors = torch.empty_like(block)
        factor = upper[start:stop, start:stop].contiguous()
        pivots = factor.diagonal().tolist()
        columns = WorkingColumns(work, block, start)
        for i, (values, error, kept) in enumerate(zip(block, errors, result[start:stop], strict=True)):
            quantizer.begin_column(start + i, columns)
            kept.copy_(quantizer.round_column(start + i, values))
            torch.sub(values, kept, out=error).div_(pivots[i])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        if stop < count:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        squared += float(errors.square().sum(dtype=torch.float64))
    return result.T.contiguous(), squared
