"""BiLLM as its description reads: every candidate evaluated by reconstructing the whole block. Slow on purpose.

The searches of `methods.billm` are tested against this one, for their choices and for their speed. It shares no code
with them. Source: Huang et al. 2024, arXiv 2402.04291; the steps and constants of Aaronhuang-778/BiLLM dc137eb.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class ReferenceResult:
    """quantized: [m, n]. salient: [n] bool. sparse: [m, n] bool. thresholds: one float a block."""

    quantized: Tensor
    salient: Tensor
    sparse: Tensor
    thresholds: list[float]


def residual(values: Tensor, mask: Tensor, order: int) -> Tensor:
    """R_order over the masked entries of each row, with sign(0) = 0; zero elsewhere."""
    total = torch.zeros_like(values)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    for _ in range(order):
        rest = torch.where(mask, values - total, torch.zeros_like(values))
        mean = rest.sum(dim=1, keepdim=True) / count
        centred = torch.where(mask, rest - mean, torch.zeros_like(values))
        scale = centred.abs().sum(dim=1, keepdim=True) / count
        total = total + torch.where(mask, scale * torch.sign(centred) + mean, torch.zeros_like(values))
    return total


def salient_columns(target: Tensor, scores: Tensor, limit: int = 50) -> Tensor:
    """[k] bool, by trying the 1, 2, ... limit - 1 columns of highest score."""
    order = torch.argsort(scores, descending=True)
    best, best_count = float("inf"), 0
    for count in range(1, limit):
        mask = torch.zeros_like(target, dtype=torch.bool)
        mask[:, order[:count]] = True
        error = float((target - residual(target, mask, 2) - residual(target, ~mask, 2)).square().mean())
        if error < best:
            best, best_count = error, count
    chosen = torch.zeros(target.shape[1], dtype=torch.bool)
    chosen[order[:best_count]] = True
    return chosen


def break_point(target: Tensor, salient: Tensor) -> float:
    """The threshold on |target|, by trying 81 quantiles of the block whose salient columns are zeroed."""
    mask = salient.expand_as(target)
    magnitudes = target.masked_fill(mask, 0).abs()
    candidates = np.quantile(magnitudes.numpy(), np.linspace(0.1, 0.9, 81)).astype(np.float32)
    rest = target - residual(target, mask, 2)
    best, best_threshold = float("inf"), 0.0
    for threshold in candidates.tolist():
        below = (target.abs() < threshold) & ~mask
        above = (target.abs() >= threshold) & ~mask
        error = float((rest - residual(target, below, 1) - residual(target, above, 1)).square().mean())
        if error < best:
            best, best_threshold = error, threshold
    return best_threshold


def quantize(weight: Tensor, upper: Tensor, *, metric: str = "hessian", block_size: int = 128) -> ReferenceResult:
    """The whole matrix [m, n] with U [n, n]: search, binarize, and push each block's error to the columns behind it.

    Dead columns of `weight` must be zero already.
    """
    weight, quantized = weight.clone(), torch.zeros_like(weight)
    salient_parts, sparse_parts, thresholds = [], [], []
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        block, pivots = weight[:, start:stop].clone(), upper.diagonal()[start:stop]
        target = block**2 / pivots**2 if metric == "hessian" else block
        salient = salient_columns(target, target.abs().sum(dim=0))
        threshold = break_point(target, salient)
        mask = salient.expand_as(block)
        below, above = (target.abs() < threshold) & ~mask, (target.abs() >= threshold) & ~mask
        quantized[:, start:stop] = residual(block, below, 1) + residual(block, above, 1) + residual(block, mask, 2)
        errors = (block - quantized[:, start:stop]) / pivots
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
        salient_parts.append(salient)
        sparse_parts.append(above)
        thresholds.append(threshold)
    return ReferenceResult(quantized, torch.cat(salient_parts), torch.cat(sparse_parts, dim=1), thresholds)
