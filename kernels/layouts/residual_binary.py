"""Residual binary: every weight a sign; salient columns a second, residual sign; the others one of two groups. BiLLM.

Columns are cut into blocks; each (row, block) has its own constants:

    column j not salient, group[i, j] = k:   w[i, j] = mean[k] + (-1)**sign * scale[k],          k = 0 (concentrated), 1
    column j salient:                        w[i, j] = mean[2] + (-1)**sign * scale[2] + (-1)**residual_sign * scale[3]

Stored: a sign per weight, a residual sign per weight of a salient column, a group bit per weight of the others, a bit
per column, and seven constants per (row, block). The released code has eight: each of its two residual steps on
salient weights has a mean, but both means are added to every salient weight of the row, so their sum is one constant;
decoding differs from the released sum by the rounding of one float32 addition. A block without salient columns (or with
nothing else) still owns seven. With a salient share r that is (1 + r) + (1 - r) + 7 * 16 / block_size + 1 / m bits per
weight with 16-bit constants.

Source: Huang et al. 2024, BiLLM, arXiv 2402.04291, section 3; Aaronhuang-778/BiLLM dc137eb. There sign(0) is 0: a
weight that equals its group's mean decodes to the mean. A stored sign is one bit, so here such a weight decodes to
mean + scale. It takes an exact float32 equality; where a group holds one value the scale is 0 and both agree.
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

MEANS, SCALES = 3, 4


class ResidualBinaryWeight(PackedWeight):
    """See the module. Build one with `ResidualBinaryWeight.pack`."""

    layout = "residual_binary"

    def __init__(self, shape: tuple[int, int], block_size: int, salient: int, tensors: dict[str, Tensor]) -> None:
        self.shape = shape
        self.block_size = block_size
        self.salient = salient
        self._tensors = tensors

    @classmethod
    def pack(
        cls,
        negative: Tensor,
        residual_negative: Tensor,
        sparse: Tensor,
        salient_columns: Tensor,
        *,
        means: Tensor,
        scales: Tensor,
        block_size: int,
    ) -> Self:
        """Pack what a method computed.

        negative: [m, n] bool, first signs. residual_negative: [m, n] bool, read in salient columns. sparse: [m, n]
        bool, True for group 1, read in the other columns. salient_columns: [n] bool. means: [m, B, 3] (concentrated,
        sparse, salient), scales: [m, B, 4] (concentrated, sparse, salient first, salient residual), both in one scale
        dtype, B = ceil(n / block_size).
        """
        salient = int(salient_columns.sum())
        tensors = {
            "signs": pack_bits(negative.to(torch.uint8), 1),
            "salient_columns": pack_bits(salient_columns.to(torch.uint8), 1),
            "means": means.contiguous(),
            "scales": scales.contiguous(),
        }
        if salient:
            tensors["residual_signs"] = pack_bits(residual_negative[:, salient_columns].to(torch.uint8), 1)
        if salient < negative.shape[1]:
            tensors["groups"] = pack_bits(sparse[:, ~salient_columns].to(torch.uint8), 1)
        metadata = {"shape": list(negative.shape), "block_size": block_size, "salient": salient}
        return cls.from_tensors(tensors, metadata)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {
            "signs": "sign",
            "residual_signs": "sign",
            "groups": "mask",
            "salient_columns": "mask",
            "means": "scale",
            "scales": "scale",
        }
        return roles[name]

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "block_size": self.block_size, "salient": self.salient}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        block_size, salient = metadata.get("block_size"), metadata.get("salient")
        if not (
            type(block_size) is int and type(salient) is int and 1 <= block_size <= columns and 0 <= salient <= columns
        ):
            raise InputError(
                f"block_size={block_size!r}, salient={salient!r} of a residual_binary weight {list(shape)}; "
                f"block_size is 1 to {columns}, salient 0 to {columns} columns"
            )
        blocks = -(-columns // block_size)
        known = {"signs", "salient_columns", "means", "scales"}
        check_tensor(tensors, "signs", (packed_size(rows * columns, 1),), (torch.uint8,))
        check_tensor(tensors, "salient_columns", (packed_size(columns, 1),), (torch.uint8,))
        scales = check_tensor(tensors, "scales", (rows, blocks, SCALES), tuple(SCALE_DTYPES.values()))
        check_tensor(tensors, "means", (rows, blocks, MEANS), (scales.dtype,))
        if salient:
            known.add("residual_signs")
            check_tensor(tensors, "residual_signs", (packed_size(rows * salient, 1),), (torch.uint8,))
        if salient < columns:
            known.add("groups")
            check_tensor(tensors, "groups", (packed_size(rows * (columns - salient), 1),), (torch.uint8,))
        check_no_extra(tensors, known)
        weight = cls(shape, block_size, salient, {name: tensors[name] for name in sorted(known)})
        marked = int(weight.salient_columns().sum())
        if marked != salient:
            raise InputError(
                f"salient_columns of a residual_binary weight marks {marked} columns, {salient} are stored"
            )
        return weight

    def salient_columns(self) -> Tensor:
        """[n], bool: True where a column is salient."""
        return unpack_bits(self._tensors["salient_columns"], 1, self.shape[1]).bool()

    def negative(self) -> Tensor:
        """First signs [m, n], bool."""
        return self._plane("signs", self.shape[1])

    def residual_negative(self) -> Tensor:
        """Residual signs [m, salient], bool, of the salient columns in ascending order."""
        return self._plane("residual_signs", self.salient)

    def sparse(self) -> Tensor:
        """Group bits [m, n - salient], bool, of the other columns in ascending order; True for the sparse group."""
        return self._plane("groups", self.shape[1] - self.salient)

    def means(self) -> Tensor:
        """[m, B, 3] in the dtype they are stored in."""
        return self._tensors["means"]

    def scales(self) -> Tensor:
        """[m, B, 4] in the dtype they are stored in."""
        return self._tensors["scales"]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        salient, negative = self.salient_columns(), self.negative()
        residual, sparse = torch.zeros_like(negative), torch.zeros_like(negative)
        residual[:, salient] = self.residual_negative()
        sparse[:, ~salient] = self.sparse()
        weight = torch.empty(self.shape, dtype=dtype, device=negative.device)
        for block, start in enumerate(range(0, self.shape[1], self.block_size)):
            part = slice(start, start + self.block_size)
            weight[:, part] = decode_block(
                negative[:, part],
                residual[:, part],
                sparse[:, part],
                salient[part],
                self.means()[:, block],
                self.scales()[:, block],
            )
        return weight

    def _plane(self, name: str, columns: int) -> Tensor:
        rows = self.shape[0]
        if columns == 0:
            return torch.zeros(rows, 0, dtype=torch.bool, device=self._tensors["signs"].device)
        return unpack_bits(self._tensors[name], 1, rows * columns).view(rows, columns).bool()


def decode_block(
    negative: Tensor, residual_negative: Tensor, sparse: Tensor, salient: Tensor, means: Tensor, scales: Tensor
) -> Tensor:
    """The float32 values [m, k] of one block from its planes [m, k], salient columns [k], means [m, 3], scales [m, 4].

    Methods use it too, so that error feedback sees exactly what will be decoded.
    """
    mean, scale = means.float(), scales.float()
    high, low = mean + scale[:, :MEANS], mean - scale[:, :MEANS]
    weight = torch.where(
        negative,
        torch.where(sparse, low[:, 1:2], low[:, 0:1]),
        torch.where(sparse, high[:, 1:2], high[:, 0:1]),
    )
    first = torch.where(negative[:, salient], low[:, 2:3], high[:, 2:3])
    residual = scale[:, 3:4].expand_as(first)
    weight[:, salient] = torch.where(residual_negative[:, salient], first - residual, first + residual)
    return weight
