"""Linear layers of other projects that hold the codes and scales of a uniform weight of ours.

Each function gives the layer's product and the name of the kernel behind it. The packages are imported inside: they
are optional.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.checkpoint.exports.gptq import pack
from kernels.layouts import UniformWeight

Product = Callable[[Tensor], Tensor]


def gemlite_product(weight: UniformWeight, device: torch.device, dtype: torch.dtype) -> tuple[Product, str]:
    """GemLite's Triton kernels, packed by its own function."""
    from gemlite import DType, GemLiteLinearTriton

    rows, columns = weight.shape
    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]
    layer = GemLiteLinearTriton(
        weight.bits, group_size=weight.group_size, in_features=columns, out_features=rows, input_dtype=kind,
        output_dtype=kind,
    )  # fmt: skip
    codes, scales, zeros = (tensor.to(device) for tensor in (weight.codes(), weight.scales(), weight.zeros()))
    layer.pack(codes, scales.to(dtype), zeros.to(dtype), None)
    return layer, type(layer).__name__


def gptqmodel_product(weight: UniformWeight, device: torch.device, dtype: torch.dtype) -> tuple[Product, str]:
    """The kernel that GPTQModel chooses by itself here, with the tensors of our GPTQ export, as a checkpoint is loaded.

    They are exact; its own packing would find the codes again from rounded weights.
    """
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.importer import select_quant_linear

    rows, columns = weight.shape
    grid = {"bits": weight.bits, "group_size": weight.group_size, "sym": weight.symmetric, "desc_act": False}
    chosen = select_quant_linear(**grid, device=device.type, format=FORMAT.GPTQ_V2, pack_dtype=torch.int32, dtype=dtype)
    layer = chosen(
        **grid, in_features=columns, out_features=rows, bias=False, pack_dtype=torch.int32, register_buffers=True,
        format=FORMAT.GPTQ_V2, dtype=dtype,
    )  # fmt: skip
    tensors = pack(weight, "weight", v2=True)
    tensors["scales"] = tensors["scales"].to(dtype)
    layer.load_state_dict(tensors)
    layer = layer.to(device).eval()
    layer.post_init()
    return layer, chosen.__name__
