"""One block of BiLLM: its constants fitted to the weights, and the planes that will be stored.

Source: Huang et al. 2024, BiLLM, arXiv 2402.04291, section 3.3; Aaronhuang-778/BiLLM dc137eb.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts.residual_binary import decode_block
from methods.binarization import row_moments, signed
from methods.rounding import store


@dataclass(frozen=True)
class Masks:
    """How a block [m, k] is divided. salient: [k] bool. sparse: [m, k] bool, the outer group of the other columns."""

    salient: Tensor
    sparse: Tensor


@dataclass(frozen=True)
class Block:
    """A quantized block. negative, residual_negative: [m, k] bool. means: [m, 3], scales: [m, 4], as stored."""

    masks: Masks
    negative: Tensor
    residual_negative: Tensor
    means: Tensor
    scales: Tensor

    def decode(self) -> Tensor:
        """The block's weights [m, k], float32, as they will be decoded from storage."""
        return decode_block(
            self.negative, self.residual_negative, self.masks.sparse, self.masks.salient, self.means, self.scales
        )


def fit_block(weight: Tensor, masks: Masks, scale_dtype: torch.dtype) -> Block:
    """Binarize `weight` [m, k]: concentrated and sparse weights once, salient columns with a residual.

    The signs are those of the exact constants; the constants are then rounded to `scale_dtype`. The two means of the
    salient columns are stored as their sum.
    """
    salient = masks.salient.expand_as(weight)
    sparse_mean, sparse_scale = row_moments(weight, masks.sparse)
    dense_mean, dense_scale = row_moments(weight, ~(masks.sparse | salient))
    mean, scale = row_moments(weight, salient)
    negative = weight < torch.where(salient, mean, torch.where(masks.sparse, sparse_mean, dense_mean))
    rest = weight - (signed(scale, negative) + mean)
    rest_mean, rest_scale = row_moments(rest, salient)
    return Block(
        masks,
        negative,
        rest < rest_mean,
        store(torch.cat([dense_mean, sparse_mean, mean + rest_mean], dim=1), scale_dtype),
        store(torch.cat([dense_scale, sparse_scale, scale, rest_scale], dim=1), scale_dtype),
    )
