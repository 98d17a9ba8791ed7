"""Binarization of the masked entries of each row: mean, scale, and a residual that is binarized again.

Source: Rastegari et al. 2016, XNOR-Net, arXiv 1603.05279 (mean magnitude is the optimal scale); Huang et al. 2024,
BiLLM, arXiv 2402.04291, section 3 (residual). Masks are explicit: the released BiLLM marks the outside of a mask by NaN
and relies on sign(NaN) = 0, which holds in torch alone. Nothing here makes a NaN; a row without entries has mean and
scale 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean absolute deviation, each [m, 1], of the masked entries of every row.

    values: [m, k], finite floats. mask: [m, k] or [1, k], bool. Both are 0 for a row without entries. They are the
    least-squares level pair mean +- scale for the signs of (values - mean).
    """
    mask = mask.expand_as(values)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (values * mask).sum(dim=1, keepdim=True) / count
    scale = ((values - mean).abs() * mask).sum(dim=1, keepdim=True) / count
    return mean, scale


def signed(scale: Tensor, negative: Tensor) -> Tensor:
    """`scale` [m, 1] with a minus where `negative` [m, k] is set."""
    return torch.where(negative, -scale, scale)


def residual_binarization(values: Tensor, mask: Tensor, order: int) -> Tensor:
    """R_order(values; mask): the sum of `order` binarizations, each of what the one before left; 0 outside the mask.

    values: [m, k], finite floats. mask: [m, k] or [1, k], bool. order: 1 or more. Returns [m, k].
    """
    total = torch.zeros_like(values)
    for _ in range(order):
        rest = values - total
        mean, scale = row_moments(rest, mask)
        total = total + mean + signed(scale, rest < mean)
    return total * mask
