"""The two searches of BiLLM: how many columns of a block are salient, and where the other weights are split in two.

Source: Huang et al. 2024, BiLLM, arXiv 2402.04291, section 3; Aaronhuang-778/BiLLM dc137eb. The released code
evaluates the squared error of every candidate by full passes over the block. Both searches here rank the same
candidates by the energy that a binarization explains, which needs no reconstruction: over c entries with mean m and
mean absolute deviation a,

    sum (t - m - a sign(t - m))^2 = sum t^2 - c (m^2 + a^2),

and the residual of one step goes through the same identity again. The candidate with the least error is the one that
explains most; of equals the first wins, as in the released code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BREAK_POINTS = 81  # candidates at 0.10, 0.11, ... 0.90


def choose_salient_columns(target: Tensor, scores: Tensor, fewest: int, most: int) -> Tensor:
    """[k] bool: the salient columns of a block.

    target: [m, k], float32, what is binarized in the search. scores: [k], the rank of a column. For each count from
    `fewest` to `most` (or k, if that is less) the columns of highest score form one set and the others the second; both
    are binarized with a residual (order 2), and the count with the least squared error wins.
    """
    order = torch.argsort(scores, descending=True)
    ranked = target.T[order]  # [k, m]: the first c rows are the candidate set of c columns
    width, rows = ranked.shape
    counts = torch.arange(min(fewest, width), min(most, width) + 1, device=target.device)
    first_sums = ranked.double().cumsum(dim=0)[counts - 1]
    sizes = torch.stack([counts, width - counts], dim=1)[:, :, None]  # [candidates, 2, 1]
    sums = torch.stack([first_sums, ranked.sum(dim=0, dtype=torch.float64) - first_sums], dim=1)
    means = (sums / sizes.clamp(min=1)).to(target.dtype)

    # Mean, scale, mean of the residual, its scale: for both sets of every candidate and all rows.
    moments = target.new_zeros(len(counts), 2, 4, rows)
    scratch = torch.empty_like(ranked), torch.empty_like(ranked)
    for candidate, count in enumerate(counts.tolist()):
        for side, columns in enumerate((ranked[:count], ranked[count:])):
            if len(columns):
                _binarize_twice(columns, means[candidate, side], moments[candidate, side], scratch)
    explained = (moments.square_().sum(dim=(2, 3), dtype=torch.float64) * sizes[:, :, 0]).sum(dim=1)
    salient = torch.zeros_like(scores, dtype=torch.bool)
    salient[order[: counts[_first_maximum(explained)]]] = True
    return salient


def choose_break_point(target: Tensor, salient: Tensor, candidates: Tensor) -> int:
    """Index of the best of the `candidates`: float32 thresholds [p] on |target| that split the non-salient weights.

    target: [m, k], float32. salient: [k] bool. Per row the weights below a threshold and those at or above it are
    binarized apart (order 1). All candidates are evaluated at once: in the sorted row the weights below a threshold are
    one interval.
    """
    ordered = _sorted(target[:, ~salient])
    rows, count = ordered.shape
    low = torch.searchsorted(ordered, (-candidates).expand(rows, -1).contiguous(), right=True)
    high = torch.searchsorted(ordered, candidates.expand(rows, -1).contiguous())
    high = torch.maximum(low, high)
    ordered = ordered.double()
    sums = torch.nn.functional.pad(ordered.cumsum(dim=1), (1, 0))

    inner, inner_sum = high - low, sums.gather(1, high) - sums.gather(1, low)
    outer, outer_sum = count - inner, sums[:, -1:] - inner_sum
    inner_mean, outer_mean = inner_sum / inner.clamp(min=1), outer_sum / outer.clamp(min=1)

    # sum |t - mean| = 2 * (sum of t above the mean - mean * number above): the deviations on both sides are equal.
    split = torch.searchsorted(ordered, inner_mean).clamp(min=low, max=high)
    inner_spread = 2 * (sums.gather(1, high) - sums.gather(1, split) - inner_mean * (high - split))
    split = torch.searchsorted(ordered, outer_mean)
    hidden = split.clamp(min=low, max=high)  # of the entries above the mean, those in hidden..high are inner ones
    above = count - split - (high - hidden)
    above_sum = sums[:, -1:] - sums.gather(1, split) - (sums.gather(1, high) - sums.gather(1, hidden))
    outer_spread = 2 * (above_sum - outer_mean * above)

    explained = (
        inner_sum * inner_mean
        + inner_spread.square() / inner.clamp(min=1)
        + outer_sum * outer_mean
        + outer_spread.square() / outer.clamp(min=1)
    )
    return _first_maximum(explained.sum(dim=0))


def quantile_thresholds(target: Tensor, salient: Tensor) -> Tensor:
    """81 quantiles of |target| at 0.10 ... 0.90, float32: the candidates of the released code.

    Quantiles of the whole block with salient columns set to 0, as there; linear between neighbours.
    """
    ordered = _sorted(target.abs().masked_fill(salient, 0).flatten())
    position = torch.linspace(0.1, 0.9, BREAK_POINTS, dtype=torch.float64, device=target.device) * (len(ordered) - 1)
    left = position.floor().long()
    right = (left + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[left].double(), ordered[right].double(), position - left).float()


def linear_thresholds(target: Tensor, salient: Tensor) -> Tensor:
    """0.10 ... 0.90 times the largest non-salient |target|, float32: the candidates of the paper's text."""
    fractions = torch.linspace(0.1, 0.9, BREAK_POINTS, dtype=torch.float64, device=target.device)
    return (fractions * target.abs().masked_fill(salient, 0).max()).float()


def _binarize_twice(columns: Tensor, mean: Tensor, moments: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
    """Moments of a binarization and of its residual's, written to `moments` [4, m].

    columns: [c, m], float32, a weight row along the first dimension. mean: [m], over c. scratch: two matrices with at
    least c rows, overwritten: this runs about a hundred times a block, and is all that the search costs.
    """
    rest, other = scratch[0][: len(columns)], scratch[1][: len(columns)]
    moments[0] = mean
    torch.sub(columns, mean, out=rest)
    scale = torch.mean(torch.abs(rest, out=other), dim=0, out=moments[1])
    signs = torch.sign(rest, out=other)
    # The residual's mean follows from the signs alone: rest has mean 0.
    residual_mean = torch.mul(signs.mean(dim=0), scale, out=moments[2]).neg_()
    rest.addcmul_(signs, scale, value=-1).sub_(residual_mean)
    torch.mean(torch.abs(rest, out=other), dim=0, out=moments[3])


def _sorted(values: Tensor) -> Tensor:
    """`values` sorted along the last dimension. On the CPU by numpy, whose vectorized sort is many times faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _first_maximum(values: Tensor) -> int:
    """Index of the first of the largest `values`; argmax alone does not promise the first."""
    return int((values == values.max()).nonzero()[0])
