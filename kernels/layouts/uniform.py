"""Uniform: an n-bit grid per (row, column group). RTN, GPTQ, AWQ and every method that ends on such a grid.

    w[i, j] = scale[i, g] * (code[i, j] - zero[i, g]),   g = position of column j // group_size

Columns may be stored in another order (`permutation`, for act-order) and each column group may have its own bit
width (`group_bits`, for mixed precision). Codes and zero points of each width form one dense bit stream, so a 3-bit
code costs 3 bits and a 4-bit zero point 4 bits. A symmetric grid has its zero point at mid-range and stores none.
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


class UniformWeight(PackedWeight):
    """See the module. Build one with `UniformWeight.pack`."""

    layout = "uniform"

    def __init__(
        self, shape: tuple[int, int], bits: int | None, group_size: int, symmetric: bool, tensors: dict[str, Tensor]
    ) -> None:
        self.shape = shape
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self._tensors = tensors

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        bits: int | Sequence[int],
        group_size: int,
        permutation: Tensor | None = None,
    ) -> Self:
        """Pack codes that a method computed.

        codes: [m, n], integers 0 .. 2**bits - 1, columns in stored order. scales: [m, G], one of the scale dtypes, kept
        as it is. zeros: [m, G] integers on the same range, or None for a symmetric grid. bits: one width, or one for
        each of the G = ceil(n / group_size) groups (the last group may be narrower). group_size: columns a group.
        permutation: [n], the original column at each stored position.
        """
        rows, columns = codes.shape
        groups = -(-columns // group_size)
        widths = [bits] * groups if isinstance(bits, int) else [int(width) for width in bits]
        if len(widths) != groups:
            raise InputError(f"{len(widths)} group widths for {groups} groups of {group_size} in {columns} columns")
        tensors: dict[str, Tensor] = {}
        for width, group_ids, column_ids in _planes(widths, group_size, columns, codes.device):
            tensors[f"codes_b{width}"] = pack_bits(codes[:, column_ids], width)
            if zeros is not None:
                tensors[f"zeros_b{width}"] = pack_bits(zeros[:, group_ids], width)
        tensors["scales"] = scales.contiguous()
        if not isinstance(bits, int):
            tensors["group_bits"] = torch.tensor(widths, dtype=torch.uint8, device=codes.device)
        if permutation is not None:
            tensors["permutation"] = permutation.to(_permutation_dtype(columns))
        metadata = {
            "shape": [rows, columns],
            "bits": bits if isinstance(bits, int) else None,
            "group_size": group_size,
            "symmetric": zeros is None,
        }
        return cls.from_tensors(tensors, metadata)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {
            "codes": "code",
            "zeros": "zero",
            "scales": "scale",
            "group_bits": "tag",
            "permutation": "permutation",
        }
        return roles[name.split("_b")[0] if name.startswith(("codes_", "zeros_")) else name]

    def metadata(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        group_size, symmetric, bits = metadata.get("group_size"), metadata.get("symmetric"), metadata.get("bits")
        if type(group_size) is not int or not 1 <= group_size <= columns or type(symmetric) is not bool:
            raise InputError(
                f"group_size={group_size!r}, symmetric={symmetric!r} of a uniform weight [{rows}, {columns}]"
            )
        groups = -(-columns // group_size)
        known = {"scales"}
        # First, since it bounds the number of groups: a damaged shape must not make the lists below huge.
        check_tensor(tensors, "scales", (rows, groups), tuple(SCALE_DTYPES.values()))
        if bits is None:
            widths = check_tensor(tensors, "group_bits", (groups,), (torch.uint8,)).tolist()
            known.add("group_bits")
        else:
            widths = [bits] * groups
        if not all(type(width) is int and 1 <= width <= 8 for width in widths):
            raise InputError(f"bits={bits if bits is not None else widths!r} of a uniform weight; use 1 to 8")
        for width in sorted(set(widths)):
            of_width = [g for g in range(groups) if widths[g] == width]
            count = sum(min(group_size, columns - g * group_size) for g in of_width)
            sizes = {f"codes_b{width}": rows * count}
            if not symmetric:
                sizes[f"zeros_b{width}"] = rows * len(of_width)
            for name, count in sizes.items():
                check_tensor(tensors, name, (packed_size(count, width),), (torch.uint8,))
                known.add(name)
        if "permutation" in tensors:
            order = check_tensor(tensors, "permutation", (columns,), (_permutation_dtype(columns),))
            if not torch.equal(order.long().sort().values, torch.arange(columns, device=order.device)):
                raise InputError("permutation of a uniform weight does not hold each column exactly once")
            known.add("permutation")
        check_no_extra(tensors, known)
        return cls(shape, bits, group_size, symmetric, {name: tensors[name] for name in sorted(known)})

    def group_widths(self) -> list[int]:
        """Bit width of each column group, in stored order."""
        groups = self._tensors["scales"].shape[1]
        return [self.bits] * groups if self.bits is not None else self._tensors["group_bits"].tolist()

    def codes(self) -> Tensor:
        """The integer codes [m, n], uint8, in stored column order."""
        rows, columns = self.shape
        out = torch.empty(rows, columns, dtype=torch.uint8, device=self._tensors["scales"].device)
        for width, _, column_ids in _planes(self.group_widths(), self.group_size, columns, out.device):
            plane = unpack_bits(self._tensors[f"codes_b{width}"], width, rows * column_ids.numel())
            out[:, column_ids] = plane.view(rows, -1)
        return out

    def zeros(self) -> Tensor:
        """The zero points [m, G], uint8; mid-range for a symmetric grid."""
        rows, columns = self.shape
        widths = self.group_widths()
        out = torch.empty(rows, len(widths), dtype=torch.uint8, device=self._tensors["scales"].device)
        for width, group_ids, _ in _planes(widths, self.group_size, columns, out.device):
            if self.symmetric:
                out[:, group_ids] = 1 << (width - 1)
            else:
                plane = unpack_bits(self._tensors[f"zeros_b{width}"], width, rows * group_ids.numel())
                out[:, group_ids] = plane.view(rows, -1)
        return out

    def scales(self) -> Tensor:
        """The scales [m, G] in the dtype they are stored in."""
        return self._tensors["scales"]

    def permutation(self) -> Tensor | None:
        """[n], the original column at each stored position (int64), or None when columns keep their order."""
        order = self._tensors.get("permutation")
        return None if order is None else order.long()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        columns = self.shape[1]
        group = torch.arange(columns, device=self._tensors["scales"].device) // self.group_size
        steps = self.codes().float() - self.zeros().float()[:, group]
        weight = (steps * self.scales().float()[:, group]).to(dtype)
        order = self.permutation()
        if order is None:
            return weight
        restored = torch.empty_like(weight)
        restored[:, order] = weight
        return restored


def _planes(
    widths: Sequence[int], group_size: int, columns: int, device: torch.device
) -> list[tuple[int, Tensor, Tensor]]:
    """For each width in use: the width, the ids of its groups, the ids of their columns (both ascending, int64)."""
    per_group = torch.tensor(widths, device=device)
    per_column = per_group[torch.arange(columns, device=device) // group_size]
    return [
        (width, (per_group == width).nonzero().view(-1), (per_column == width).nonzero().view(-1))
        for width in sorted(set(widths))
    ]


def _permutation_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 1 << 15 else torch.int32
