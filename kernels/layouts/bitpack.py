"""Dense packing of small unsigned integers: widths 1 to 8, any count, no padding between codes.

The stream is little-endian in bits: code `i` of width `w` occupies bits `i*w .. i*w + w - 1`, and bit `b` of the
stream is bit `b % 8` of byte `b // 8`. Eight codes of width `w` fill exactly `w` bytes, so both directions work
on groups of eight at once: one 64-bit word a group, no loop over codes. The stream ends at the last byte that
holds a code; at most 7 bits of a stream are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import InputError

# Groups of eight codes handled at once: bounds the temporary 64-bit words to 64 MiB whatever the size of a matrix.
_CHUNK_GROUPS = 1 << 23


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits occupy."""
    return (count * width + 7) // 8


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Pack `codes` (any shape, any integer dtype, values 0 .. 2**width - 1) into a uint8 stream.

    Returns a one-dimensional uint8 tensor of `packed_size(codes.numel(), width)` bytes, in row-major order of `codes`.
    Raises InputError if the width is not 1 .. 8 or a code does not fit in it.
    """
    _check_width(width)
    flat = codes.reshape(-1)
    if flat.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=codes.device)
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= 1 << width:
        raise InputError(f"codes lie in {low}..{high}; width {width} holds 0..{(1 << width) - 1}")
    if width == 8:
        return flat.to(torch.uint8, copy=True)
    groups = (flat.numel() + 7) // 8
    stream = torch.empty(groups, width, dtype=torch.uint8, device=codes.device)
    for start in range(0, groups, _CHUNK_GROUPS):
        part = flat[start * 8 : (start + _CHUNK_GROUPS) * 8].to(torch.int64)
        part = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(-1, 8)
        word = part[:, 0].clone()
        for i in range(1, 8):
            word |= part[:, i] << (i * width)
        for byte in range(width):
            stream[start : start + part.shape[0], byte] = ((word >> (8 * byte)) & 0xFF).to(torch.uint8)
    return stream.view(-1)[: packed_size(flat.numel(), width)].clone()


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes of a stream made by `pack_bits`: a one-dimensional uint8 tensor.

    Raises InputError if the stream is not exactly as long as `count` codes of `width` bits need.
    """
    _check_width(width)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_size(count, width):
        raise InputError(
            f"a stream of {count} codes of {width} bits is uint8 [{packed_size(count, width)}]; "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    if width == 8:
        return packed.clone()
    groups = (count + 7) // 8
    codes = torch.empty(groups, 8, dtype=torch.uint8, device=packed.device)
    for start in range(0, groups, _CHUNK_GROUPS):
        part = packed[start * width : (start + _CHUNK_GROUPS) * width].to(torch.int64)
        part = torch.nn.functional.pad(part, (0, -part.numel() % width)).view(-1, width)
        word = part[:, 0].clone()
        for byte in range(1, width):
            word |= part[:, byte] << (8 * byte)
        for i in range(8):
            codes[start : start + part.shape[0], i] = ((word >> (i * width)) & ((1 << width) - 1)).to(torch.uint8)
    return codes.view(-1)[:count]


def _check_width(width: int) -> None:
    if not 1 <= width <= 8:
        raise InputError(f"width={width} bits cannot be packed; use 1 to 8")
