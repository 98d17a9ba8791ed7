"""Mixed: a bit width for each column group, or for each column; one bit is a sign. SliM-LLM, MG-PTQ.

    width > 1:   w[i, j] = scale[i, q] * (code - zero[i, q])
    width = 1:   w[i, j] = mean[i, q] + scale[i, q] * (2 * code - 1)

A grid q belongs to the columns of one width inside one group of `group_size` columns; grids are numbered by group, then
by width. With a width for each group every group has one grid. Codes and zero points of each width form a dense bit
stream of that width, so one bit costs one bit; a width itself costs 3 bits, for a group or for a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kernels.errors import InputError
from kernels.layouts.base import SCALE_DTYPES, PackedWeight, Role, check_no_extra, check_shape, check_tensor
from kernels.layouts.bitpack import pack_bits, packed_size, unpack_bits

_TAG_BITS = 3


class MixedWeight(PackedWeight):
    """See the module. Build one with `MixedWeight.pack`."""

    layout = "mixed"

    def __init__(
        self, shape: tuple[int, int], group_size: int, per_column: bool, widths: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        self.shape = shape
        self.group_size = group_size
        self.per_column = per_column
        self._widths = widths
        self._tensors = tensors

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        means: Tensor,
        *,
        widths: Sequence[int],
        group_size: int,
    ) -> Self:
        """Pack codes that a method computed.

        codes: [m, n], integers 0 .. 2**width - 1. widths: 1 to 8, one for each column (n of them) or for each group
        (ceil(n / group_size)). scales, zeros, means: [m, Q], a column for each grid (see `column_grids`); scales and
        means in one scale dtype, zeros integers. A zero point is read where the width is above 1, a mean where it is 1.
        """
        rows, columns = codes.shape
        groups = -(-columns // group_size)
        if len(widths) not in (groups, columns):
            raise InputError(f"{len(widths)} widths for {columns} columns in {groups} groups of {group_size}")
        # A group of one column has a width of its own either way.
        per_column = len(widths) == columns and columns != groups
        tag = torch.tensor(list(widths), device=codes.device)
        of_column = tag if per_column else _spread(tag, group_size, columns)
        _, of_grid = column_grids(of_column, group_size)
        tensors = {"bits": pack_bits(tag - 1, _TAG_BITS), "scales": scales.contiguous()}
        for width in sorted(set(widths)):
            tensors[f"codes_b{width}"] = pack_bits(codes[:, of_column == width], width)
            if width > 1:
                tensors[f"zeros_b{width}"] = pack_bits(zeros[:, of_grid == width], width)
            else:
                tensors["means"] = means[:, of_grid == 1].contiguous()
        return cls.from_tensors(tensors, {"shape": [rows, columns], "group_size": group_size, "per_column": per_column})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {"codes": "code", "zeros": "zero", "scales": "scale", "means": "scale", "bits": "tag"}
        return roles[name.split("_b")[0]]

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "group_size": self.group_size, "per_column": self.per_column}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        group_size, per_column = metadata.get("group_size"), metadata.get("per_column")
        if type(group_size) is not int or not 1 <= group_size <= columns or type(per_column) is not bool:
            raise InputError(
                f"group_size={group_size!r}, per_column={per_column!r} of a mixed weight [{rows}, {columns}]"
            )
        count = columns if per_column else -(-columns // group_size)
        tag = check_tensor(tensors, "bits", (packed_size(count, _TAG_BITS),), (torch.uint8,))
        widths = unpack_bits(tag, _TAG_BITS, count).long() + 1
        of_column = widths if per_column else _spread(widths, group_size, columns)
        _, of_grid = column_grids(of_column, group_size)
        scales = check_tensor(tensors, "scales", (rows, of_grid.numel()), tuple(SCALE_DTYPES.values()))
        known = {"bits", "scales"}
        for width in sorted(set(widths.tolist())):
            size = packed_size(rows * int((of_column == width).sum()), width)
            known.add(f"codes_b{width}")
            check_tensor(tensors, f"codes_b{width}", (size,), (torch.uint8,))
            grids = int((of_grid == width).sum())
            if width > 1:
                known.add(f"zeros_b{width}")
                check_tensor(tensors, f"zeros_b{width}", (packed_size(rows * grids, width),), (torch.uint8,))
            else:
                known.add("means")
                check_tensor(tensors, "means", (rows, grids), (scales.dtype,))
        check_no_extra(tensors, known)
        return cls(shape, group_size, per_column, widths, {name: tensors[name] for name in sorted(known)})

    def column_widths(self) -> Tensor:
        """The width of each column: [n], int64."""
        return self._widths if self.per_column else _spread(self._widths, self.group_size, self.shape[1])

    def codes(self) -> Tensor:
        """The integer codes [m, n], uint8."""
        rows, columns = self.shape
        widths = self.column_widths()
        out = torch.empty(rows, columns, dtype=torch.uint8, device=widths.device)
        for width in sorted(set(widths.tolist())):
            inside = widths == width
            plane = unpack_bits(self._tensors[f"codes_b{width}"], width, rows * int(inside.sum()))
            out[:, inside] = plane.view(rows, -1)
        return out

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = self.shape[0]
        widths = self.column_widths()
        grid, of_grid = column_grids(widths, self.group_size)
        scales = self._tensors["scales"].float()
        # A sign is a code of 0 or 1 as well: offset - scale and offset + scale stand for the two.
        offset = torch.zeros_like(scales)
        for width in sorted(set(of_grid.tolist())):
            inside = of_grid == width
            if width > 1:
                zeros = unpack_bits(self._tensors[f"zeros_b{width}"], width, rows * int(inside.sum()))
                offset[:, inside] = zeros.view(rows, -1).float()
            else:
                offset[:, inside] = self._tensors["means"].float()
        codes, scale, offset = self.codes().float(), scales[:, grid], offset[:, grid]
        signs = torch.where(codes > 0, offset + scale, offset - scale)
        return torch.where(widths == 1, signs, (codes - offset) * scale).to(dtype)


def column_grids(widths: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """For columns of `widths` [n] (1 to 8): the grid that each belongs to [n], and the width of each grid [Q]."""
    group = torch.arange(widths.numel(), device=widths.device) // group_size
    keys, grid = torch.unique(group * 8 + widths - 1, return_inverse=True)
    return grid, keys % 8 + 1


def _spread(widths: Tensor, group_size: int, columns: int) -> Tensor:
    """The width of each column from that of each group."""
    return widths.repeat_interleave(group_size)[:columns]
