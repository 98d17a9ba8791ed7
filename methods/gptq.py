"""GPTQ: column-by-column rounding with second-order error compensation.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1; IST-DASLab/gptq 2d65066. The released code fits the grid of
a group that begins inside a block of columns on weights that lack the block's own updates; that is what
`faithful=True` does. By default groups are fitted on the weights as they stand.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import PackedWeight, UniformWeight
from methods.base import LayerContext, Needs, Provenance
from methods.compensation import WorkingColumns, compensate_columns
from methods.grids import Grid, fit_range, resolve_group_size
from methods.rtn import UniformConfig, UniformMethod
from methods.second_order import CompensationConfig, aligned_block_size, logged_factor
from methods.statistics import LayerStatistics


class GptqConfig(UniformConfig, CompensationConfig):
    act_order: bool = Field(False, description="quantize columns in the order of decreasing Hessian diagonal")
    static_groups: bool = Field(False, description="fit all groups before compensation, in the original column order")
    faithful: bool = Field(False, description="fit groups inside a block on stale weights, as the released code does")


class Gptq(UniformMethod):
    """See the module."""

    Config = GptqConfig
    config: GptqConfig
    provenance = Provenance(paper="arXiv 2210.17323", code="IST-DASLab/gptq 2d65066", parity="tested on golden vectors")

    @property
    def needs(self) -> Needs:
        return "hessian"

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        statistics = self._statistics(statistics, weight, context)
        config = self.config
        columns = weight.shape[1]
        group_size = resolve_group_size(config.group_size, columns)

        order = None
        if config.act_order:
            # As in the released code, dead inputs rank with a diagonal of 1.
            diagonal = statistics.hessian.diagonal()
            order = torch.argsort(torch.where(diagonal == 0, 1.0, diagonal), descending=True)
            permuted = LayerStatistics.from_hessian(statistics.hessian[order][:, order])
            factor = logged_factor(permuted, config.damping, context)
            dead = torch.zeros_like(factor.dead)
            dead[order] = factor.dead
        else:
            factor = logged_factor(statistics, config.damping, context)
            dead = factor.dead

        groups = _Groups(self, group_size, columns)
        if config.faithful and group_size == columns:
            groups.fit_all(weight)  # the released code fits a whole row before it zeroes dead inputs
        weight[:, dead] = 0
        if config.static_groups:
            groups.fit_all(weight)
        if order is not None:
            weight = weight[:, order]
            groups.order = order
        _, squared_error = compensate_columns(weight, factor.upper, groups, self._block_size(group_size))
        context.facts["squared_error"] = squared_error
        return groups.pack()

    def _block_size(self, group_size: int) -> int:
        """Groups inside a block are fitted as the released code does, or before the loop, whatever its size."""
        config = self.config
        anyhow = config.faithful or config.static_groups
        return config.block_size if anyhow else aligned_block_size(config.block_size, group_size)


class _Groups:
    """The column quantizer: one grid per group, and the codes as they come."""

    def __init__(self, method: Gptq, group_size: int, columns: int) -> None:
        self._config = method.config
        self._scale_dtype = method.scale_dtype
        self._group_size = group_size
        self._columns = columns
        self._static = False
        self._grids: list[Grid] = []
        self._codes: list[Tensor] = []
        self._scale = self._zero = torch.empty(0)
        self.order: Tensor | None = None

    def fit_all(self, weight: Tensor) -> None:
        """Fit every group now, on `weight` [m, n] in its original column order; nothing is fitted later."""
        self._static = True
        self._grids = [self._fit(group) for group in weight.split(self._group_size, dim=1)]

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        if self._static:
            original = column if self.order is None else int(self.order[column])
            self._use(self._grids[original // self._group_size])
        elif column % self._group_size == 0:
            last = min(column + self._group_size, self._columns)
            values = columns.stale(column, last) if self._config.faithful else columns.current(column, last)
            self._grids.append(self._fit(values))
            self._use(self._grids[-1])

    def round_column(self, column: int, values: Tensor) -> Tensor:
        codes = torch.round(values / self._scale).add_(self._zero).clamp_(0, self._top)
        self._codes.append(codes)
        return (codes - self._zero).mul_(self._scale)

    def pack(self) -> UniformWeight:
        codes = torch.stack(self._codes, dim=1).to(torch.uint8)
        order = self.order
        if order is not None and (self._static or self._group_size == self._columns):
            # Static groups were formed in the original order, and one group has none: no permutation is needed.
            restored = torch.empty_like(codes)
            restored[:, order] = codes
            codes, order = restored, None
        zeros = torch.cat([grid.zero for grid in self._grids], dim=1).to(torch.uint8)
        return UniformWeight.pack(
            codes,
            torch.cat([grid.scale for grid in self._grids], dim=1),
            None if self._config.symmetric else zeros,
            bits=self._config.bits,
            group_size=self._group_size,
            permutation=order,
        )

    def _fit(self, values: Tensor) -> Grid:
        return fit_range(values, self._config.bits, symmetric=self._config.symmetric, scale_dtype=self._scale_dtype)

    def _use(self, grid: Grid) -> None:
        """Unpack the grid once a group: the column loop runs per column."""
        self._scale = grid.scale.float().view(-1)
        self._zero = grid.zero.view(-1)
        self._top = (1 << grid.bits) - 1
