"""CMPQ: bits by input channel after the size of its activations, a codebook for each channel, a few weights in 16 bits.

A reconstruction: no code is public, and the abstract alone could be read. What it says: channels with a larger
activation norm get more bits, any average between 2 and 4; a channel is quantized non-uniformly (k-means), without
gradients or second-order information; outliers by activation and by quantization error stay in 16 bits. What is ours:
a channel is an input channel, i.e. a column; two neighbouring widths that give the average; the outliers' shares; 1-d
k-means from quantiles. Source: Chen et al. 2024, arXiv 2410.13056.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import PackedWeight
from kernels.layouts.channel_codebook import ChannelCodebookWeight
from methods.base import LayerContext, MethodConfig, Needs, NominalBits, Provenance, QuantizationMethod
from methods.rounding import store
from methods.statistics import LayerStatistics


class CmpqConfig(MethodConfig):
    average_bits: float = Field(
        3.0,
        ge=1,
        le=8,
        description="bits of a code on average over the columns; at a whole number all columns have that many",
    )
    activation_outliers: float = Field(
        0.0045,
        ge=0,
        le=0.5,
        description="share of weights kept in 16 bits for |w| times the channel's activation norm",
    )
    error_outliers: float = Field(0.0005, ge=0, le=0.5, description="share kept in 16 bits for their rounding error")
    iterations: int = Field(20, ge=1, description="steps of k-means")


class Cmpq(QuantizationMethod):
    """See the module."""

    Config = CmpqConfig
    config: CmpqConfig
    provenance = Provenance(
        paper="arXiv 2410.13056",
        code="no public code",
        parity="none possible: no public code",
        reconstruction=True,
        basis="the paper's abstract alone",
    )

    @property
    def needs(self) -> Needs:
        return "hessian"  # its diagonal holds the squared norms of the channels

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        norms = self._statistics(statistics, weight, context).hessian.diagonal().sqrt()
        widths = channel_widths(norms, self.config.average_bits)
        outliers = largest(weight.abs() * norms, self.config.activation_outliers)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        rounded = torch.empty_like(weight)
        sizes = 1 << widths
        first = sizes.cumsum(dim=0) - sizes
        levels = torch.empty(int(sizes.sum()), dtype=self.scale_dtype, device=weight.device)
        for width in sorted(set(widths.tolist())):
            inside = widths == width
            values = weight[:, inside].T.contiguous()
            centers = codebooks(values, ~outliers[:, inside].T, 1 << width, self.config.iterations)
            centers = store(centers, self.scale_dtype)
            nearest = torch.searchsorted(_between(centers.float()), values)
            codes[:, inside] = nearest.T.to(torch.uint8)
            rounded[:, inside] = centers.float().gather(1, nearest).T
            levels[first[inside][:, None] + torch.arange(1 << width, device=weight.device)] = centers
        error = torch.where(outliers, 0.0, (weight - rounded).abs())
        outliers |= largest(error, self.config.error_outliers)
        context.facts["outliers"] = int(outliers.sum())
        context.facts["average_bits"] = float(widths.float().mean())
        return ChannelCodebookWeight.pack(
            codes, levels, widths=widths, outliers=outliers, weight=store(weight, self.scale_dtype)
        )

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """The average width of the channels; codebooks and outliers are not in the headline."""
        assert isinstance(packed, ChannelCodebookWeight)
        return NominalBits(weight=float(packed.column_widths().float().mean()), scale=0.0)


def channel_widths(norms: Tensor, average: float) -> Tensor:
    """Widths [n], two neighbouring ones whose mean is `average` to 1/n: the larger for the largest `norms` [n]."""
    low = math.floor(average)
    more = round((average - low) * norms.numel())
    widths = torch.full(norms.shape, low, dtype=torch.int64, device=norms.device)
    widths[torch.argsort(norms, descending=True, stable=True)[:more]] += 1
    return widths


def largest(values: Tensor, share: float) -> Tensor:
    """[m, n] bool: the given share of `values` [m, n] with the largest value."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.flatten().topk(round(share * values.numel())).indices] = True
    return mask.view(values.shape)


def codebooks(values: Tensor, counted: Tensor, size: int, iterations: int) -> Tensor:
    """1-d k-means of each row of `values` [k, m]: `size` centers, ascending, [k, size].

    counted: [k, m] bool, the entries that take part. On sorted values a cluster is an interval, so a step of Lloyd's
    costs a search for the boundaries and two differences of running sums, whatever m is. Starts from quantiles.
    """
    ordered, order = values.sort(dim=1)
    share = counted.gather(1, order).double()
    zero = share.new_zeros(values.shape[0], 1)
    count = torch.cat([zero, share.cumsum(dim=1)], dim=1)
    total = torch.cat([zero, (share * ordered).cumsum(dim=1)], dim=1)
    quantiles = (torch.arange(size, device=values.device) + 0.5) / size * count[:, -1:]
    starts = torch.searchsorted(count, quantiles).sub_(1).clamp_(0, values.shape[1] - 1)
    centers = ordered.gather(1, starts)
    ends = torch.full((values.shape[0], 1), values.shape[1], device=values.device)
    for _ in range(iterations):
        bounds = torch.cat([torch.zeros_like(ends), torch.searchsorted(ordered, _between(centers)), ends], dim=1)
        members = count.gather(1, bounds).diff(dim=1)
        means = total.gather(1, bounds).diff(dim=1) / members.clamp(min=1)
        centers = torch.where(members > 0, means, centers.double()).float()
    return centers


def _between(centers: Tensor) -> Tensor:
    """The boundaries between neighbouring centers: [k, size - 1]."""
    return ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()
