"""Rounding of stored constants: one place decides what a scale becomes when it is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import NumericalError
from kernels.finite import all_finite


def store(constants: Tensor, dtype: torch.dtype) -> Tensor:
    """`constants` in the dtype they are stored in. Raises NumericalError if one overflows."""
    stored = constants.to(dtype)
    if not all_finite(stored):
        worst = float(constants.abs().max())
        name = str(dtype).removeprefix("torch.")
        raise NumericalError(
            f"a constant of {worst:g} cannot be stored in {name}; use scale_dtype='float32' or 'bfloat16'"
        )
    return stored


def store_scale(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Like `store`, for positive scales that are divided by: none is rounded down to zero."""
    smallest = torch.finfo(dtype).smallest_normal
    return store(scales.clamp(min=smallest) if dtype != torch.float16 else scales.clamp(min=2.0**-24), dtype)
