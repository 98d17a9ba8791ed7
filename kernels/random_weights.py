"""Random packed weights of every layout: for tests, and to measure speed and memory, which do not depend on values.

Codes, signs and marks are independent and uniform, as compression leaves them; constants are such that a product of
normal inputs is neither zero nor huge. The same seed gives the same weight on the same kind of device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layouts import (
    BinaryWeight,
    CodebookWeight,
    DenseWeight,
    PartialBinaryWeight,
    ResidualBinaryWeight,
    TrellisWeight,
    UniformWeight,
)
from kernels.layouts.trellis_tables import WIDTHS

Shape = tuple[int, int]
Device = torch.device | str


def random_dense(shape: Shape, seed: int, *, dtype: torch.dtype = torch.float16, device: Device = "cpu") -> DenseWeight:
    return DenseWeight(_normal(shape, _generator(seed, device), shape[1]).to(dtype))


def random_codebook(
    shape: Shape,
    seed: int,
    *,
    index_bits: int = 4,
    salient_bits: int = 4,
    salient: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
    device: Device = "cpu",
) -> CodebookWeight:
    """salient: share of the weights."""
    draw = _generator(seed, device)
    index = torch.randint(1, 1 << index_bits, shape, generator=draw, device=draw.device, dtype=torch.uint8)
    index[_chance(shape, salient, draw)] = 0
    count = int((index == 0).sum())
    levels = _positive(((1 << index_bits) - 1,), draw, shape[1]).sort().values
    codes = torch.randint(0, 1 << (salient_bits - 1), (count,), generator=draw, device=draw.device, dtype=torch.uint8)
    return CodebookWeight.pack(
        _chance(shape, 0.5, draw),
        index,
        levels.to(scale_dtype),
        index_bits=index_bits,
        salient_bits=salient_bits,
        salient_codes=codes if count else None,
        row_scales=(4 * _positive((shape[0],), draw, shape[1])).to(scale_dtype) if count else None,
    )


def random_uniform(
    shape: Shape,
    seed: int,
    *,
    bits: int | list[int] = 4,
    group_size: int = 128,
    symmetric: bool = False,
    permuted: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    device: Device = "cpu",
) -> UniformWeight:
    """bits: one width, or one a group. group_size: -1 for the whole row."""
    draw = _generator(seed, device)
    size = min(group_size, shape[1]) if group_size > 0 else shape[1]
    groups = -(-shape[1] // size)
    widths = torch.tensor([bits] * groups if isinstance(bits, int) else bits, device=device)
    of_column = widths[torch.arange(shape[1], device=device) // size]
    codes = torch.randint(0, 256, shape, generator=draw, device=draw.device, dtype=torch.int32) >> (8 - of_column)
    zeros = torch.randint(0, 256, (shape[0], groups), generator=draw, device=draw.device) >> (8 - widths)
    scales = _positive((shape[0], groups), draw, shape[1]) / (1 << int(widths.max()) - 1)
    return UniformWeight.pack(
        codes.to(torch.uint8),
        scales.to(scale_dtype),
        None if symmetric else zeros.to(torch.uint8),
        bits=bits,
        group_size=size,
        permutation=torch.randperm(shape[1], generator=draw, device=draw.device) if permuted else None,
    )


def random_binary(
    shape: Shape,
    seed: int,
    *,
    group_size: int = 128,
    means: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    device: Device = "cpu",
) -> BinaryWeight:
    draw = _generator(seed, device)
    size = min(group_size, shape[1]) if group_size > 0 else shape[1]
    constants = (shape[0], -(-shape[1] // size))
    return BinaryWeight.pack(
        _chance(shape, 0.5, draw),
        _positive(constants, draw, shape[1]).to(scale_dtype),
        (_normal(constants, draw, shape[1]) / 4).to(scale_dtype) if means else None,
        group_size=size,
    )


def random_partial_binary(
    shape: Shape,
    seed: int,
    *,
    group_size: int = 128,
    salient: float = 0.1,
    salient_bits: int = 8,
    scale_dtype: torch.dtype = torch.float16,
    device: Device = "cpu",
) -> PartialBinaryWeight:
    """salient: share of the weights."""
    draw = _generator(seed, device)
    size = min(group_size, shape[1]) if group_size > 0 else shape[1]
    constants = (shape[0], -(-shape[1] // size))
    return PartialBinaryWeight.pack(
        _chance(shape, salient, draw),
        _chance(shape, 0.5, draw),
        torch.randint(0, 1 << salient_bits, shape, generator=draw, device=draw.device, dtype=torch.uint8),
        means=(_normal(constants, draw, shape[1]) / 4).to(scale_dtype),
        scales=_positive(constants, draw, shape[1]).to(scale_dtype),
        salient_scales=(_positive((shape[0],), draw, shape[1]) / (1 << salient_bits - 2)).to(scale_dtype),
        salient_zeros=torch.randint(
            0, 1 << salient_bits, (shape[0],), generator=draw, device=draw.device, dtype=torch.uint8
        ),
        group_size=size,
        salient_bits=salient_bits,
    )


def random_residual_binary(
    shape: Shape,
    seed: int,
    *,
    block_size: int = 128,
    salient: float = 0.1,
    scale_dtype: torch.dtype = torch.float16,
    device: Device = "cpu",
) -> ResidualBinaryWeight:
    """salient: share of the columns."""
    draw = _generator(seed, device)
    size = min(block_size, shape[1])
    blocks = -(-shape[1] // size)
    return ResidualBinaryWeight.pack(
        _chance(shape, 0.5, draw),
        _chance(shape, 0.5, draw),
        _chance(shape, 0.3, draw),
        _chance((shape[1],), salient, draw),
        means=(_normal((shape[0], blocks, 3), draw, shape[1]) / 4).to(scale_dtype),
        scales=_positive((shape[0], blocks, 4), draw, shape[1]).to(scale_dtype),
        block_size=size,
    )


def random_trellis(
    shape: Shape,
    seed: int,
    *,
    classes: tuple[int, ...] = tuple(range(len(WIDTHS))),
    rotated: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    device: Device = "cpu",
) -> TrellisWeight:
    """classes: rate classes that columns are drawn from. shape: 16 rows or more."""
    draw = _generator(seed, device)
    rows, columns = shape
    chosen = torch.tensor(classes, device=device)[
        torch.randint(0, len(classes), (columns,), generator=draw, device=draw.device)
    ]
    # What a code holds beyond the bits of its weight is not packed.
    return TrellisWeight.pack(
        torch.randint(0, 128, shape, generator=draw, device=draw.device, dtype=torch.uint8),
        chosen,
        torch.randint(0, 64, (columns,), generator=draw, device=draw.device, dtype=torch.uint8),
        (_positive((rows,), draw, columns) * (1 - 2 * _chance((rows,), 0.5, draw).float())).to(scale_dtype),
        rotated=rotated,
    )


def _generator(seed: int, device: Device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _chance(shape: tuple[int, ...], share: float, draw: torch.Generator) -> Tensor:
    """True with probability `share`, to one part in 65536."""
    return torch.randint(0, 1 << 16, shape, generator=draw, device=draw.device, dtype=torch.int32) < share * (1 << 16)


def _normal(shape: tuple[int, ...], draw: torch.Generator, columns: int) -> Tensor:
    return torch.randn(shape, generator=draw, device=draw.device) / columns**0.5


def _positive(shape: tuple[int, ...], draw: torch.Generator, columns: int) -> Tensor:
    return _normal(shape, draw, columns).abs() + 0.1 / columns**0.5
