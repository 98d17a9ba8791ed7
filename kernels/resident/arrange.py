"""Where columns and per-row constants go in a resident form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layouts.residual_binary import ResidualBinaryWeight


def arrange_columns(columns: Tensor, group: int, padded_group: int, multiple: int, nothing: int) -> Tensor:
    """Each group of `group` columns (the last may be narrower) padded to `padded_group`, all of it to `multiple`.

    columns: [n] int64. Returns int64 [padded], with `nothing` where there is no column.
    """
    groups = -(-columns.numel() // group)
    grouped = F.pad(columns, (0, groups * group - columns.numel()), value=nothing).view(groups, group)
    flat = F.pad(grouped, (0, padded_group - group), value=nothing).view(-1)
    return F.pad(flat, (0, -flat.numel() % multiple), value=nothing)


def take_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """The columns `order` of [m, n]; n names a column of zeros."""
    return F.pad(matrix, (0, 1))[:, order]


def or_none(order: Tensor, columns: int) -> Tensor | None:
    """None if `order` is the columns as they are, with padding at the end alone."""
    plain = torch.arange(order.numel(), device=order.device).clamp(max=columns)
    return None if torch.equal(order, plain) else order


def row_constants(values: Tensor, rows: int, groups: int | None = None) -> Tensor:
    """[m, G] or [m, G, c]: contiguous [row blocks, G, rows] or [row blocks, G, c, rows]. float16 stays, others become
    float32, which holds them exactly. groups: G with groups of padding, which get zeros."""
    kept = values if values.dtype in (torch.float16, torch.int8) else values.float()
    if groups is not None and groups > kept.shape[1]:
        kept = torch.cat([kept, kept.new_zeros(kept.shape[0], groups - kept.shape[1], *kept.shape[2:])], dim=1)
    flat = kept.reshape(kept.shape[0], -1)
    blocks = F.pad(flat, (0, 0, 0, -flat.shape[0] % rows)).view(-1, rows, flat.shape[1]).transpose(1, 2)
    return blocks.reshape(blocks.shape[0], *kept.shape[1:], rows).contiguous()


def salient_first(weight: ResidualBinaryWeight) -> tuple[Tensor, Tensor, int]:
    """Columns of a residual binary weight with each block's salient ones first.

    Returns order [n] int64, salient [n] bool in that order, and the most salient columns of any block.
    """
    salient = weight.salient_columns()
    columns = torch.arange(salient.numel(), device=salient.device)
    block = columns // weight.block_size
    order = torch.argsort(block * 2 + (~salient).long(), stable=True)
    most = int(torch.bincount(block, weights=salient.double()).max())
    return order, salient[order], most
