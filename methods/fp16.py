"""The unquantized row of every table: weights as they are, stored in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layouts import DenseWeight, PackedWeight
from methods.base import LayerContext, NominalBits, Provenance, QuantizationMethod
from methods.rounding import store
from methods.statistics import LayerStatistics


class Fp16(QuantizationMethod):
    """Identity. 16-bit weights keep their dtype and every bit; float32 weights are stored as float16."""

    provenance = Provenance(paper="-", code="-", parity="exact by construction")

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        self._prepare(weight, context)
        dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16
        return DenseWeight(store(weight.detach().clone(), dtype))

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        return NominalBits(weight=16.0, scale=0.0)
