"""RTN: round every weight to the nearest point of its group's grid. No calibration.

Source: the `--nearest` path of IST-DASLab/gptq 2d65066, with groups (the released path ignores the group size).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import PackedWeight, UniformWeight
from methods.base import LayerContext, MethodConfig, NominalBits, Provenance, QuantizationMethod
from methods.grids import GroupedCodes, resolve_group_size, round_to_groups
from methods.statistics import LayerStatistics


class UniformConfig(MethodConfig):
    """Options of every method that ends on a uniform grid."""

    bits: int = Field(4, ge=1, le=8, description="bits of a code")
    group_size: int = Field(128, ge=-1, description="input columns that share a scale; -1 for the whole row")
    symmetric: bool = Field(False, description="zero point fixed at mid-range instead of stored")


class UniformMethod(QuantizationMethod):
    """What methods with a uniform grid share: the shape check and the headline bits."""

    Config = UniformConfig
    config: UniformConfig

    def check_shape(self, out_features: int, in_features: int) -> None:
        resolve_group_size(self.config.group_size, in_features)

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """`bits` for the codes, and 16-bit scales and (asymmetric) 16-bit zero points per group.

        As SAGE-PTQ's tables count these methods; GPTQ's and AWQ's own papers name the bits of a code alone.
        """
        group_size = resolve_group_size(self.config.group_size, packed.shape[1])
        constants = 1 if self.config.symmetric else 2
        return NominalBits(weight=float(self.config.bits), scale=16 * constants / group_size)


def pack_groups(rounded: GroupedCodes, config: UniformConfig) -> UniformWeight:
    """Group-wise codes as a uniform layout."""
    return UniformWeight.pack(
        rounded.codes.to(torch.uint8),
        rounded.scales,
        None if config.symmetric else rounded.zeros.to(torch.uint8),
        bits=config.bits,
        group_size=rounded.group_size,
    )


class Rtn(UniformMethod):
    """See the module."""

    provenance = Provenance(
        paper="baseline of arXiv 2210.17323 (GPTQ)",
        code="IST-DASLab/gptq 2d65066",
        parity="tested on golden vectors",
    )

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        config = self.config
        group_size = resolve_group_size(config.group_size, weight.shape[1])
        rounded = round_to_groups(
            weight, config.bits, group_size, symmetric=config.symmetric, scale_dtype=self.scale_dtype
        )
        return pack_groups(rounded, config)
