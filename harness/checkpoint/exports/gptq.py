"""The GPTQ checkpoint format, as AutoGPTQ and GPTQModel read it.

    qweight [in * bits / 32, out] int32     codes, a bit stream down each column
    qzeros  [groups, out * bits / 32] int32  zero points, a bit stream along each row; version 1 stores them minus one
    scales  [groups, out] float16
    g_idx   [in] int32                       the group of each column of the weight
    w[o, i] = scales[g, o] * (code[o, i] - zero[g, o]),  g = g_idx[i]

Source: AutoGPTQ 0.7.1, `nn_modules/qlinear/*`, and GPTQModel's conversion between versions 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.exports.grid import Grid, words
from kernels.errors import InputError
from kernels.layouts import PackedWeight, UniformWeight

_BITS = (2, 3, 4, 8)


def configuration(grid: Grid, format: str, version: str) -> dict[str, Any]:
    """The `quantization_config`. Raises InputError for a width that the format does not have."""
    if grid.bits not in _BITS:
        raise InputError(f"bits={grid.bits} cannot be stored in the GPTQ format; it has {', '.join(map(str, _BITS))}")
    return {
        "quant_method": "gptq",
        "checkpoint_format": format,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": grid.reordered,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"sagebench:{version}"]},
    }


def pack(weight: PackedWeight, name: str, *, v2: bool) -> dict[str, Tensor]:
    """The four tensors of one layer. Raises InputError for a shape or a zero point that the format does not have."""
    assert isinstance(weight, UniformWeight) and weight.bits is not None
    rows, columns = weight.shape
    if rows % 32 or columns % 32:
        raise InputError(f"layer {name} is {rows} x {columns}; the GPTQ format needs multiples of 32")
    zeros = weight.zeros().int()
    if not v2:
        if int(zeros.min()) == 0:
            # Readers add the one to packed words: a zero point of 0 would carry into its neighbour.
            raise InputError(f"layer {name} has a zero point of 0, which GPTQ version 1 cannot store; use gptq_v2")
        zeros = zeros - 1
    codes, group = weight.codes(), torch.arange(columns) // weight.group_size
    order = weight.permutation()
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
        group = torch.empty_like(group).index_copy_(0, order, group)
    return {
        "qweight": words(codes, weight.bits).T.contiguous(),
        "qzeros": words(zeros.T, weight.bits),
        "scales": weight.scales().T.contiguous(),
        "g_idx": group.int(),
    }
