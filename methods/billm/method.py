"""BiLLM: the walk over a matrix's blocks, and what becomes of each block's error.

Source: Huang et al. 2024, arXiv 2402.04291, algorithm 1; Aaronhuang-778/BiLLM dc137eb. `faithful` follows the code
where the paper's text differs: 1 to 49 salient columns a block instead of 3 to 30, and break points at quantiles
instead of shares of the largest weight. In its hessian setting the code searches on saliency w^2 / U_jj^2, so that the
split is one of saliency too; `search_on="weight"` searches on the weights, with columns still ranked by saliency.
Inputs that never fired are zeroed, as in GPTQ, and their zeros binarized like any weight: nothing reads them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import PackedWeight, ResidualBinaryWeight
from methods.base import LayerContext, Needs, NominalBits, Provenance, QuantizationMethod
from methods.billm.block import Block, Masks, fit_block
from methods.billm.search import (
    BREAK_POINTS,
    choose_break_point,
    choose_salient_columns,
    linear_thresholds,
    quantile_thresholds,
)
from methods.compensation import WorkingColumns, compensate_columns
from methods.second_order import DampingConfig, logged_factor
from methods.statistics import LayerStatistics

_CODE_LIMITS = (1, 49)
_PAPER_LIMITS = (3, 30)


class BillmConfig(DampingConfig):
    metric: Literal["hessian", "magnitude"] = Field(
        "hessian", description="what ranks columns and is searched on: saliency w^2 / U_jj^2, or the weight"
    )
    block_size: int = Field(128, ge=1, description="columns quantized together, with constants of their own")
    search_on: Literal["saliency", "weight"] = Field(
        "saliency",
        description="whose binarization error the searches minimise: the metric's (released code), or the weights'",
    )
    compensation: Literal["block", "block-exact", "column"] = Field(
        "block",
        description="how a block's error moves on: (W - Q) / diag(U) as released, the exact (W - Q) U^-1, "
        "or column by column with the block's masks and constants frozen at its start",
    )
    faithful: bool = Field(True, description="search ranges of the released code; the paper's text where False")


class Billm(QuantizationMethod):
    """See the module."""

    Config = BillmConfig
    config: BillmConfig
    provenance = Provenance(
        paper="arXiv 2402.04291", code="Aaronhuang-778/BiLLM dc137eb", parity="tested on golden vectors"
    )

    @property
    def needs(self) -> Needs:
        return "hessian"

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        factor = logged_factor(self._statistics(statistics, weight, context), self.config.damping, context)
        weight[:, factor.dead] = 0
        blocks = _Blocks(self.config, self.scale_dtype, factor.upper, weight.shape[1])
        if self.config.compensation == "column":
            quantized, squared_error = compensate_columns(weight, factor.upper, blocks, blocks.size)
        else:
            quantized = _compensate_blocks(weight, factor.upper, blocks, self.config.compensation == "block-exact")
            # The blocks' own errors do not add up to the loss unless the update is exact; E = (W - Q) U^-1 always does.
            errors = torch.linalg.solve_triangular(factor.upper, weight - quantized, upper=True, left=False)
            squared_error = float(errors.square().sum(dtype=torch.float64))
        context.facts["squared_error"] = squared_error
        context.facts.update(blocks.facts())
        return blocks.pack()

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """2 bits a salient and 1 bit any other weight (equation 14, first line: the headline); no flags, no scales."""
        assert isinstance(packed, ResidualBinaryWeight)
        return NominalBits(weight=1 + packed.salient / packed.shape[1], scale=0.0)


def _compensate_blocks(weight: Tensor, upper: Tensor, blocks: _Blocks, exact: bool) -> Tensor:
    """Quantize block by block; the dequantized weight [m, n]. weight: [m, n], unchanged. upper: U [n, n].

    All columns of a block are quantized at once, so the error that OBS assigns to it is (W - Q) U_bb^-1 (`exact`); the
    released code divides by the diagonal of U alone.
    """
    work, result = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], blocks.size):
        stop = min(start + blocks.size, weight.shape[1])
        result[:, start:stop] = blocks.quantize(start, work[:, start:stop])
        if stop < weight.shape[1]:
            errors, factor = work[:, start:stop] - result[:, start:stop], upper[start:stop, start:stop]
            if exact:
                errors = torch.linalg.solve_triangular(factor, errors, upper=True, left=False)
            else:
                errors = errors / factor.diagonal()
            work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return result


class _Blocks:
    """The blocks of one matrix as they are quantized; also the column quantizer for `compensation="column"`."""

    def __init__(self, config: BillmConfig, scale_dtype: torch.dtype, upper: Tensor, columns: int) -> None:
        self.size = min(config.block_size, columns)
        self._config = config
        self._scale_dtype = scale_dtype
        self._pivots = upper.diagonal()
        self._columns = columns
        self._blocks: list[Block] = []
        self._chosen: list[int] = []

    def quantize(self, start: int, weight: Tensor) -> Tensor:
        """Quantize the block that begins at column `start` from its weights [m, k]; the values that will be decoded."""
        self._blocks.append(fit_block(weight, self._search(start, weight), self._scale_dtype))
        return self._blocks[-1].decode()

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        self._offset = column % self.size
        if self._offset == 0:
            self.quantize(column, columns.current(column, min(column + self.size, self._columns)))
            self._levels = _Levels(self._blocks[-1])

    def round_column(self, column: int, values: Tensor) -> Tensor:
        return self._levels.round(self._offset, values, self._blocks[-1])

    def pack(self) -> ResidualBinaryWeight:
        blocks = self._blocks
        return ResidualBinaryWeight.pack(
            torch.cat([block.negative for block in blocks], dim=1),
            torch.cat([block.residual_negative for block in blocks], dim=1),
            torch.cat([block.masks.sparse for block in blocks], dim=1),
            torch.cat([block.masks.salient for block in blocks]),
            means=torch.stack([block.means for block in blocks], dim=1),
            scales=torch.stack([block.scales for block in blocks], dim=1),
            block_size=self.size,
        )

    def facts(self) -> dict[str, Any]:
        """What the searches chose: shares of the matrix, and the break points as fractions 0.10 ... 0.90."""
        counts = [int(block.masks.salient.sum()) for block in self._blocks]
        rows = self._blocks[0].means.shape[0]
        sparse = sum(int(block.masks.sparse.sum()) for block in self._blocks)
        points = sorted(round(0.1 + 0.8 * index / (BREAK_POINTS - 1), 2) for index in self._chosen)
        return {
            "salient_fraction": sum(counts) / self._columns,
            "salient_columns_per_block": [min(counts), max(counts)],
            "sparse_fraction": sparse / (rows * self._columns),
            "break_points": {"min": points[0], "median": points[len(points) // 2], "max": points[-1]},
        }

    def _search(self, start: int, weight: Tensor) -> Masks:
        config = self._config
        ranking = weight
        if config.metric == "hessian":
            ranking = weight.square() / self._pivots[start : start + weight.shape[1]].square()
        target = weight if config.search_on == "weight" else ranking
        fewest, most = _CODE_LIMITS if config.faithful else _PAPER_LIMITS
        salient = choose_salient_columns(target, ranking.abs().sum(dim=0), fewest, most)
        thresholds = (quantile_thresholds if config.faithful else linear_thresholds)(target, salient)
        index = choose_break_point(target, salient, thresholds)
        self._chosen.append(index)
        return Masks(salient, (target.abs() >= thresholds[index]) & ~salient)


class _Levels:
    """The constants of a block spread over its columns, so that a column is rounded to its nearest level at once."""

    def __init__(self, block: Block) -> None:
        group = block.masks.sparse.long().masked_fill(block.masks.salient, 2)
        # Transposed, like the working weight: a column is contiguous.
        self._mean = block.means.float().gather(1, group).T.contiguous()
        self._scale = block.scales.float().gather(1, group).T.contiguous()
        self._residual = block.scales[:, 3].float()
        self._salient = block.masks.salient.tolist()

    def round(self, column: int, values: Tensor, block: Block) -> Tensor:
        """Round one column [m], keep its signs in `block`, and give the values that will be decoded."""
        mean, scale = self._mean[column], self._scale[column]
        negative = values < mean
        block.negative[:, column] = negative
        rounded = torch.where(negative, mean - scale, mean + scale)
        if self._salient[column]:
            negative = values < rounded
            block.residual_negative[:, column] = negative
            rounded = torch.where(negative, rounded - self._residual, rounded + self._residual)
        return rounded
