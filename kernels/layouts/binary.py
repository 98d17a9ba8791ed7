"""Binary: one sign per weight, and a magnitude (and perhaps a mean) per (row, column group).

    w[i, j] = mean[i, g] + (-1)**sign[i, j] * scale[i, g],   g = j // group_size

Without means the grid is symmetric about zero and no mean is stored. Source: Rastegari et al. 2016, XNOR-Net,
arXiv 1603.05279, section 3.1 (the scale that minimises the squared error is the mean magnitude).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kernels.errors import InputError
from kernels.layouts.base import SCALE_DTYPES, PackedWeight, Role, check_no_extra, check_shape, check_tensor
from kernels.layouts.bitpack import pack_bits, packed_size, unpack_bits


class BinaryWeight(PackedWeight):
    """See the module. Build one with `BinaryWeight.pack`."""

    layout = "binary"

    def __init__(self, shape: tuple[int, int], group_size: int, tensors: dict[str, Tensor]) -> None:
        self.shape = shape
        self.group_size = group_size
        self._tensors = tensors

    @classmethod
    def pack(cls, negative: Tensor, scales: Tensor, means: Tensor | None, *, group_size: int) -> Self:
        """Pack what a method computed.

        negative: [m, n] bool, the sign. scales: [m, G], G = ceil(n / group_size), one of the scale dtypes. means: like
        scales, or None when no mean was removed. group_size: columns a group (the last group may be narrower).
        """
        tensors = {"signs": pack_bits(negative.to(torch.uint8), 1), "scales": scales.contiguous()}
        if means is not None:
            tensors["means"] = means.contiguous()
        return cls.from_tensors(tensors, {"shape": list(negative.shape), "group_size": group_size})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {"signs": "sign", "scales": "scale", "means": "scale"}
        return roles[name]

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "group_size": self.group_size}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        group_size = metadata.get("group_size")
        if type(group_size) is not int or not 1 <= group_size <= columns:
            raise InputError(f"group_size={group_size!r} of a binary weight {list(shape)}; use 1 to {columns}")
        groups = -(-columns // group_size)
        known = {"signs", "scales"}
        check_tensor(tensors, "signs", (packed_size(rows * columns, 1),), (torch.uint8,))
        scales = check_tensor(tensors, "scales", (rows, groups), tuple(SCALE_DTYPES.values()))
        if "means" in tensors:
            known.add("means")
            check_tensor(tensors, "means", (rows, groups), (scales.dtype,))
        check_no_extra(tensors, known)
        return cls(shape, group_size, {name: tensors[name] for name in sorted(known)})

    def negative(self) -> Tensor:
        """The sign plane [m, n], bool: True where the scale is subtracted."""
        return unpack_bits(self._tensors["signs"], 1, self.shape[0] * self.shape[1]).view(self.shape).bool()

    def scales(self) -> Tensor:
        """The scales [m, G] in the dtype they are stored in."""
        return self._tensors["scales"]

    def means(self) -> Tensor | None:
        """The means [m, G] in the dtype they are stored in, or None."""
        return self._tensors.get("means")

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scales, means = self.scales().float(), self.means()
        mean = torch.zeros_like(scales) if means is None else means.float()
        group = torch.arange(self.shape[1], device=scales.device) // self.group_size
        return torch.where(self.negative(), (mean - scales)[:, group], (mean + scales)[:, group]).to(dtype)
