"""PlaneMatrix: sign planes, for products that look up sums of four signed inputs at once (CPU).

    binary, partial_binary (one plane):   weight = mean[row, group] + sign * scale[row, group]
    residual_binary (two planes):         see `kernels.layouts.residual_binary`; plane 1 is the group bit, and the
    residual
                                          sign in the salient columns, which come first in each block

A group takes whole words of 32 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts import BinaryWeight, PackedWeight, PartialBinaryWeight
from kernels.layouts.residual_binary import ResidualBinaryWeight
from kernels.resident import planes
from kernels.resident.arrange import arrange_columns, or_none, row_constants, salient_first, take_columns
from kernels.resident.codes import SparsePart, full_signs, partial_binary_sparse, sparse_slab


@dataclass(frozen=True)
class PlaneMatrix:
    """words: as planes.pack makes them. group_words: words a group. constants: [row blocks, groups, c, rows], c = 2
    (mean, scale) or 7 (means of group 0, group 1, salient; scales of group 0, group 1, salient first, salient
    residual). order: int64 [padded columns], shape[1] for none, or None. salient: uint8 [groups], salient columns of
    each."""

    layout: str
    shape: tuple[int, int]
    words: Tensor
    group_words: int
    constants: Tensor
    order: Tensor | None
    salient: Tensor | None = None
    sparse: SparsePart | None = None

    @property
    def padded_columns(self) -> int:
        return int(self.words.shape[1]) * planes.WORD


def plane_matrix(weight: PackedWeight, rows: int) -> PlaneMatrix | None:
    """The resident form of a binary layout, or None for another one. rows: of a row block."""
    if isinstance(weight, BinaryWeight):
        means = weight.means()
        return _one_plane(weight, weight.negative(), weight.scales(), means, weight.group_size, rows, None)
    if isinstance(weight, PartialBinaryWeight):
        slab = sparse_slab(weight)
        if slab is None:
            return None
        tensors, sparse = weight.tensors(), partial_binary_sparse(weight, slab)
        negative = full_signs(weight)
        return _one_plane(weight, negative, tensors["scales"], tensors["means"], weight.group_size, rows, sparse)
    if isinstance(weight, ResidualBinaryWeight):
        return _two_planes(weight, rows)
    return None


def _one_plane(
    weight: PackedWeight,
    negative: Tensor,
    scales: Tensor,
    means: Tensor | None,
    group: int,
    rows: int,
    sparse: SparsePart | None,
) -> PlaneMatrix:
    columns = weight.shape[1]
    group = min(group, columns)
    words = -(-group // planes.WORD)
    every = torch.arange(columns, device=negative.device)
    order = arrange_columns(every, group, words * planes.WORD, planes.WORD, columns)
    constants = torch.stack([torch.zeros_like(scales) if means is None else means, scales], dim=2)
    return PlaneMatrix(
        weight.layout,
        weight.shape,
        planes.pack([take_columns(negative, order)], rows),
        words,
        row_constants(constants, rows),
        or_none(order, columns),
        sparse=sparse,
    )


def _two_planes(weight: ResidualBinaryWeight, rows: int) -> PlaneMatrix:
    columns = weight.shape[1]
    group = min(weight.block_size, columns)
    words = -(-group // planes.WORD)
    marked = weight.salient_columns()
    second = torch.zeros(weight.shape, dtype=torch.bool, device=marked.device)
    second[:, marked] = weight.residual_negative()
    second[:, ~marked] = weight.sparse()
    first, _, _ = salient_first(weight)
    order = arrange_columns(first, group, words * planes.WORD, planes.WORD, columns)
    block = torch.arange(columns, device=marked.device) // group
    return PlaneMatrix(
        weight.layout,
        weight.shape,
        planes.pack([take_columns(weight.negative(), order), take_columns(second, order)], rows),
        words,
        row_constants(torch.cat([weight.means(), weight.scales()], dim=2), rows),
        order,
        salient=torch.bincount(block, weights=marked.double()).to(torch.int32),
    )
