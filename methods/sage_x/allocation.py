"""The model-level budget: how many bytes each matrix gets, so that all columns of all matrices sit at one slope.

The same water-filling as inside a matrix (rates.py), over all columns at once, in units that hold across matrices: a
rough price in the model's loss (sensitivity.py). HIGGS (arXiv 2411.17525) and Q-Palette (2509.20214) allocate by such a
linear model; here the predicted price of a column includes what error feedback will save. The model is that of small
errors; far below 2 bits they are not small, and its optimum is not to be trusted far away from an even share.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.sage_x.encoder import Pivots, overhead_bytes, whole_bytes
from methods.sage_x.rates import class_bytes, share_budget
from methods.sage_x.recipe import Recipe
from methods.sage_x.rotation import rotated, row_scales
from methods.sage_x.sensitivity import Sensitivity

# Bits per weight that a matrix may lie above or below a mean of less than CAPPED_BELOW bits.
CAP = 0.75
CAPPED_BELOW = 2.0


def matrix_budgets(
    weights: Mapping[str, Tensor], sensitivities: Mapping[str, Sensitivity], budget: float, recipe: Recipe
) -> dict[str, float]:
    """Bits per weight of each matrix, overhead included; over all matrices `budget` bits per weight at most.

    weights: [m, n], any float dtype, by name. Below CAPPED_BELOW bits none lies further than CAP from `budget`.
    """
    prices = {name: column_prices(weight.float(), sensitivities[name], recipe) for name, weight in weights.items()}
    size = sum(weight.numel() for weight in weights.values())
    capped = budget < CAPPED_BELOW and "cap" not in recipe.without
    fixed: dict[str, float] = {}
    while len(fixed) < len(weights):
        free = {name: weight for name, weight in weights.items() if name not in fixed}
        spent = sum(whole_bytes(bits * weights[name].numel()) for name, bits in fixed.items())
        found = _shared(free, prices, whole_bytes(budget * size) - spent, recipe)
        outside = _outside(found, free, budget) if capped else {}
        if not outside:
            fixed |= found
        fixed |= outside
    return {name: fixed[name] for name in weights}


def _shared(
    weights: Mapping[str, Tensor], prices: Mapping[str, Tensor], budget: float, recipe: Recipe
) -> dict[str, float]:
    """Bits per weight of each of `weights`, all their columns at one slope; together `budget` bytes at most."""
    rows = [weight.shape[0] for weight in weights.values()]
    overhead = {name: overhead_bytes(w.shape[0], w.shape[1], recipe.scale_dtype) for name, w in weights.items()}
    classes = share_budget([prices[name] for name in weights], rows, budget - sum(overhead.values()))
    return {
        name: 8 * (float(class_bytes(weight.shape[0])[chosen].sum()) + overhead[name]) / weight.numel()
        for (name, weight), chosen in zip(weights.items(), classes, strict=True)
    }


def _outside(found: Mapping[str, float], weights: Mapping[str, Tensor], budget: float) -> dict[str, float]:
    """Those of `found` that the cap moves for good, and where to: all that lie too high, or all that lie too low.

    If more is freed above than is missing below, the others share it at a gentler slope, where who lay too high would
    lie higher still; and the other way round. So the larger sum tells the side, and what is fixed stands at its bound
    in the optimum too (Bitran and Hax 1981).
    """
    high = {name: budget + CAP for name, bits in found.items() if bits > budget + CAP}
    low = {name: budget - CAP for name, bits in found.items() if bits < budget - CAP}

    def violation(side: Mapping[str, float]) -> float:
        return sum(abs(found[name] - bits) * weights[name].numel() for name, bits in side.items())

    return high if violation(high) >= violation(low) else low


def column_prices(weight: Tensor, found: Sensitivity, recipe: Recipe) -> Tensor:
    """What each column is predicted to cost at distortion 1, in the units of sensitivity.py, nats a token: [n]."""
    importance = None if "weighting" in recipe.without else found.importance
    scales = row_scales(weight, recipe, importance)
    energy = rotated(weight, scales, recipe).square().mean(dim=0)
    pivots = Pivots.of(found.hessian, recipe)
    prices = torch.empty_like(energy)
    prices[pivots.order] = energy[pivots.order] / pivots.factor.diagonal().square()
    prices[pivots.order[pivots.factor.dead]] = 0
    return 0.5 * prices * float((found.importance * scales.float().square()).sum())
