"""Microscaling: 4-, 6- and 8-bit floats, 32 with a power of two in common, for weights and activations. MicroMix.

    w[i, j] = 2**(exponent[i, k] - 127) * element[i, j],   k the block of 32 stored columns that holds column j

Stored columns are in the order of `permutation`, in three segments: FP4 (E2M1), then FP6 (E3M2), then FP8 (E4M3); a
segment's last block may be narrower. The layer's inputs are rounded in the same way, each column in the format of its
weights, so the segments and the order say all that is needed: `round_inputs`.
Source: OCP Microscaling Formats (MX) v1.0; the segments are MicroMix's, arXiv 2508.02343.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kernels.errors import InputError
from kernels.layouts.base import PackedWeight, Role, check_no_extra, check_shape, check_tensor
from kernels.layouts.bitpack import pack_bits, packed_size, unpack_bits

BLOCK = 32
_BIAS = 127


@dataclass(frozen=True)
class ElementFormat:
    """A small float without infinities: a sign, `exponent_bits`, `mantissa_bits`; `largest` is its largest value."""

    bits: int
    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest value: 2 for FP4, 4 for FP6, 8 for FP8."""
        return int(self.largest).bit_length() - 1

    def round(self, values: Tensor) -> Tensor:
        """`values` (float32) rounded to the nearest value of the format, half to even, saturating."""
        magnitude = values.abs()
        exponent = torch.frexp(magnitude).exponent - 1
        step = _power_of_two(exponent.clamp_(min=1 - self.bias) - self.mantissa_bits)
        return (torch.round(magnitude / step) * step).clamp_(max=self.largest).copysign(values)

    def encode(self, rounded: Tensor) -> Tensor:
        """Codes (int64) of values that the format holds: the sign above exponent and mantissa."""
        table = _magnitudes(self).to(rounded.device)
        return torch.searchsorted(table, rounded.abs()) + (rounded < 0).long() * (1 << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of `codes`."""
        table = _magnitudes(self).to(codes.device)
        magnitude = table[(codes.long() & ((1 << (self.bits - 1)) - 1)).clamp_(max=table.numel() - 1)]
        return torch.where((codes >> (self.bits - 1)) > 0, -magnitude, magnitude)


FP4 = ElementFormat(4, 2, 1, 6.0)
FP6 = ElementFormat(6, 3, 2, 28.0)
FP8 = ElementFormat(8, 4, 3, 448.0)
FORMATS = (FP4, FP6, FP8)


class MicroscalingWeight(PackedWeight):
    """See the module. Build one with `MicroscalingWeight.pack`."""

    layout = "microscaling"
    rounds_inputs = True

    def __init__(self, shape: tuple[int, int], segments: tuple[int, int, int], tensors: dict[str, Tensor]) -> None:
        self.shape = shape
        self.segments = segments
        self._tensors = tensors

    @classmethod
    def pack(cls, weight: Tensor, permutation: Tensor, segments: tuple[int, int, int]) -> Self:
        """Round `weight` [m, n], float32, and pack it.

        permutation: [n], the original column at each stored position. segments: columns in FP4, FP6 and FP8.
        """
        rows, columns = weight.shape
        tensors = {"permutation": permutation.to(_index_dtype(columns))}
        stored, exponents = weight[:, permutation.long()], []
        for kind, part in zip(FORMATS, stored.split(segments, dim=1), strict=True):
            if part.shape[1] == 0:
                continue
            exponent = shared_exponents(part, kind)
            elements = kind.round(part / _scales(exponent, part.shape[1]))
            tensors[f"codes_b{kind.bits}"] = pack_bits(kind.encode(elements), kind.bits)
            exponents.append(exponent)
        tensors["exponents"] = (torch.cat(exponents, dim=1) + _BIAS).to(torch.uint8)
        return cls.from_tensors(tensors, {"shape": [rows, columns], "segments": list(segments)})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def role(self, name: str) -> Role:
        if name == "permutation":
            return "permutation"
        return "scale" if name == "exponents" else "code"

    def metadata(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "segments": list(self.segments)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        shape = check_shape(metadata)
        rows, columns = shape
        segments = metadata.get("segments")
        well_formed = isinstance(segments, list | tuple) and len(segments) == len(FORMATS)
        if not well_formed or not all(type(s) is int and s >= 0 for s in segments) or sum(segments) != columns:  # type: ignore[arg-type, union-attr]
            raise InputError(f"segments={segments!r} of a microscaling weight [{rows}, {columns}]")
        assert segments is not None
        known = {"permutation", "exponents"}
        order = check_tensor(tensors, "permutation", (columns,), (_index_dtype(columns),))
        if not torch.equal(order.long().sort().values, torch.arange(columns, device=order.device)):
            raise InputError("permutation of a microscaling weight does not hold each column exactly once")
        for kind, width in zip(FORMATS, segments, strict=True):
            if width:
                known.add(f"codes_b{kind.bits}")
                size = packed_size(rows * width, kind.bits)
                check_tensor(tensors, f"codes_b{kind.bits}", (size,), (torch.uint8,))
        check_tensor(tensors, "exponents", (rows, sum(-(-width // BLOCK) for width in segments)), (torch.uint8,))
        check_no_extra(tensors, known)
        return cls(shape, tuple(segments), {name: tensors[name] for name in sorted(known)})

    def check_content(self) -> None:
        """The standard keeps the largest exponent and FP8's last code for NaN; no weight is one."""
        if int(self._tensors["exponents"].max()) > 2 * _BIAS:
            raise InputError(f"a microscaling weight has a block exponent of {2 * _BIAS + 1}, which means NaN")
        if self.segments[2] and bool(((self._tensors[f"codes_b{FP8.bits}"] & 127) == 127).any()):
            raise InputError("a microscaling weight has an FP8 code that means NaN")

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows, columns = self.shape
        order = self._tensors["permutation"].long()
        exponents = self._tensors["exponents"].int() - _BIAS
        parts, block = [], 0
        for kind, width in zip(FORMATS, self.segments, strict=True):
            if width == 0:
                continue
            codes = unpack_bits(self._tensors[f"codes_b{kind.bits}"], kind.bits, rows * width).view(rows, width)
            blocks = -(-width // BLOCK)
            parts.append(kind.decode(codes) * _scales(exponents[:, block : block + blocks], width))
            block += blocks
        weight = torch.empty(rows, columns, dtype=dtype, device=order.device)
        weight[:, order] = torch.cat(parts, dim=1).to(dtype)
        return weight

    def round_inputs(self, x: Tensor) -> Tensor:
        """Inputs [..., n] as the layer's multiplication sees them, in the dtype of `x` (which holds every value)."""
        order = self._tensors["permutation"].to(x.device).long()
        stored = x.float().reshape(-1, self.shape[1])[:, order]
        parts = [
            round_blocks(part, kind)
            for kind, part in zip(FORMATS, stored.split(self.segments, dim=1), strict=True)
            if part.shape[1]
        ]
        rounded = torch.empty_like(stored)
        rounded[:, order] = torch.cat(parts, dim=1)
        return rounded.view(x.shape).to(x.dtype)


def round_blocks(values: Tensor, kind: ElementFormat) -> Tensor:
    """`values` [m, k], float32, in blocks of 32 along the row, each with the scale of its largest element."""
    scales = _scales(shared_exponents(values, kind), values.shape[1])
    return kind.round(values / scales) * scales


def shared_exponents(values: Tensor, kind: ElementFormat) -> Tensor:
    """floor(log2 of the largest magnitude) - the format's largest exponent, a block of 32: [m, ceil(k / 32)], int32."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK))
    largest = padded.abs().view(values.shape[0], -1, BLOCK).amax(dim=2)
    exponent = torch.frexp(largest).exponent - 1 - kind.largest_exponent
    return torch.where(largest > 0, exponent, torch.zeros_like(exponent)).clamp_(min=-_BIAS + 1, max=_BIAS)


def _scales(exponents: Tensor, columns: int) -> Tensor:
    """The scale of each column [m, columns], float32, from the exponents of the blocks."""
    return _power_of_two(exponents).repeat_interleave(BLOCK, dim=1)[:, :columns]


def _power_of_two(exponents: Tensor) -> Tensor:
    """2**exponents, float32, to the last bit (exp2 does not promise that); exponents: -126 to 127."""
    return ((exponents.int() + 127) << 23).view(torch.float32)


@cache
def _magnitudes(kind: ElementFormat) -> Tensor:
    """All magnitudes of a format, ascending: the code without its sign is the position."""
    codes = torch.arange(1 << (kind.bits - 1))
    exponent, mantissa = codes >> kind.mantissa_bits, codes & ((1 << kind.mantissa_bits) - 1)
    lead = (exponent > 0).float()
    unit = _power_of_two(exponent.clamp(min=1) - kind.bias - kind.mantissa_bits)
    values = (lead * (1 << kind.mantissa_bits) + mantissa) * unit
    return values[values <= kind.largest]  # FP8's last code is NaN


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 1 << 15 else torch.int32
