"""Uniform grids: fit a scale and a zero point to a range of weights, round to the grid, read it back.

Source: GPTQ's released quantizer (IST-DASLab/gptq 2d65066): the range always contains zero, the zero point is an
integer code, rounding is half to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import InputError
from methods.rounding import store_scale

# The tile width of the kernels: a group that is a multiple of it may leave a narrower last group.
_TILE = 32


@dataclass(frozen=True)
class Grid:
    """A grid per row: value = scale * (code - zero). scale: [m, 1], as stored. zero: [m, 1], float32, integral."""

    scale: Tensor
    zero: Tensor
    bits: int

    def encode(self, values: Tensor) -> Tensor:
        """Codes [m, k] of `values` [m, k], as float32 integers in 0 .. 2**bits - 1."""
        return (torch.round(values / self.scale.float()) + self.zero).clamp_(0, (1 << self.bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes`, float32."""
        return (codes - self.zero) * self.scale.float()


def fit_range(
    weight: Tensor, bits: int, *, symmetric: bool, scale_dtype: torch.dtype, include_zero: bool = True
) -> Grid:
    """The grid that spans the range of each row of `weight` [m, k]; an all-zero row spans -1 .. 1.

    Asymmetric: scale = (max - min) / (2**bits - 1), zero = round(-min / scale). Symmetric: the range is widened to
    -max|w| .. max|w| and the zero point is 2**(bits - 1). The scale is rounded to `scale_dtype` before it is used.
    include_zero: the range is widened to contain zero (GPTQ); without, AWQ's rule: it is not, and the zero point is
    clamped, which differs only for a row of one sign.
    """
    low = weight.amin(dim=1, keepdim=True)
    high = weight.amax(dim=1, keepdim=True)
    if include_zero or symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low = torch.where(empty, -torch.ones_like(low), low)
    high = torch.where(empty, torch.ones_like(high), high)
    top = (1 << bits) - 1
    scale = store_scale((high - low).clamp(min=0 if include_zero else 1e-5) / top, scale_dtype)
    zero = torch.full_like(low, 1 << (bits - 1)) if symmetric else torch.round(-low / scale.float()).clamp_(0, top)
    return Grid(scale, zero, bits)


@dataclass(frozen=True)
class GroupedCodes:
    """A matrix on group-wise grids. codes: [m, n], scales: [m, G] as stored, zeros: [m, G]; codes and zeros float32."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    def decode(self) -> Tensor:
        """The values [m, n], float32."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        return (self.codes - self.zeros[:, group]) * self.scales.float()[:, group]


def round_to_groups(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    include_zero: bool = True,
) -> GroupedCodes:
    """Round `weight` [m, n] to the grid of each group of `group_size` columns; the last group may be narrower.

    All full groups are fitted at once. include_zero: see `fit_range`.
    """
    rows, columns = weight.shape
    full = columns // group_size * group_size
    parts = [weight[:, :full].reshape(-1, group_size)] if full else []
    if full < columns:
        parts.append(weight[:, full:])
    codes, scales, zeros = [], [], []
    for part in parts:
        grid = fit_range(part, bits, symmetric=symmetric, scale_dtype=scale_dtype, include_zero=include_zero)
        codes.append(grid.encode(part).view(rows, -1))
        scales.append(grid.scale.view(rows, -1))
        zeros.append(grid.zero.view(rows, -1))
    return GroupedCodes(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), group_size)


def resolve_group_size(group_size: int, in_features: int) -> int:
    """Columns a group: `group_size`, or the whole row for -1. Raises InputError for a size that does not fit.

    A size fits if it divides in_features, or if it is a multiple of 32 below it; the last group is then narrower
    (576 columns in groups of 128 are 4.5 groups, as in the released codes).
    """
    if group_size == -1:
        return in_features
    if 0 < group_size <= in_features and (in_features % group_size == 0 or group_size % _TILE == 0):
        return group_size
    raise InputError(
        f"group_size={group_size} does not fit in_features={in_features}; use -1 (whole row), "
        f"a divisor such as {_listed(_divisors(in_features))}, or a multiple of {_TILE} up to {in_features}"
    )


def _divisors(number: int) -> list[int]:
    divisors = [size for size in range(16, number) if number % size == 0]
    return divisors[:6] or [number]


def _listed(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
