"""Salience-determined bit allocation: which column groups get a bit less, and which as many a bit more.

With p pairs the p least salient groups have n - 1 bits, the p most salient n + 1, the others n. p is the number under
which the layer's output changes least, on the calibration inputs. The released code quantizes the matrix anew for every
sample and every p; here the three versions of a group are made once, and the output follows from p to p + 1 by the two
groups that change: the same sums, one product with the matrix for all p together.
Source: Huang et al. 2024, SliM-LLM, arXiv 2405.14917, section 3.2; Aaronhuang-778/SliM-LLM cfdf5ff.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.mixed_columns import fit_grid, fit_signs

# The released code's floor under probabilities.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Rounding:
    """How groups are rounded while widths are searched. around_zero: see `fit_signs`."""

    group_size: int
    scale_dtype: torch.dtype
    around_zero: bool

    def change(self, weight: Tensor, group: int, bits: int) -> Tensor:
        """What rounding column group `group` of `weight` [m, n] to `bits` bits adds to it: [m, k]."""
        values = weight[:, group * self.group_size : (group + 1) * self.group_size]
        if bits == 1:
            signs = fit_signs(values, self.scale_dtype, around_zero=self.around_zero)
            return signs.decode(signs.encode(values)) - values
        grid = fit_grid(values, bits, self.scale_dtype)
        return grid.decode(grid.encode(values)) - values


def group_salience(weight: Tensor, pivots: Tensor, group_size: int) -> Tensor:
    """Salience of each column group: [G], the sum of w^2 / U_jj^2 over its weights.

    weight: [m, n]. pivots: U_jj, [n]. The paper takes the mean, which ranks groups of one size alike.
    """
    columns = (weight / pivots).square_().sum(dim=0).split(group_size)
    return torch.stack([part.sum() for part in columns])


def ranking(salience: Tensor, *, last_keeps: bool = False) -> list[int]:
    """The groups from the least to the most salient; salience: [G].

    last_keeps: the last group stands in the middle, where no number of pairs reaches it. A narrower group that changed
    places with a full one would move the mean width of a matrix away from the width that most groups have.
    """
    order = torch.argsort(salience, stable=True).tolist()
    if last_keeps:
        order.remove(len(order) - 1)
        order.insert(len(order) // 2, len(order))
    return order


def candidates(groups: int) -> range:
    """The numbers of pairs that are searched: 1 to groups / 2 - 1; none for fewer than four groups."""
    return range(1, groups // 2)


def widths_of(order: Sequence[int], bits: int, pairs: int) -> list[int]:
    """The width of each group: `bits`, one less for the `pairs` first of `order` and one more for the `pairs` last."""
    widths = [bits] * len(order)
    for low, high in zip(order[:pairs], order[len(order) - pairs :], strict=True):
        widths[low], widths[high] = bits - 1, bits + 1
    return widths


def divergence_losses(
    weight: Tensor,
    inputs: Tensor,
    order: Sequence[int],
    bits: int,
    rounding: Rounding,
    *,
    bias: Tensor | None = None,
    faithful: bool = False,
) -> list[float]:
    """For each number of pairs the divergence of softmax(output) from that of the unquantized layer, a token.

    weight: [m, n], float32. inputs: [samples, tokens, n]. order: see `ranking`. bias: [m]. A softmax over the features
    of a layer is the paper's choice.
    faithful: KL(quantized || original) with probabilities held above 1e-6, the bias in the original's output alone, as
    the code has it; else the paper's KL(original || quantized), both with the bias.
    """
    shift = torch.zeros(weight.shape[0], device=weight.device) if bias is None else bias.float().to(weight.device)
    steps = _steps(weight, order, bits, rounding)
    base = weight + torch.cat([rounding.change(weight, g, bits) for g in range(len(order))], dim=1)
    totals = [0.0] * len(steps)
    for sample in inputs:
        x = sample.to(torch.float32)
        original = torch.log_softmax(x @ weight.T + shift, dim=1)
        if faithful:
            original.clamp_(min=torch.tensor(_SMALLEST).log().item())
        output = x @ base.T
        if not faithful:
            output += shift
        for index, (columns, change) in enumerate(steps):
            for part, delta in zip(columns, change, strict=True):
                output.addmm_(x[:, part], delta.T)
            totals[index] += float(_divergence(output, original, faithful))
    return [total / (inputs.shape[0] * inputs.shape[1]) for total in totals]


def squared_losses(weight: Tensor, hessian: Tensor, order: Sequence[int], bits: int, rounding: Rounding) -> list[float]:
    """For each number of pairs the squared change of the layer's output, tr(D H D^T); no inputs are needed.

    weight: [m, n], float32. hessian: [n, n]. order: see `ranking`.
    """
    change = torch.cat([rounding.change(weight, g, bits) for g in range(len(order))], dim=1)
    losses = []
    for columns, deltas in _steps(weight, order, bits, rounding):
        for part, delta in zip(columns, deltas, strict=True):
            change[:, part] += delta
        losses.append(float(((change @ hessian) * change).sum(dtype=torch.float64)))
    return losses


def _steps(
    weight: Tensor, order: Sequence[int], bits: int, rounding: Rounding
) -> list[tuple[tuple[slice, slice], tuple[Tensor, Tensor]]]:
    """From each number of pairs to the next: the columns of the two groups that change, and by how much."""
    size = rounding.group_size

    def step(group: int, to: int) -> tuple[slice, Tensor]:
        change = rounding.change(weight, group, to) - rounding.change(weight, group, bits)
        return slice(group * size, group * size + change.shape[1]), change

    steps = []
    for pairs in candidates(len(order)):
        low, high = step(order[pairs - 1], bits - 1), step(order[-pairs], bits + 1)
        steps.append(((low[0], high[0]), (low[1], high[1])))
    return steps


def _divergence(output: Tensor, original: Tensor, reversed_kl: bool) -> Tensor:
    """The sum over tokens; output: [tokens, m]. original: log-probabilities [tokens, m]."""
    if not reversed_kl:
        return torch.nn.functional.kl_div(torch.log_softmax(output, dim=1), original, reduction="sum", log_target=True)
    quantized = torch.softmax(output, dim=1).clamp_(min=_SMALLEST)
    return torch.nn.functional.kl_div(original, quantized, reduction="sum")


def fewest(losses: Sequence[float]) -> int:
    """The number of pairs with the smallest loss; the first of equal ones."""
    return 1 + min(range(len(losses)), key=losses.__getitem__)
