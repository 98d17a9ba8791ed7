"""A bit width for each column under an average: the error model, and allocators that need no network.

The model of a column's error at b bits is sum_i (w_ij - Q_b(w_ij))^2 / U_jj^2, each column rounded alone. It is
separable, so for a given average a Lagrangian finds its optimum up to the last step: what a network adds must show
against that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.mixed_columns import fit_grid


def column_errors(
    weight: Tensor, pivots: Tensor, choices: Sequence[int], group_size: int, scale_dtype: torch.dtype
) -> Tensor:
    """The modelled error of each column at each width: [n, B], float32.

    weight: [m, n], float32. pivots: U_jj, [n]. choices: B widths, ascending. Grids span groups of `group_size` columns.
    """
    errors = torch.empty(weight.shape[1], len(choices), device=weight.device)
    for index, bits in enumerate(choices):
        for start in range(0, weight.shape[1], group_size):
            group = weight[:, start : start + group_size]
            grid = fit_grid(group, bits, scale_dtype)
            change = grid.decode(grid.encode(group)).sub_(group)
            errors[start : start + group_size, index] = change.square_().sum(dim=0)
    return errors / pivots.square()[:, None]


def knapsack(errors: Tensor, choices: Sequence[int], budget: int) -> Tensor:
    """The widths [n] with the least total error whose sum is at most `budget`, nearly: one price for every bit.

    errors: [n, B]. Each column takes the width of least error + price * bits; the price is found by bisection, and
    what is left of the budget is spent by `spend`.
    """
    bits = torch.tensor(choices, device=errors.device)

    def widths(price: float) -> Tensor:
        return bits[(errors + price * bits).argmin(dim=1)]

    low, high = 0.0, float(errors.max()) + 1e-30
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if int(widths(middle).sum()) > budget else (low, middle)
    return spend(widths(high), errors, choices, budget)


def spend(widths: Tensor, errors: Tensor, choices: Sequence[int], budget: int) -> Tensor:
    """`widths` [n] brought as near to a sum of `budget` as single steps can, never above it.

    One column at a time goes to the next width: down where a bit saves the least error, up where it saves the most.
    """
    level = torch.searchsorted(torch.tensor(choices, device=widths.device), widths)
    bits = torch.tensor(choices, device=widths.device)
    step = (bits[1:] - bits[:-1]).float()
    slope = (errors[:, :-1] - errors[:, 1:]) / step  # error saved a bit, [n, B - 1]
    while int(bits[level].sum()) > budget and bool((level > 0).any()):
        saved = slope.gather(1, (level - 1).clamp(min=0)[:, None]).view(-1)
        level[torch.where(level > 0, saved, float("inf")).argmin()] -= 1
    top = len(choices) - 1
    while True:
        room = budget - int(bits[level].sum())
        fits = (level < top) & (bits[(level + 1).clamp(max=top)] - bits[level] <= room)
        if not bool(fits.any()):
            return bits[level]
        saved = slope.gather(1, level.clamp(max=top - 1)[:, None]).view(-1)
        level[torch.where(fits, saved, -float("inf")).argmax()] += 1


def ranked(widths: Tensor, importance: Tensor) -> Tensor:
    """The same widths handed out by `importance` [n], most bits to the most important column."""
    result = torch.empty_like(widths)
    result[torch.argsort(importance, descending=True, stable=True)] = widths.sort(descending=True).values
    return result
