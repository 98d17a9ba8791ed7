"""MG-PTQ's options: the allocator and its controls, then GPTQ with a width for each column.

Columns of one width in one group share a grid per row: a scale for columns of different widths would mean nothing. What
that costs beside the headline bits is in the ledger: 3 bits a column for its width, and a scale and zero point for each
(row, group, width).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from kernels.layouts import MixedWeight, PackedWeight
from methods.base import LayerContext, Needs, NominalBits, Provenance, QuantizationMethod
from methods.compensation import compensate_columns
from methods.grids import resolve_group_size
from methods.hessian import InverseFactor
from methods.mg_ptq.allocation import column_errors, knapsack, ranked, spend
from methods.mg_ptq.graph import node_features, normalized_adjacency, train_allocator
from methods.mixed_columns import MixedColumns, fit_grid
from methods.second_order import CompensationConfig, aligned_block_size, logged_factor
from methods.statistics import LayerStatistics


class MgPtqConfig(CompensationConfig):
    average_bits: float = Field(2.0, ge=1, le=8, description="bits of a code on average over the columns, any fraction")
    bit_choices: list[int] = Field([1, 2, 3, 4], min_length=1, description="widths that a column may have")
    group_size: int = Field(128, ge=-1, description="input columns that share scales; -1 for the whole row")
    allocator: Literal["graph", "knapsack", "diagonal", "random"] = Field(
        "graph",
        description="who allots the bits: the network, or a control: the optimum of the same error model; its widths "
        "by rank of the Hessian's diagonal; its widths at random",
    )
    steps: int = Field(200, ge=1, description="training steps of the network, for each matrix")

    @field_validator("bit_choices")
    @classmethod
    def _ascending(cls, choices: list[int]) -> list[int]:
        if not all(1 <= bits <= 8 for bits in choices) or sorted(set(choices)) != choices:
            raise ValueError("must be ascending widths from 1 to 8, such as [1, 2, 3, 4]")
        return choices

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        low, high = self.bit_choices[0], self.bit_choices[-1]
        if not low <= self.average_bits <= high:
            raise ValueError(f"average_bits={self.average_bits} is not between bit_choices {low} and {high}")
        return self


class MgPtq(QuantizationMethod):
    """See the module."""

    Config = MgPtqConfig
    config: MgPtqConfig
    provenance = Provenance(
        paper="arXiv 2501.18154",
        code="no public code",
        parity="none possible: no public code",
        reconstruction=True,
        basis="the paper's abstract alone",
    )

    @property
    def needs(self) -> Needs:
        return "hessian"

    def check_shape(self, out_features: int, in_features: int) -> None:
        resolve_group_size(self.config.group_size, in_features)

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        statistics = self._statistics(statistics, weight, context)
        factor = logged_factor(statistics, self.config.damping, context)
        weight[:, factor.dead] = 0
        group_size = resolve_group_size(self.config.group_size, weight.shape[1])
        widths = self._widths(weight, statistics, factor, group_size, context)
        columns = MixedColumns(
            weight, widths, group_size, lambda values, bits, _: fit_grid(values, bits, self.scale_dtype)
        )
        size = aligned_block_size(self.config.block_size, group_size)
        _, context.facts["squared_error"] = compensate_columns(weight, factor.upper, columns, size)
        return columns.pack()

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """The average width of the columns; how the paper counts more than that is not known."""
        assert isinstance(packed, MixedWeight)
        return NominalBits(weight=float(packed.column_widths().float().mean()), scale=0.0)

    def _widths(
        self,
        weight: Tensor,
        statistics: LayerStatistics,
        factor: InverseFactor,
        group_size: int,
        context: LayerContext,
    ) -> list[int]:
        config, columns = self.config, weight.shape[1]
        budget = round(config.average_bits * columns)
        choices = config.bit_choices
        errors = column_errors(weight, factor.diagonal(), choices, group_size, self.scale_dtype)
        best = knapsack(errors, choices, budget)
        generator = torch.Generator().manual_seed(config.seed)
        if config.allocator == "graph":
            features = node_features(weight, statistics.hessian, factor.diagonal(), generator)
            adjacency = normalized_adjacency(factor.upper)
            widths = train_allocator(adjacency, features, errors, choices, config.average_bits, config.steps, generator)
            context.facts["average_before_repair"] = float(widths.float().mean())
            context.facts["modelled_error_before_repair"] = _modelled(errors, choices, widths)
            widths = spend(widths, errors, choices, budget)
        elif config.allocator == "knapsack":
            widths = best
        else:
            importance = torch.rand(columns, generator=generator).to(weight.device)
            if config.allocator == "diagonal":
                importance = statistics.hessian.diagonal()
            widths = ranked(best, importance)
        context.facts["average_bits"] = float(widths.float().mean())
        context.facts["modelled_error"] = _modelled(errors, choices, widths)
        context.facts["modelled_error_of_knapsack"] = _modelled(errors, choices, best)
        return widths.tolist()


def _modelled(errors: Tensor, choices: list[int], widths: Tensor) -> float:
    """The total modelled error of `widths` [n]."""
    level = torch.searchsorted(torch.tensor(choices, device=widths.device), widths)
    return float(errors.gather(1, level[:, None]).sum(dtype=torch.float64))
