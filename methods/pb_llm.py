"""PB-LLM (the post-training part, "GPTQ-PB"): a few salient weights keep 8 bits, the others keep their sign.

Source: Shang et al. 2023, arXiv 2310.00034, section 3; hahnyuan/PB-LLM fe85da9. The mask and all constants come from
the weights before compensation; then GPTQ's column loop rounds each weight to its own grid. Three defects of the
released code are switched by `faithful`:

- its mean and scale of binarized weights run over whole rows with zeros at salient positions, which shrinks the scale
  by about the binarized share;
- inputs that never fired are zeroed, rank lowest and take part in every fit. By default they are left out of ranking
  and fits, and their own weights are binarized: a sign costs one bit either way, and still means something if the input
  wakes up.
- weights that tie with the threshold are all binarized; where weights come from a grid many tie, and rounding decides
  how many. By default the first of them, row by row, are salient: as many weights as without ties.

sign(0) is 0 in the released code, so a weight equal to its mean decodes to the mean; here to mean + scale (a stored
sign has no third value).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import PackedWeight, PartialBinaryWeight
from methods.base import LayerContext, Needs, NominalBits, Provenance, QuantizationMethod
from methods.binarization import row_moments
from methods.compensation import WorkingColumns, compensate_columns
from methods.grids import Grid, fit_range, resolve_group_size
from methods.hessian import InverseFactor
from methods.rounding import store
from methods.second_order import CompensationConfig, logged_factor
from methods.statistics import LayerStatistics


class PbLlmConfig(CompensationConfig):
    salient_fraction: float = Field(0.1, ge=0, lt=1, description="share of weights that keep `salient_bits` bits")
    salient_bits: int = Field(8, ge=1, le=8, description="bits of a salient weight's code")
    metric: Literal["hessian", "magnitude"] = Field(
        "hessian", description="what makes a weight salient: w^2 over its OBS pivot, or |w|"
    )
    group_size: int = Field(
        -1, ge=-1, description="columns that share a ranking and binarization constants; -1 for all of them"
    )
    faithful: bool = Field(
        False, description="shrunken binary scale, binarized dead inputs and ties, as the released code has"
    )


class PbLlm(QuantizationMethod):
    """See the module."""

    Config = PbLlmConfig
    config: PbLlmConfig
    provenance = Provenance(paper="arXiv 2310.00034", code="hahnyuan/PB-LLM fe85da9", parity="tested on golden vectors")

    @property
    def needs(self) -> Needs:
        return "hessian"

    def check_shape(self, out_features: int, in_features: int) -> None:
        resolve_group_size(self.config.group_size, in_features)

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        config = self.config
        factor = logged_factor(self._statistics(statistics, weight, context), config.damping, context)

        # The released code fits the salient grid on whole rows, binarized weights and dead inputs included.
        grid = fit_range(weight, config.salient_bits, symmetric=False, scale_dtype=self.scale_dtype)
        if config.faithful:
            weight[:, factor.dead] = 0
        group_size = resolve_group_size(config.group_size, weight.shape[1])
        salient = self._salient(weight, factor, group_size)
        means, scales = self._binary_constants(weight, salient, factor, group_size)
        columns = _PartialColumns(salient, means, scales, grid, group_size)
        _, context.facts["squared_error"] = compensate_columns(weight, factor.upper, columns, config.block_size)
        context.facts["salient_fraction"] = float(salient.float().mean())
        return columns.pack()

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """1 bit a binarized and `salient_bits` a salient weight: the 1.7 bits of later papers at 10 %.

        The paper itself adds 1 bit for the bitmap as an upper bound (2.7), and counts no scales.
        """
        assert isinstance(packed, PartialBinaryWeight)
        fraction = packed.salient / (packed.shape[0] * packed.shape[1])
        return NominalBits(weight=(1 - fraction) + self.config.salient_bits * fraction, scale=0.0)

    def _salient(self, weight: Tensor, factor: InverseFactor, group_size: int) -> Tensor:
        """[m, n] bool: the weights whose metric exceeds the threshold of their column group (all rows together), and,
        unless `faithful`, as many of those that tie with it as would without ties."""
        importance = weight.abs() if self.config.metric == "magnitude" else (weight / factor.diagonal()).square_()
        skipped = torch.zeros_like(factor.dead) if self.config.faithful else factor.dead
        importance[:, skipped] = -1  # ranks below every weight, so it never exceeds a threshold
        groups = []
        for start in range(0, weight.shape[1], group_size):
            values = importance[:, start : start + group_size]
            unranked = len(values) * int(skipped[start : start + group_size].sum())
            rank = unranked + math.floor((values.numel() - unranked) * (1 - self.config.salient_fraction))
            rank = min(rank, values.numel() - 1)
            threshold = _ranked(values.flatten(), rank)
            salient = values > threshold
            if not self.config.faithful and unranked < values.numel():
                _admit(salient, values == threshold, values.numel() - 1 - rank - int(salient.sum()))
            groups.append(salient)
        return torch.cat(groups, dim=1)

    def _binary_constants(
        self, weight: Tensor, salient: Tensor, factor: InverseFactor, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """Mean and scale of the binarized weights, each [m, G], in the dtype they are stored in."""
        means, scales = [], []
        for start in range(0, weight.shape[1], group_size):
            part = slice(start, start + group_size)
            values, binarized = weight[:, part], ~salient[:, part]
            if self.config.faithful:
                values, counted = values * binarized, torch.ones_like(binarized)
            else:
                counted = binarized & ~factor.dead[part]
            mean, scale = row_moments(values, counted)
            means.append(mean)
            scales.append(scale)
        return store(torch.cat(means, dim=1), self.scale_dtype), store(torch.cat(scales, dim=1), self.scale_dtype)


def _admit(salient: Tensor, tied: Tensor, missing: int) -> None:
    """Mark the first `missing` of `tied` in `salient`, both [m, k] bool: ties are frequent on a grid's weights."""
    row, column = tied.nonzero()[:missing].unbind(dim=1)
    salient[row, column] = True


def _ranked(values: Tensor, rank: int) -> Tensor:
    """The value of `rank` (0 for the least) among `values` [k]. On the CPU by numpy, which selects much faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), rank))[rank]
    return values.kthvalue(rank + 1).values


class _PartialColumns:
    """The column quantizer: both grids of a row are known, the mask says which one a weight takes."""

    def __init__(self, salient: Tensor, means: Tensor, scales: Tensor, grid: Grid, group_size: int) -> None:
        self._means, self._scales, self._grid, self._group_size = means, scales, grid, group_size
        # Transposed, like the working weight: a column is contiguous. Codes are kept less their zero point.
        self._salient = salient.T.contiguous()
        self._negative = torch.empty_like(self._salient)
        self._offsets = torch.empty(self._salient.shape, device=salient.device)
        self._columns = list(
            zip(*(plane.unbind() for plane in (self._salient, self._negative, self._offsets)), strict=True)
        )
        self._step, self._zero = grid.scale.float().view(-1), grid.zero.view(-1)
        self._least, self._most = -self._zero, ((1 << grid.bits) - 1) - self._zero
        self._binary, self._rounded = torch.empty_like(self._step), torch.empty_like(self._step)

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        if column % self._group_size == 0:
            group = column // self._group_size
            self._mean, scale = self._means[:, group].float(), self._scales[:, group].float()
            self._low, self._high = self._mean - scale, self._mean + scale

    def round_column(self, column: int, values: Tensor) -> Tensor:
        salient, negative, offsets = self._columns[column]
        torch.lt(values, self._mean, out=negative)
        torch.where(negative, self._low, self._high, out=self._binary)
        torch.div(values, self._step, out=offsets).round_().clamp_(self._least, self._most)
        torch.mul(offsets, self._step, out=self._rounded)
        return torch.where(salient, self._rounded, self._binary, out=self._rounded)

    def pack(self) -> PartialBinaryWeight:
        return PartialBinaryWeight.pack(
            self._salient.T,
            self._negative.T,
            (self._offsets + self._zero).to(torch.uint8).T,
            means=self._means,
            scales=self._scales,
            salient_scales=self._grid.scale.view(-1),
            salient_zeros=self._grid.zero.view(-1).to(torch.uint8),
            group_size=self._group_size,
            salient_bits=self._grid.bits,
        )
