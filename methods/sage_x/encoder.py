"""From a weight, the Hessian of its inputs and a budget to packed bytes: rotate, choose rates, encode column by column.

With a Hessian each column's error is fed back into those that follow (GPTQ, arXiv 2210.17323; LDLQ of QuIP, arXiv
2307.13304, section 3): loss = sum over columns of ||target - value||^2 / U_jj^2, exactly, whatever rounds the column. A
column's price is therefore its energy / U_jj^2, and columns are visited in order of decreasing Hessian diagonal. The
trellis runs down a column, so feedback stays exact column by column, and decoding does not depend on the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts import TrellisWeight
from kernels.layouts.bitpack import packed_size
from kernels.layouts.trellis import CLASS_BITS
from methods.compensation import compensate_columns
from methods.hessian import InverseFactor, factorize
from methods.sage_x.columns import ColumnEncoder
from methods.sage_x.rates import assign_classes
from methods.sage_x.recipe import Recipe
from methods.sage_x.rotation import rotated, row_scales

# Columns compensated at once before the rest of the matrix is updated; a matter of speed alone.
_BLOCK = 64


@dataclass(frozen=True)
class Pivots:
    """The order in which columns are visited, and the factor of the damped inverse Hessian in that order."""

    order: Tensor
    factor: InverseFactor

    @classmethod
    def of(cls, hessian: Tensor, recipe: Recipe) -> Pivots:
        """Pivots of `hessian` [n, n], undamped."""
        diagonal = hessian.diagonal()
        order = torch.arange(len(diagonal), device=hessian.device)
        if "order" not in recipe.without:
            order = diagonal.argsort(descending=True, stable=True)
        if "feedback" in recipe.without:
            hessian = diagonal.diag()
        return cls(order, factorize(hessian[order][:, order], recipe.damping))


def encode_matrix(
    weight: Tensor,
    pivots: Pivots | None,
    budget: float,
    recipe: Recipe,
    importance: Tensor | None = None,
    inputs: Tensor | None = None,
) -> TrellisWeight:
    """Pack `weight` [m, n], float32, into at most `budget` bits per weight, scales and all.

    pivots: of the inputs' Hessian, or None: no Hessian, no feedback. importance: [m], of the outputs, positive, or
    None. inputs: [n], mean square of each input where there is no Hessian, or None: all inputs alike.
    """
    scales = row_scales(weight, recipe, importance)
    target = rotated(weight, scales, recipe)
    rows, columns = weight.shape
    stream_bytes = whole_bytes(budget * rows * columns) - overhead_bytes(rows, columns, recipe.scale_dtype)
    energy = target.square().mean(dim=0)
    if pivots is None:
        prices = energy if inputs is None else energy * inputs.to(energy)
        encoder = ColumnEncoder(rows, assign_classes(_priced(prices, recipe), rows, stream_bytes))
        encoder.encode_all(target)
        return _packed(encoder, torch.arange(columns), scales, recipe)
    order = pivots.order
    target = target[:, order]
    target[:, pivots.factor.dead] = 0
    prices = energy[order] / pivots.factor.diagonal().square()
    prices[pivots.factor.dead] = 0
    encoder = ColumnEncoder(rows, assign_classes(_priced(prices, recipe), rows, stream_bytes))
    compensate_columns(target, pivots.factor.upper, encoder, _BLOCK)
    return _packed(encoder, order.argsort().cpu(), scales, recipe)


def whole_bytes(bits: float) -> int:
    """The bytes that `bits` hold. What is missing to a byte through the rounding of floats alone is not missing."""
    return math.floor(bits / 8 + 1e-6)


def overhead_bytes(rows: int, columns: int, scale_dtype: torch.dtype) -> int:
    """Bytes of a matrix that are not code streams: classes, column scales, row scales."""
    return packed_size(columns, CLASS_BITS) + columns + rows * scale_dtype.itemsize


def _packed(encoder: ColumnEncoder, place: Tensor, scales: Tensor, recipe: Recipe) -> TrellisWeight:
    """place: [n], where each column of the matrix stands in the encoder's order."""
    return TrellisWeight.pack(
        encoder.codes[place].T,
        encoder.classes[place],
        encoder.scale_codes[place],
        scales.cpu(),
        rotated="rotation" not in recipe.without,
    )


def _priced(prices: Tensor, recipe: Recipe) -> Tensor:
    """Without rate classes all live columns have one price, so that they share the budget as evenly as it goes."""
    return (prices > 0).float() if "rates" in recipe.without else prices
