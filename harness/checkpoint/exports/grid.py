"""What all layers of a checkpoint must have in common for formats that describe a model by one grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import InputError
from kernels.layouts import PackedWeight, UniformWeight
from kernels.layouts.bitpack import pack_bits


@dataclass(frozen=True)
class Grid:
    """group_size: -1 for whole rows. reordered: columns of some layer are stored in another order (act-order)."""

    bits: int
    group_size: int
    symmetric: bool
    reordered: bool


def common_grid(weights: Mapping[str, PackedWeight]) -> Grid:
    """The grid of all `weights`. Raises InputError, naming the first layer that does not fit."""
    found: Grid | None = None
    for name, weight in weights.items():
        if not isinstance(weight, UniformWeight) or weight.bits is None:
            kind = weight.layout if not isinstance(weight, UniformWeight) else "uniform of several widths"
            raise InputError(f"layer {name} is stored as {kind}; this format holds uniform grids of one width")
        if weight.scales().dtype != torch.float16:
            dtype = str(weight.scales().dtype).removeprefix("torch.")
            raise InputError(f"layer {name} has scales in {dtype}; quantize with scale_dtype=float16 to export")
        whole = weight.group_size == weight.shape[1]
        grid = Grid(weight.bits, -1 if whole else weight.group_size, weight.symmetric, False)
        if found is not None and grid != found:
            raise InputError(f"layer {name} has {grid}, others {found}; this format holds one grid for all layers")
        found = grid
    if found is None:
        raise InputError("the checkpoint has no packed layers")
    reordered = any(
        weight.permutation() is not None for weight in weights.values() if isinstance(weight, UniformWeight)
    )
    return Grid(found.bits, found.group_size, found.symmetric, reordered)


def words(codes: Tensor, bits: int) -> Tensor:
    """Each row of `codes` [rows, columns] as a little-endian bit stream: int32 [rows, ceil(columns * bits / 32)]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 32))
    # 32 codes of any width end at a word: rows do not share words.
    stream = pack_bits(padded, bits).view(rows, -1).view(torch.int32)
    return stream[:, : -(-columns * bits // 32)].contiguous()
