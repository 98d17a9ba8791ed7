"""Columns of several bit widths on their way through the compensation loop, and the grids they are rounded to.

A grid belongs to the columns of one width in one group; it is fitted when the group begins, on the weights as they then
stand. One bit is a sign around a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts import MixedWeight
from methods.binarization import row_moments
from methods.compensation import WorkingColumns
from methods.grids import Grid, fit_range
from methods.rounding import store


@dataclass(frozen=True)
class SignGrid:
    """Two levels per row: mean - scale and mean + scale. mean, scale: [m, 1], as stored."""

    mean: Tensor
    scale: Tensor

    def encode(self, values: Tensor) -> Tensor:
        """Codes of `values` [m, k]: 1 at the mean and above, else 0; float32."""
        return (values >= self.mean.float()).float()

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes`, float32."""
        mean, scale = self.mean.float(), self.scale.float()
        return torch.where(codes > 0, mean + scale, mean - scale)


def fit_signs(weight: Tensor, scale_dtype: torch.dtype, *, around_zero: bool = False) -> SignGrid:
    """The sign grid of each row of `weight` [m, k]: its mean, and the mean magnitude around it (the best scale).

    around_zero: the scale is the mean magnitude of the weights themselves, as in the released SliM-LLM.
    """
    mean, scale = row_moments(weight, torch.ones_like(weight[:1], dtype=torch.bool))
    if around_zero:
        scale = weight.abs().mean(dim=1, keepdim=True)
    return SignGrid(store(mean, scale_dtype), store(scale, scale_dtype))


def fit_grid(weight: Tensor, bits: int, scale_dtype: torch.dtype) -> Grid | SignGrid:
    """The grid over the range of each row of `weight` [m, k]; signs for one bit."""
    if bits == 1:
        return fit_signs(weight, scale_dtype)
    return fit_range(weight, bits, symmetric=False, scale_dtype=scale_dtype)


# Fits the columns `values` [m, k] of one width in one group; `columns` [k] says which they are.
Fit = Callable[[Tensor, int, Tensor], Grid | SignGrid]


class MixedColumns:
    """The column quantizer: a width for each column or for each group, a grid for each (group, width)."""

    def __init__(self, weight: Tensor, widths: Sequence[int], group_size: int, fit: Fit) -> None:
        """weight: [m, n]. widths: n, or one for each group of `group_size` columns."""
        rows, self._columns = weight.shape
        self._widths = list(widths)
        self._group_size = group_size
        self._fit = fit
        per_column = len(self._widths) == self._columns
        self._of_column = [self._widths[j if per_column else j // group_size] for j in range(self._columns)]
        self._codes = torch.empty(self._columns, rows, dtype=torch.uint8, device=weight.device)
        self._grids: list[Grid | SignGrid] = []
        self._current: dict[int, Grid | SignGrid] = {}

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        if column % self._group_size:
            return
        last = min(column + self._group_size, self._columns)
        values = columns.current(column, last)
        widths = torch.tensor(self._of_column[column:last])
        self._current = {}
        for width in sorted(set(widths.tolist())):
            inside = (widths == width).nonzero().view(-1).to(values.device)
            grid = self._fit(values[:, inside], width, column + inside)
            self._grids.append(grid)
            self._current[width] = _for_columns(grid)

    def round_column(self, column: int, values: Tensor) -> Tensor:
        grid = self._current[self._of_column[column]]
        codes = grid.encode(values)
        self._codes[column] = codes
        return grid.decode(codes)

    def pack(self) -> MixedWeight:
        constants = [_stored(grid) for grid in self._grids]
        scales, zeros, means = (torch.cat(list(parts), dim=1) for parts in zip(*constants, strict=True))
        return MixedWeight.pack(self._codes.T, scales, zeros, means, widths=self._widths, group_size=self._group_size)


def _for_columns(grid: Grid | SignGrid) -> Grid | SignGrid:
    """The same grid for one column [m] at a time, its constants widened once."""
    if isinstance(grid, SignGrid):
        return SignGrid(grid.mean.float().view(-1), grid.scale.float().view(-1))
    return Grid(grid.scale.float().view(-1), grid.zero.view(-1), grid.bits)


def _stored(grid: Grid | SignGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and mean of a grid, each [m, 1]; what it lacks is zero and is not stored."""
    if isinstance(grid, SignGrid):
        return grid.scale, torch.zeros_like(grid.scale, dtype=torch.uint8), grid.mean
    return grid.scale, grid.zero.to(torch.uint8), torch.zeros_like(grid.scale)
