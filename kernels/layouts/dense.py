"""Dense: the weight itself in a 16-bit (or 32-bit) float. The unquantized row of every table is stored this way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kernels.layouts.base import SCALE_DTYPES, PackedWeight, Role, check_no_extra, check_shape, check_tensor


class DenseWeight(PackedWeight):
    """`weight`: [out_features, in_features], float16, bfloat16 or float32, stored as it is."""

    layout = "dense"

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.weight = weight

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def role(self, name: str) -> Role:
        return "code"

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        check_no_extra(tensors, {"weight"})
        return cls(check_tensor(tensors, "weight", shape, tuple(SCALE_DTYPES.values())))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype, copy=True)
