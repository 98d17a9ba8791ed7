"""Channel codebook: each column has its own codebook of 2**width levels, and a few weights stay as they are. CMPQ.

    w[i, j] = level[j, code[i, j]], except at outliers, whose values are stored

Codes of each width form a dense bit stream of that width; outliers have a code too (of no meaning), so that a column's
codes have no gaps. Outliers are a sparse matrix by rows (CSR): values, column numbers, and where each row begins.
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

_TAG_BITS = 3
_ROLES: dict[str, Role] = {
    "bits": "tag",
    "levels": "codebook",
    "outliers": "outlier",
    "outlier_columns": "index",
    "outlier_rows": "index",
}


class ChannelCodebookWeight(PackedWeight):
    """See the module. Build one with `ChannelCodebookWeight.pack`."""

    layout = "channel_codebook"

    def __init__(self, shape: tuple[int, int], outliers: int, widths: Tensor, tensors: dict[str, Tensor]) -> None:
        self.shape = shape
        self.outliers = outliers
        self._widths = widths
        self._tensors = tensors

    @classmethod
    def pack(
        cls, codes: Tensor, levels: Tensor, *, widths: Tensor, outliers: Tensor | None = None, weight: Tensor
    ) -> Self:
        """Pack what a method computed.

        codes: [m, n], integers 0 .. 2**width - 1. widths: [n], integers 1 to 8. levels: [sum of 2**width], the
        codebooks of all columns one after the other, in a scale dtype. outliers: [m, n] bool, the weights that are kept
        as in `weight` [m, n], in the dtype of `levels`; None for no outliers.
        """
        rows, columns = codes.shape
        tensors = {"bits": pack_bits(widths - 1, _TAG_BITS), "levels": levels.contiguous()}
        for width in sorted(set(widths.tolist())):
            tensors[f"codes_b{width}"] = pack_bits(codes[:, widths == width], width)
        count = 0 if outliers is None else int(outliers.sum())
        if outliers is not None and count:
            tensors["outliers"] = weight[outliers].to(levels.dtype)
            tensors["outlier_columns"] = outliers.nonzero()[:, 1].to(_index_dtype(columns))
            starts = torch.cat([outliers.new_zeros(1, dtype=torch.int64), outliers.sum(dim=1).cumsum(dim=0)])
            tensors["outlier_rows"] = starts.to(torch.int32)
        return cls.from_tensors(tensors, {"shape": [rows, columns], "outliers": count})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        return "code" if name.startswith("codes_b") else _ROLES[name]

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "outliers": self.outliers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        outliers = metadata.get("outliers")
        if type(outliers) is not int or not 0 <= outliers <= rows * columns:
            raise InputError(f"outliers={outliers!r} of a channel_codebook weight [{rows}, {columns}]")
        tag = check_tensor(tensors, "bits", (packed_size(columns, _TAG_BITS),), (torch.uint8,))
        widths = unpack_bits(tag, _TAG_BITS, columns).long() + 1
        known = {"bits", "levels"}
        levels = check_tensor(tensors, "levels", (int((1 << widths).sum()),), tuple(SCALE_DTYPES.values()))
        for width in sorted(set(widths.tolist())):
            known.add(f"codes_b{width}")
            size = packed_size(rows * int((widths == width).sum()), width)
            check_tensor(tensors, f"codes_b{width}", (size,), (torch.uint8,))
        if outliers:
            known |= {"outliers", "outlier_columns", "outlier_rows"}
            check_tensor(tensors, "outliers", (outliers,), (levels.dtype,))
            at = check_tensor(tensors, "outlier_columns", (outliers,), (_index_dtype(columns),))
            starts = check_tensor(tensors, "outlier_rows", (rows + 1,), (torch.int32,))
            ordered = starts[0] == 0 and starts[-1] == outliers and bool((starts[1:] >= starts[:-1]).all())
            if not ordered or int(at.min()) < 0 or int(at.max()) >= columns:
                raise InputError(f"outliers of a channel_codebook weight {list(shape)} lie outside it")
        check_no_extra(tensors, known)
        return cls(shape, outliers, widths, {name: tensors[name] for name in sorted(known)})

    def column_widths(self) -> Tensor:
        """The width of each column: [n], int64."""
        return self._widths

    def outlier_positions(self) -> tuple[Tensor, Tensor]:
        """Rows and columns [outliers], int64, of the stored outliers, in row-major order."""
        if not self.outliers:
            none = torch.zeros(0, dtype=torch.int64, device=self._widths.device)
            return none, none
        starts = self._tensors["outlier_rows"].long()
        rows = torch.arange(self.shape[0], device=starts.device).repeat_interleave(starts.diff())
        return rows, self._tensors["outlier_columns"].long()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows, columns = self.shape
        levels, widths = self._tensors["levels"].float(), self._widths
        sizes = 1 << widths
        first = sizes.cumsum(dim=0) - sizes
        weight = torch.empty(rows, columns, dtype=torch.float32, device=widths.device)
        for width in sorted(set(widths.tolist())):
            inside = widths == width
            codes = unpack_bits(self._tensors[f"codes_b{width}"], width, rows * int(inside.sum())).view(rows, -1)
            weight[:, inside] = levels[first[inside] + codes.long()]
        if self.outliers:
            weight[self.outlier_positions()] = self._tensors["outliers"].float()
        return weight.to(dtype)


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 1 << 15 else torch.int32
