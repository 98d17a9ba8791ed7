"""Codebook: a sign and an index into a few levels of the whole matrix, plus a sparse salient set. SAGE-PTQ.

    index[i, j] = k > 0:   w[i, j] = (-1)**sign * level[k - 1]
    index[i, j] = 0:       w[i, j] = (-1)**sign * row_scale[i] * (2c + 1) / 2**salient_bits   (a salient weight)

`c` is the salient weight's code of `salient_bits - 1` bits; codes are stored densely in row-major order of the salient
positions, so the index plane is the only record of where they are. Source: SAGE-PTQ, arXiv 2606.05429, section 3.2
and algorithm 2; the storage follows from the equations (the paper's headline leaves the index plane out).
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


class CodebookWeight(PackedWeight):
    """See the module. Build one with `CodebookWeight.pack`."""

    layout = "codebook"

    def __init__(
        self, shape: tuple[int, int], index_bits: int, salient_bits: int, salient: int, tensors: dict[str, Tensor]
    ) -> None:
        self.shape = shape
        self.index_bits = index_bits
        self.salient_bits = salient_bits
        self.salient = salient
        self._tensors = tensors

    @classmethod
    def pack(
        cls,
        negative: Tensor,
        index: Tensor,
        levels: Tensor,
        *,
        index_bits: int,
        salient_bits: int,
        salient_codes: Tensor | None = None,
        row_scales: Tensor | None = None,
    ) -> Self:
        """Pack what a method computed.

        negative: [m, n] bool, the sign. index: [m, n], 0 for salient and k for level k. levels: [N], N < 2**index_bits,
        magnitudes in a scale dtype. salient_codes: [salient weights], 0 .. 2**(salient_bits - 1) - 1, in row-major
        order. row_scales: [m], same dtype as levels. Both are None when no weight is salient.
        """
        salient = 0 if salient_codes is None else salient_codes.numel()
        tensors = {
            "signs": pack_bits(negative.to(torch.uint8), 1),
            "index": pack_bits(index, index_bits),
            "levels": levels.contiguous(),
        }
        if salient:
            if salient_codes is None or row_scales is None:
                raise InputError(f"{salient} salient weights need salient_codes and row_scales")
            if salient_bits > 1:
                tensors["salient_codes"] = pack_bits(salient_codes, salient_bits - 1)
            tensors["row_scales"] = row_scales.contiguous()
        metadata = {
            "shape": list(negative.shape),
            "index_bits": index_bits,
            "salient_bits": salient_bits,
            "salient": salient,
        }
        return cls.from_tensors(tensors, metadata)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {
            "signs": "sign",
            "index": "index",
            "levels": "codebook",
            "salient_codes": "code",
            "row_scales": "scale",
        }
        return roles[name]

    def metadata(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "index_bits": self.index_bits,
            "salient_bits": self.salient_bits,
            "salient": self.salient,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        count = shape[0] * shape[1]
        widths: dict[str, Any] = {key: metadata.get(key) for key in ("index_bits", "salient_bits", "salient")}
        index_bits, salient_bits, salient = widths.values()
        if not (
            all(type(value) is int for value in widths.values())
            and 1 <= index_bits <= 8
            and 1 <= salient_bits <= 8
            and 0 <= salient <= count
        ):
            raise InputError(f"{widths} of a codebook weight {list(shape)}; widths are 1 to 8, salient 0 to {count}")
        known = {"signs", "index", "levels"}
        check_tensor(tensors, "signs", (packed_size(count, 1),), (torch.uint8,))
        check_tensor(tensors, "index", (packed_size(count, index_bits),), (torch.uint8,))
        number = tensors["levels"].numel() if "levels" in tensors else 0
        if not 1 <= number < 1 << index_bits:
            raise InputError(f"{number} levels for an index of {index_bits} bits; 1 to {(1 << index_bits) - 1} fit")
        levels = check_tensor(tensors, "levels", (number,), tuple(SCALE_DTYPES.values()))
        if salient:
            known.add("row_scales")
            check_tensor(tensors, "row_scales", (shape[0],), (levels.dtype,))
            if salient_bits > 1:
                known.add("salient_codes")
                size = packed_size(salient, salient_bits - 1)
                check_tensor(tensors, "salient_codes", (size,), (torch.uint8,))
        check_no_extra(tensors, known)
        return cls(shape, index_bits, salient_bits, salient, {name: tensors[name] for name in sorted(known)})

    def negative(self) -> Tensor:
        """The sign plane [m, n], bool: True where the weight is negative."""
        return unpack_bits(self._tensors["signs"], 1, self.shape[0] * self.shape[1]).view(self.shape).bool()

    def index(self) -> Tensor:
        """The index plane [m, n], uint8: 0 marks a salient weight, k > 0 names level k - 1."""
        return unpack_bits(self._tensors["index"], self.index_bits, self.shape[0] * self.shape[1]).view(self.shape)

    def salient_magnitudes(self) -> Tensor:
        """|w| / row_scale of the salient weights [salient], float32, in row-major order."""
        codes = torch.zeros(self.salient, dtype=torch.uint8, device=self._tensors["levels"].device)
        if "salient_codes" in self._tensors:
            codes = unpack_bits(self._tensors["salient_codes"], self.salient_bits - 1, self.salient)
        return (2 * codes.float() + 1) / (1 << self.salient_bits)

    def check_content(self) -> None:
        self._check_index(self.index())

    def _check_index(self, index: Tensor) -> None:
        levels, salient = self._tensors["levels"].numel(), int((index == 0).sum())
        if int(index.max()) > levels:
            raise InputError(f"index plane names level {int(index.max())} of {levels}: the weight is damaged")
        if salient != self.salient:
            raise InputError(f"index plane marks {salient} salient weights, {self.salient} are stored")

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        index = self.index().long()
        levels = self._tensors["levels"].float()
        self._check_index(index)
        table = torch.cat([levels.new_zeros(1), levels])
        weight = table[index]
        salient = index == 0
        if self.salient:
            rows = salient.nonzero()[:, 0]
            weight[salient] = self.salient_magnitudes() * self._tensors["row_scales"].float()[rows]
        return torch.where(self.negative(), -weight, weight).to(dtype)
