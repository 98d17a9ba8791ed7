"""MicroMix: weights and activations in 4-, 6- and 8-bit microscaling floats, emulated in software.

Input channels are sorted by the size of their activations; the largest get FP8, the next FP6, most FP4, as many as the
share of activations that are too large, beside their token's largest, for the cheaper format: its error must stay under
that of INT8. Weights take the format of their channel. The layer then multiplies rounded weights and rounded inputs:
what decodes the weights also rounds the inputs, so quality is measured on both. It is no weight-only method, and no
speed is claimed: the formats need tensor cores that an emulation does not have. Channels are chosen on the activations
of the unquantized model, in one pass over it, as the released code does.
Source: Liu et al. 2025, arXiv 2508.02343; lwy2020/MicroMix, branch micromix. `faithful` has two slips of that branch:
inputs enter the comparison with their sign, so that every negative one counts as small, and the numbers of FP6 and FP8
channels are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import PackedWeight
from kernels.layouts.microscaling import FORMATS, MicroscalingWeight
from methods.base import LayerContext, MethodConfig, Needs, NominalBits, Provenance, QuantizationMethod
from methods.block import BlockResult, BlockView
from methods.statistics import LayerStatistics

# The share of a token's largest input up to which FP4 and FP6 err less than INT8 does.
_FP4_LIMIT = 2 / 254 * 8 / 6
_FP6_LIMIT = 8 / 254 * 32 / 28
# Channels of a format come in multiples of this.
_SEGMENT = 128


class MicroMixConfig(MethodConfig):
    faithful: bool = Field(False, description="signed comparison, and FP6 and FP8 exchanged, as the released code does")


class MicroMix(QuantizationMethod):
    """See the module."""

    Config = MicroMixConfig
    config: MicroMixConfig
    provenance = Provenance(
        paper="arXiv 2508.02343",
        code="lwy2020/MicroMix branch micromix",
        parity="not tested: no golden vectors",
        remark="weights and activations (W+A) are quantized, emulated in software; no speed is claimed",
    )

    stream = "unquantized"

    @property
    def needs(self) -> Needs:
        return "block"

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        inputs = self._inputs(self._statistics(statistics, weight, context), context)
        score = torch.zeros(weight.shape[1], device=weight.device)
        large, larger = 0.0, 0.0
        for sample in inputs:
            x = sample.float()
            score = torch.maximum(score, x.abs().mean(dim=0))
            if not self.config.faithful:
                x = x.abs()
            top = x.amax(dim=1, keepdim=True)
            large += float((x >= _FP4_LIMIT * top).float().mean())
            larger += float((x >= _FP6_LIMIT * top).float().mean())
        middle, highest = (large - larger) / len(inputs), larger / len(inputs)
        if self.config.faithful:
            middle, highest = highest, middle
        segments = channel_segments(weight.shape[1], middle, highest)
        context.facts["channels"] = dict(zip(("fp4", "fp6", "fp8"), segments, strict=True))
        return MicroscalingWeight.pack(weight, torch.argsort(score, stable=True), segments)

    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        assert view.collect is not None
        statistics = view.collect("inputs")
        hessians = {name: seen.hessian for name, seen in statistics.items()}
        packed = {
            name: self.quantize_linear(linear.weight, statistics.pop(name), contexts[name])
            for name, linear in view.linears.items()
        }
        return BlockResult(packed, hessians=hessians)

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """The mean width of the elements alone: the paper leaves out the shared exponents, 8 bits a block of 32."""
        assert isinstance(packed, MicroscalingWeight)
        elements = sum(kind.bits * width for kind, width in zip(FORMATS, packed.segments, strict=True))
        return NominalBits(weight=elements / packed.shape[1], scale=0.0)


def channel_segments(channels: int, middle: float, highest: float) -> tuple[int, int, int]:
    """Channels in FP4, FP6 and FP8 from the shares that need FP6 and FP8: multiples of 128, the rest FP4."""
    eight = min(math.ceil(channels * highest / _SEGMENT) * _SEGMENT, channels)
    six = min(math.ceil(channels * middle / _SEGMENT) * _SEGMENT, channels - eight)
    return channels - six - eight, six, eight
