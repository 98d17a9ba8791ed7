"""The ledger: where every stored byte goes.

`nominal` is what the method's paper counts. `payload` is every packed tensor of the quantized layers. `other` is the
rest of the model (embeddings, head, norms, biases) in 16 bits, tied weights once. No other place in the project adds up
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from harness.models.blocks import model_linears
from harness.quantize import QuantizedModel
from kernels.layouts import PackedWeight

_BYTES_16_BIT = 2


def build_ledger(model: nn.Module, quantized: QuantizedModel, file_bytes: int | None) -> dict[str, Any]:
    """The ledger of a quantized model, for its record.

    file_bytes: size of the packed file on disk, None if it was not written (then the payload stands for it). Bits are
    per weight of the quantized layers; `artifact_bits` alone is per parameter of the whole model.
    """
    packed = quantized.packed
    weights = count_weights(packed)
    payload = sum(weight.nbytes() for weight in packed.values())
    other_parts = other_bytes(model)
    other = sum(other_parts.values())
    stored = payload if file_bytes is None else file_bytes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = [layer.shape[0] * layer.shape[1] / weights for layer in quantized.layers]
    return {
        "weights": weights,
        "nominal_weight_bits": sum(
            s * layer.nominal_weight_bits for s, layer in zip(share, quantized.layers, strict=True)
        ),
        "nominal_scale_bits": sum(
            s * layer.nominal_scale_bits for s, layer in zip(share, quantized.layers, strict=True)
        ),
        "payload_bytes": payload,
        "payload_bits": 8 * payload / weights,
        "bytes_by_role": bytes_by_role(packed),
        "other_bytes": other,
        "other_bytes_by_part": other_parts,
        "total_bytes": payload + other,
        "packed_file_bytes": file_bytes,
        "artifact_bytes": stored + other,
        "artifact_bits": 8 * (stored + other) / parameters,
        "artifact_bits_without_embeddings": 8 * stored / weights,
        # What a runtime that reads the packed tensors keeps on its device. The quality above was measured on dense
        # weights decoded from them, which took the second figure.
        "resident_bytes": {
            "packed": payload + other,
            "evaluated_dense": sum(p.numel() * p.element_size() for p in model.parameters()),
        },
    }


def count_weights(packed: Mapping[str, PackedWeight]) -> int:
    """Weights of the quantized layers."""
    return sum(weight.shape[0] * weight.shape[1] for weight in packed.values())


def bytes_by_role(packed: Mapping[str, PackedWeight]) -> dict[str, int]:
    """Payload bytes by role over all layers."""
    totals: dict[str, int] = {}
    for weight in packed.values():
        for role, size in weight.bytes_by_role().items():
            totals[role] = totals.get(role, 0) + size
    return dict(sorted(totals.items()))


def other_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the unquantized parameters in 16 bits, by part; `model.parameters()` yields tied weights once."""
    quantized = {id(linear.weight) for linear in model_linears(model).values()}
    embedding, head = (_weight_of(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings"))
    parts = {"embeddings": 0, "head": 0, "norms_and_biases": 0}
    for parameter in model.parameters():
        if id(parameter) in quantized:
            continue
        part = "embeddings" if parameter is embedding else "head" if parameter is head else "norms_and_biases"
        parts[part] += _BYTES_16_BIT * parameter.numel()
    return parts


def _weight_of(model: nn.Module, getter: str) -> Tensor | None:
    """The weight of the module that a transformers model names by `getter`, if it has one."""
    module = getattr(model, getter, lambda: None)()
    return None if module is None else module.weight
