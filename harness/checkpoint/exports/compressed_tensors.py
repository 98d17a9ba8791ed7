"""The `pack-quantized` format of compressed-tensors, which vLLM and transformers read.

    weight_packed     [out, ceil(in * bits / 32)] int32   codes, a bit stream along each row
    weight_scale      [out, groups] float16
    weight_zero_point [ceil(out * bits / 32), groups] int32  a bit stream down each column; not for symmetric grids
    weight_shape      [2] int64

Codes mean code - 2**(bits - 1) there, and zero points alike: the stored bits are ours. Widths other than 4 and 8
need compressed-tensors 0.15 or later. Source: compressed-tensors 0.20.0, `compressors/pack_quantized`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.exports.grid import Grid, words
from kernels.errors import InputError
from kernels.layouts import PackedWeight, UniformWeight


def configuration(grid: Grid, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config`. ignore: linear layers that are not packed. Raises InputError for reordered columns."""
    if grid.reordered:
        raise InputError("columns stored in another order (act_order) have no place in pack-quantized; export to gptq")
    whole = grid.group_size == -1
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else grid.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }


def pack(weight: PackedWeight, name: str) -> dict[str, Tensor]:
    """The tensors of one layer. Raises InputError for groups that do not divide the row."""
    assert isinstance(weight, UniformWeight) and weight.bits is not None
    if weight.shape[1] % weight.group_size:
        raise InputError(f"layer {name}: groups of {weight.group_size} do not divide {weight.shape[1]} columns")
    tensors = {
        "weight_packed": words(weight.codes(), weight.bits),
        "weight_scale": weight.scales().contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = words(weight.zeros().T, weight.bits).T.contiguous()
    return tensors
