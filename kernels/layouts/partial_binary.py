"""Partial binary: most weights are a sign, a few salient ones an n-bit code. PB-LLM.

    salient[i, j] = 0:   w[i, j] = mean[i, g] + (-1)**sign * scale[i, g],   g = j // group_size
    salient[i, j] = 1:   w[i, j] = salient_scale[i] * (code - salient_zero[i])

Signs exist for binarized weights alone and codes for salient weights alone, both as dense streams in row-major order of
their positions; the bitmap `mask` is the only record of which is which. With a salient share f and 8-bit codes that is
(1 - f) + 8 f + 1 + 32 / group_size + (16 + 8) / in_features bits per weight with 16-bit constants.
Source: Shang et al. 2023, PB-LLM, arXiv 2310.00034, section 3; the paper's count stops at codes and bitmap.
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


class PartialBinaryWeight(PackedWeight):
    """See the module. Build one with `PartialBinaryWeight.pack`."""

    layout = "partial_binary"

    def __init__(
        self, shape: tuple[int, int], group_size: int, salient_bits: int, salient: int, tensors: dict[str, Tensor]
    ) -> None:
        self.shape = shape
        self.group_size = group_size
        self.salient_bits = salient_bits
        self.salient = salient
        self._tensors = tensors

    @classmethod
    def pack(
        cls,
        mask: Tensor,
        negative: Tensor,
        codes: Tensor,
        *,
        means: Tensor,
        scales: Tensor,
        salient_scales: Tensor,
        salient_zeros: Tensor,
        group_size: int,
        salient_bits: int,
    ) -> Self:
        """Pack what a method computed.

        mask: [m, n] bool, True where a weight is salient. negative: [m, n] bool, read where it is not. codes: [m, n]
        integers 0 .. 2**salient_bits - 1, read where it is. means, scales: [m, G], G = ceil(n / group_size), of the
        binarized weights, in a scale dtype. salient_scales: [m], same dtype. salient_zeros: [m], integers like codes.
        The salient grid is stored only if a weight is salient.
        """
        mask = mask.contiguous()
        salient = int(mask.sum())
        tensors = {
            "mask": pack_bits(mask.to(torch.uint8), 1),
            "means": means.contiguous(),
            "scales": scales.contiguous(),
        }
        if salient < mask.numel():
            tensors["signs"] = pack_bits(torch.masked_select(negative.contiguous(), ~mask).to(torch.uint8), 1)
        if salient:
            tensors["salient_codes"] = pack_bits(torch.masked_select(codes.contiguous(), mask), salient_bits)
            tensors["salient_scales"] = salient_scales.contiguous()
            tensors["salient_zeros"] = pack_bits(salient_zeros, salient_bits)
        metadata = {
            "shape": list(mask.shape),
            "group_size": group_size,
            "salient_bits": salient_bits,
            "salient": salient,
        }
        return cls.from_tensors(tensors, metadata)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {
            "mask": "mask",
            "signs": "sign",
            "means": "scale",
            "scales": "scale",
            "salient_codes": "code",
            "salient_scales": "scale",
            "salient_zeros": "zero",
        }
        return roles[name]

    def metadata(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "group_size": self.group_size,
            "salient_bits": self.salient_bits,
            "salient": self.salient,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        count = rows * columns
        fields: dict[str, Any] = {key: metadata.get(key) for key in ("group_size", "salient_bits", "salient")}
        group_size, salient_bits, salient = fields.values()
        if not (
            all(type(value) is int for value in fields.values())
            and 1 <= group_size <= columns
            and 1 <= salient_bits <= 8
            and 0 <= salient <= count
        ):
            raise InputError(
                f"{fields} of a partial_binary weight {list(shape)}; "
                f"group_size is 1 to {columns}, salient_bits 1 to 8, salient 0 to {count}"
            )
        groups = -(-columns // group_size)
        known = {"mask", "means", "scales"}
        check_tensor(tensors, "mask", (packed_size(count, 1),), (torch.uint8,))
        scales = check_tensor(tensors, "scales", (rows, groups), tuple(SCALE_DTYPES.values()))
        check_tensor(tensors, "means", (rows, groups), (scales.dtype,))
        if salient < count:
            known.add("signs")
            check_tensor(tensors, "signs", (packed_size(count - salient, 1),), (torch.uint8,))
        if salient:
            known |= {"salient_codes", "salient_scales", "salient_zeros"}
            check_tensor(tensors, "salient_codes", (packed_size(salient, salient_bits),), (torch.uint8,))
            check_tensor(tensors, "salient_scales", (rows,), (scales.dtype,))
            check_tensor(tensors, "salient_zeros", (packed_size(rows, salient_bits),), (torch.uint8,))
        check_no_extra(tensors, known)
        weight = cls(shape, group_size, salient_bits, salient, {name: tensors[name] for name in sorted(known)})
        marked = int(weight.mask().sum())
        if marked != salient:
            raise InputError(f"mask of a partial_binary weight marks {marked} salient weights, {salient} are stored")
        return weight

    def mask(self) -> Tensor:
        """[m, n], bool: True where a weight is salient."""
        return unpack_bits(self._tensors["mask"], 1, self.shape[0] * self.shape[1]).view(self.shape).bool()

    def negative(self) -> Tensor:
        """Signs of the binarized weights [m * n - salient], bool, in row-major order of their positions."""
        if "signs" not in self._tensors:
            return torch.zeros(0, dtype=torch.bool, device=self._tensors["mask"].device)
        return unpack_bits(self._tensors["signs"], 1, self.shape[0] * self.shape[1] - self.salient).bool()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        tensors, mask = self._tensors, self.mask()
        negative = torch.zeros_like(mask)
        negative[~mask] = self.negative()
        mean, scale = tensors["means"].float(), tensors["scales"].float()
        group = torch.arange(self.shape[1], device=mask.device) // self.group_size
        weight = torch.where(negative, (mean - scale)[:, group], (mean + scale)[:, group])
        if self.salient:
            row = mask.nonzero()[:, 0]
            zeros = unpack_bits(tensors["salient_zeros"], self.salient_bits, self.shape[0]).float()
            codes = unpack_bits(tensors["salient_codes"], self.salient_bits, self.salient).float()
            weight[mask] = (codes - zeros[row]) * tensors["salient_scales"].float()[row]
        return weight.to(dtype)
