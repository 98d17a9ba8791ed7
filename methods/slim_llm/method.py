"""SliM-LLM's options, and its walk over a matrix.

`faithful` follows the released code where it differs from the paper or where it errs:

- the Hessian is damped twice: by 0.01 absolute, with 1 on the diagonal of dead inputs, for the group salience of the
  search, in place; so that dead inputs are not zeroed afterwards;
- the divergence is KL(quantized || original), and only the original's output has the layer's bias;
- a narrower last group (576 columns in groups of 128) ranks among the others, by the sum of its salience, so that the
  mean width of the matrix is not the headline's; by default it keeps the headline's width, and the mean is exact;
- the scale of a one-bit group is the mean of |w|, although its mean is taken off;
- the quantizer counts as symmetric until the first group that is not low: leading low groups of two bits or more have
  their zero point at mid-range on a range that is not symmetric.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from kernels.layouts import MixedWeight, PackedWeight
from methods.base import LayerContext, Needs, NominalBits, Provenance, QuantizationMethod
from methods.compensation import compensate_columns
from methods.grids import Grid, resolve_group_size
from methods.hessian import factorize
from methods.mixed_columns import MixedColumns, SignGrid, fit_signs
from methods.second_order import DampingConfig, logged_factor
from methods.slim_llm.allocation import (
    Rounding,
    candidates,
    divergence_losses,
    fewest,
    group_salience,
    ranking,
    squared_losses,
    widths_of,
)
from methods.slim_llm.ranges import search_range
from methods.statistics import LayerStatistics

_SEARCH_DAMPING = 0.01


class GroupWidthConfig(DampingConfig):
    """Options of the allocation, which SliM-LLM and SliM-LLM+ share."""

    bits: int = Field(2, ge=2, le=7, description="bits of most groups; as many have one less as one more")
    group_size: int = Field(
        128, ge=-1, description="input columns that share a width and a scale; -1 for the whole row"
    )
    objective: Literal["kl", "mse"] = Field(
        "kl", description="what the number of groups with other widths minimises: KL of softmaxed outputs, or their MSE"
    )
    faithful: bool = Field(False, description="as the released code does, its quirks included")


class SlimLlmConfig(GroupWidthConfig):
    salience_weight: float = Field(
        1.0, gt=0, description="what errors of salient weights count in the range search; 1 as in every released script"
    )


class GroupWidthMethod(QuantizationMethod):
    """What the two methods share: the choice of widths, shapes, and the headline bits."""

    Config = GroupWidthConfig
    config: GroupWidthConfig

    def check_shape(self, out_features: int, in_features: int) -> None:
        resolve_group_size(self.config.group_size, in_features)

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """The mean width over columns, codes alone: the paper counts neither scales nor zero points."""
        assert isinstance(packed, MixedWeight)
        return NominalBits(weight=float(packed.column_widths().float().mean()), scale=0.0)

    def choose_widths(
        self, weight: Tensor, statistics: LayerStatistics, group_size: int, context: LayerContext
    ) -> tuple[list[int], LayerStatistics]:
        """The width of each column group of `weight` [m, n], float32; and the statistics to go on with.

        Facts: `pairs`, the losses of all that were tried, `widths`. With fewer than four groups there is nothing to
        search: all have `bits`, and the facts say so. With one candidate it is taken without a search, as its loss has
        nothing to be compared with.
        """
        config = self.config
        searched = None
        # Equal numbers of groups with more and fewer bits keep the mean only where all of them are equally wide.
        last_keeps = not config.faithful and weight.shape[1] % group_size > 0
        if config.faithful:
            hessian = statistics.hessian.clone()
            hessian.diagonal()[hessian.diagonal() == 0] = 1.0
            hessian.diagonal().add_(_SEARCH_DAMPING)
            searched = ranking(group_salience(weight, factorize(hessian, 0.0).diagonal(), group_size))
            inputs, samples = statistics.inputs, statistics.samples
            statistics = LayerStatistics(hessian, samples, statistics.tokens, inputs)
        factor = statistics.inverse_factor(config.damping)
        order = ranking(group_salience(weight, factor.diagonal(), group_size), last_keeps=last_keeps)
        tried = candidates(len(order))
        pairs = min(len(tried), 1)
        if len(tried) > 1:
            losses = self._losses(weight, statistics, order if searched is None else searched, group_size, context)
            pairs = fewest(losses)
            context.facts["losses"] = losses
        if not tried:
            context.facts["fallback"] = f"{len(order)} column groups are fewer than 4: all have {config.bits} bits"
        context.facts["pairs"] = pairs
        context.facts["widths"] = widths_of(order, config.bits, pairs)
        return context.facts["widths"], statistics

    def _losses(
        self, weight: Tensor, statistics: LayerStatistics, order: list[int], group_size: int, context: LayerContext
    ) -> list[float]:
        config = self.config
        rounding = Rounding(group_size, self.scale_dtype, around_zero=config.faithful)
        if config.objective == "mse":
            return squared_losses(weight, statistics.hessian, order, config.bits, rounding)
        inputs = self._inputs(statistics, context)
        return divergence_losses(
            weight, inputs, order, config.bits, rounding, bias=context.bias, faithful=config.faithful
        )


class SlimLlm(GroupWidthMethod):
    """See the module."""

    Config = SlimLlmConfig
    config: SlimLlmConfig
    provenance = Provenance(
        paper="arXiv 2405.14917", code="Aaronhuang-778/SliM-LLM cfdf5ff", parity="tested on golden vectors"
    )

    @property
    def needs(self) -> Needs:
        return "inputs" if self.config.objective == "kl" else "hessian"

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        statistics = self._statistics(statistics, weight, context)
        group_size = resolve_group_size(self.config.group_size, weight.shape[1])
        widths, statistics = self.choose_widths(weight, statistics, group_size, context)
        factor = logged_factor(statistics, self.config.damping, context)
        weight[:, factor.dead] = 0
        groups = MixedColumns(weight, widths, group_size, _Fits(self, factor.diagonal()))
        # A block of the loop is a group, as in the released code.
        _, context.facts["squared_error"] = compensate_columns(weight, factor.upper, groups, group_size)
        return groups.pack()


class _Fits:
    """Fits the grid of one group after the other."""

    def __init__(self, method: SlimLlm, pivots: Tensor) -> None:
        self._config = method.config
        self._scale_dtype = method.scale_dtype
        self._pivots = pivots
        self._only_low_so_far = True

    def __call__(self, values: Tensor, bits: int, columns: Tensor) -> Grid | SignGrid:
        config = self._config
        self._only_low_so_far &= bits < config.bits
        if bits == 1:
            return fit_signs(values, self._scale_dtype, around_zero=config.faithful)
        return search_range(
            values,
            self._pivots[columns],
            bits,
            self._scale_dtype,
            salience_weight=config.salience_weight,
            middle_zero=config.faithful and self._only_low_so_far,
        )
