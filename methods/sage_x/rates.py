"""Which column gets how many bits: reverse water-filling over the discrete rate classes.

A column whose targets have the price p (its share of the layer's loss if it were left out) loses p * D(class), with D
the distortion of the class; the loss is least for a given number of bytes where every column sits at the same slope of
p * D against bytes (WaterSIC, arXiv 2603.04956, for scalar codes with entropy coding; here without a coder). D is
convex in the rate, so one multiplier finds the optimum but for the last few columns, which are filled in by order of
gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.layouts.trellis import column_bytes
from kernels.layouts.trellis_tables import WIDTHS, distortions

_STEPS = 60  # bisections of the multiplier


def class_bytes(rows: int) -> Tensor:
    """Bytes of a column of `rows` rows in each class: [16], float64."""
    return torch.tensor([column_bytes(rows, c) for c in range(len(WIDTHS))], dtype=torch.float64)


def assign_classes(prices: Tensor, rows: int, budget: float) -> Tensor:
    """The class of each column: [n], int64, for prices [n] >= 0; all streams together take `budget` bytes at most."""
    return share_budget([prices], [rows], budget)[0]


def share_budget(prices: Sequence[Tensor], rows: Sequence[int], budget: float) -> list[Tensor]:
    """The same over several matrices that share one budget: prices[i] [n_i] of a matrix with rows[i] rows."""
    sizes = torch.cat([class_bytes(m).expand(len(p), -1) for p, m in zip(prices, rows, strict=True)])
    price = torch.cat([p.double().cpu() for p in prices])
    losses = price[:, None] * torch.tensor(distortions(), dtype=torch.float64)

    def choose(multiplier: float) -> tuple[Tensor, float]:
        classes = (losses + multiplier * sizes).argmin(dim=1)
        return classes, float(sizes.gather(1, classes[:, None]).sum())

    # Bisect the logarithm of the multiplier between "everything at the highest class" and "nothing".
    # In units of the prices, so that only their ratios matter.
    high = 2 * float(price.max()) or 1.0
    low = high * 1e-18
    classes, used = choose(high)
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        candidate, size = choose(middle)
        if size <= budget:
            high, classes, used = middle, candidate, size
        else:
            low = middle
    classes = _fill(classes, losses, sizes, budget - used)
    return list(classes.split([len(p) for p in prices]))


def _fill(classes: Tensor, losses: Tensor, sizes: Tensor, left: float) -> Tensor:
    """Raise columns by one class, those with the largest gain a byte first, while bytes are left."""
    up = (classes + 1).clamp_max(sizes.shape[1] - 1)
    cost = (sizes.gather(1, up[:, None]) - sizes.gather(1, classes[:, None])).squeeze(1)
    gain = (losses.gather(1, classes[:, None]) - losses.gather(1, up[:, None])).squeeze(1)
    classes = classes.clone()
    for column in (gain / cost.clamp_min(1)).argsort(descending=True, stable=True).tolist():
        if gain[column] <= 0:
            break
        if cost[column] <= left:
            left -= float(cost[column])
            classes[column] = up[column]
    return classes
