"""Binary: the sign of every weight times the mean magnitude of its row or group. The honest 1-bit floor.

Papers' "RTN, 1 bit" rows round to a min-max grid of two points, which maps nearly every weight to one of them; this is
what one bit does when the scale is the one that minimises the squared error. Source: Rastegari et al. 2016, XNOR-Net,
arXiv 1603.05279 (scale); the mean is removed as PB-LLM and BiLLM do; compensation is GPTQ's.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import BinaryWeight, PackedWeight
from methods.base import LayerContext, Needs, NominalBits, Provenance, QuantizationMethod
from methods.binarization import row_moments
from methods.compensation import WorkingColumns, compensate_columns
from methods.grids import resolve_group_size
from methods.rounding import store
from methods.second_order import CompensationConfig, aligned_block_size, logged_factor
from methods.statistics import LayerStatistics


class BinaryConfig(CompensationConfig):
    group_size: int = Field(-1, ge=-1, description="input columns that share a scale; -1 for the whole row")
    mean_removal: bool = Field(False, description="subtract and store each group's mean before taking signs")
    compensation: Literal["none", "column"] = Field(
        "none", description="what happens to a column's error: nothing, or GPTQ's update of the columns after it"
    )


class Binary(QuantizationMethod):
    """See the module."""

    Config = BinaryConfig
    config: BinaryConfig
    provenance = Provenance(paper="baseline after arXiv 1603.05279", code="this project", parity="none released")

    @property
    def needs(self) -> Needs:
        return "hessian" if self.config.compensation == "column" else "nothing"

    def check_shape(self, out_features: int, in_features: int) -> None:
        resolve_group_size(self.config.group_size, in_features)

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        group_size = resolve_group_size(self.config.group_size, weight.shape[1])
        signs = _Signs(weight, group_size, self.config.mean_removal, self.scale_dtype)
        if self.config.compensation == "none":
            for start in range(0, weight.shape[1], group_size):
                group = weight[:, start : start + group_size]
                signs.fit(group)
                signs.negative[start : start + group_size] = (group < signs.mean.view(-1, 1)).T
        else:
            factor = logged_factor(self._statistics(statistics, weight, context), self.config.damping, context)
            size = aligned_block_size(self.config.block_size, group_size)
            _, context.facts["squared_error"] = compensate_columns(weight, factor.upper, signs, size)
        return signs.pack()

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """One bit for the sign, and 16-bit scales (and means, if removed) per group."""
        group_size = resolve_group_size(self.config.group_size, packed.shape[1])
        return NominalBits(weight=1.0, scale=16 * (1 + self.config.mean_removal) / group_size)


class _Signs:
    """The column quantizer: one mean and scale per (row, group), and the signs as they come."""

    def __init__(self, weight: Tensor, group_size: int, mean_removal: bool, scale_dtype: torch.dtype) -> None:
        rows, self._columns = weight.shape
        self._group_size = group_size
        self._mean_removal = mean_removal
        self._scale_dtype = scale_dtype
        self._means: list[Tensor] = []
        self._scales: list[Tensor] = []
        self.negative = torch.empty(self._columns, rows, dtype=torch.bool, device=weight.device)
        self.mean: Tensor = weight.new_zeros(rows)

    def fit(self, group: Tensor) -> None:
        """Fit the constants of the next group on its weights [m, k]."""
        everywhere = torch.ones(1, group.shape[1], dtype=torch.bool, device=group.device)
        if self._mean_removal:
            mean, scale = row_moments(group, everywhere)
        else:
            mean, scale = torch.zeros_like(group[:, :1]), group.abs().mean(dim=1, keepdim=True)
        self._means.append(store(mean, self._scale_dtype))
        self._scales.append(store(scale, self._scale_dtype))
        self.mean = self._means[-1].float().view(-1)
        scale = self._scales[-1].float().view(-1)
        self._low, self._high = self.mean - scale, self.mean + scale

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        if column % self._group_size == 0:
            self.fit(columns.current(column, min(column + self._group_size, self._columns)))

    def round_column(self, column: int, values: Tensor) -> Tensor:
        negative = torch.lt(values, self.mean, out=self.negative[column])
        return torch.where(negative, self._low, self._high)

    def pack(self) -> BinaryWeight:
        means = torch.cat(self._means, dim=1) if self._mean_removal else None
        return BinaryWeight.pack(self.negative.T, torch.cat(self._scales, dim=1), means, group_size=self._group_size)
