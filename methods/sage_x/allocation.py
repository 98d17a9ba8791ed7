"""The model-level budget: how many bytes each matrix gets, so that all columns of all matrices sit at one slope.

The same water-filling as inside a matrix (rates.py), over all columns at once, in units that hold across matrices: the
predicted KL divergence (sensitivity.py). HIGGS (arXiv 2411.17525) and Q-Palette (2509.20214) allocate by such a linear
model; here the predicted price of a column includes what error feedback will save.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.sage_x.encoder import Pivots, overhead_bytes
from methods.sage_x.rates import class_bytes, share_budget
from methods.sage_x.recipe import Recipe
from methods.sage_x.rotation import rotated, row_scales
from methods.sage_x.sensitivity import Sensitivity


def matrix_budgets(
    weights: Mapping[str, Tensor], sensitivities: Mapping[str, Sensitivity], budget: float, recipe: Recipe
) -> dict[str, float]:
    """Bits per weight of each matrix, overhead included; over all matrices `budget` bits per weight at most.

    weights: [m, n], any float dtype, by name.
    """
    prices = [column_prices(weight.float(), sensitivities[name], recipe) for name, weight in weights.items()]
    rows = [weight.shape[0] for weight in weights.values()]
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    overhead = {name: overhead_bytes(m, n, recipe.scale_dtype) for name, (m, n) in shapes.items()}
    size = sum(weight.numel() for weight in weights.values())
    classes = share_budget(prices, rows, budget * size / 8 - sum(overhead.values()))
    return {
        name: 8 * (float(class_bytes(weight.shape[0])[chosen].sum()) + overhead[name]) / weight.numel()
        for (name, weight), chosen in zip(weights.items(), classes, strict=True)
    }


def column_prices(weight: Tensor, found: Sensitivity, recipe: Recipe) -> Tensor:
    """The KL divergence in nats a token that each column is predicted to cost at distortion 1: [n]."""
    importance = None if "weighting" in recipe.without else found.importance
    scales = row_scales(weight, recipe, importance)
    energy = rotated(weight, scales, recipe).square().mean(dim=0)
    pivots = Pivots.of(found.hessian, recipe)
    prices = torch.empty_like(energy)
    prices[pivots.order] = energy[pivots.order] / pivots.factor.diagonal().square()
    prices[pivots.order[pivots.factor.dead]] = 0
    return 0.5 * prices * float((found.importance * scales.float().square()).sum())
