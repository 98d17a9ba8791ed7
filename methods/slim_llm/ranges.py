"""Salience-weighted quantizer calibration: the width of each row's range in a group, by search.

Source: Huang et al. 2024, SliM-LLM, arXiv 2405.14917, section 3.3; Aaronhuang-778/SliM-LLM cfdf5ff. With a salience
weight of 1, which is what every released script uses, salience plays no part and this is a plain range search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.grids import Grid
from methods.rounding import store_scale

# Ranges from 0.9 to 1.1 of the weights' own are tried; the first of equal errors counts: expansion beats contraction.
_STEPS = 50
_SPREAD = 0.1
_FACTORS = (
    1.0,
    *(1 + _SPREAD * i / _STEPS for i in range(1, _STEPS + 1)),
    *(1 - _SPREAD * i / _STEPS for i in range(1, _STEPS + 1)),
)
_NORM = 2.4
_DEVIATIONS = 2.0


def search_range(
    values: Tensor,
    pivots: Tensor,
    bits: int,
    scale_dtype: torch.dtype,
    *,
    salience_weight: float = 1.0,
    middle_zero: bool = False,
) -> Grid:
    """The grid of each row of `values` [m, k] whose scale has the least sum of |error|^2.4.

    pivots: U_jj of the columns, [k]. salience_weight: what the errors of salient weights (see `salient_weights`) count.
    middle_zero: the zero point is 2**(bits - 1) whatever the range, which clips one side of it (a quirk of the released
    code).
    """
    low = values.amin(dim=1, keepdim=True).clamp(max=0)
    high = values.amax(dim=1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    top = (1 << bits) - 1
    counts = None
    if salience_weight != 1:
        counts = torch.where(salient_weights(values, pivots), salience_weight, 1.0)
    best = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.ones_like(low).to(scale_dtype), torch.zeros_like(low)
    error = torch.empty_like(values)
    for factor in _FACTORS:
        stored = store_scale(factor * (high - low) / top, scale_dtype)
        scale = stored.float()
        zero = torch.full_like(low, 1 << (bits - 1)) if middle_zero else torch.round(-factor * low / scale)
        zero.clamp_(0, top)
        torch.div(values, scale, out=error).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale).sub_(values)
        error.abs_().pow_(_NORM)
        lost = (error if counts is None else error.mul_(counts)).sum(dim=1, keepdim=True)
        better = lost < best
        best = torch.where(better, lost, best)
        best_scale, best_zero = torch.where(better, stored, best_scale), torch.where(better, zero, best_zero)
    return Grid(best_scale, best_zero, bits)


def salient_weights(values: Tensor, pivots: Tensor) -> Tensor:
    """[m, k] bool: from the smallest salience w^2 / U_jj^2 that lies two deviations from the group's mean upwards."""
    salience = (values / pivots).square_()
    far = (salience - salience.mean()).abs() > _DEVIATIONS * salience.std()
    threshold = salience[far].min() if far.any() else salience.new_tensor(float("inf"))
    return salience >= threshold
