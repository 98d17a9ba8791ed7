"""The ledger of a model of random weights: counted from one block, since all are alike."""

from __future__ import annotations

from typing import Any

from harness.ledger import bytes_by_role
from harness.runtime.architecture import Architecture
from harness.runtime.synthetic import LEARNED_POSITIONS
from kernels.layouts import PackedWeight
from methods import QuantizationMethod


def synthetic_ledger(
    architecture: Architecture, layer: dict[str, PackedWeight], method: QuantizationMethod
) -> dict[str, Any]:
    """The same figures as `harness.ledger.build_ledger`, without a file."""
    a = architecture
    sizes = {name: weight.shape[0] * weight.shape[1] for name, weight in layer.items()}
    weights, block = a.linear_weights, sum(sizes.values())
    payload = a.layers * sum(weight.nbytes() for weight in layer.values())
    nominal = {name: method.nominal_bits(weight) for name, weight in layer.items()}
    embeddings = 2 * a.vocabulary * a.hidden + (0 if a.block == "llama" else 2 * LEARNED_POSITIONS * a.hidden)
    parts = {
        "embeddings": embeddings,
        "head": 0 if a.tied else 2 * a.vocabulary * a.hidden,
        "norms_and_biases": 2 * small_parameters(a),
    }
    other = sum(parts.values())
    return {
        "weights": weights,
        "nominal_weight_bits": sum(sizes[name] / block * bits.weight for name, bits in nominal.items()),
        "nominal_scale_bits": sum(sizes[name] / block * bits.scale for name, bits in nominal.items()),
        "payload_bytes": payload,
        "payload_bits": 8 * payload / weights,
        "bytes_by_role": {role: a.layers * size for role, size in bytes_by_role(layer).items()},
        "other_bytes": other,
        "other_bytes_by_part": parts,
        "total_bytes": payload + other,
        "packed_file_bytes": None,
        "artifact_bits": 8 * (payload + other) / (weights + other // 2),
        "artifact_bits_without_embeddings": 8 * payload / weights,
        "resident_bytes": {"packed": payload + other, "evaluated_dense": 2 * weights + other},
    }


def small_parameters(a: Architecture) -> int:
    """Norms, and OPT's biases."""
    if a.block == "llama":
        return a.layers * (2 * a.hidden + (2 * a.head_size if a.head_norms else 0)) + a.hidden
    biases = sum(rows for rows, _ in a.linears().values())
    return a.layers * (4 * a.hidden + biases) + 2 * a.hidden
