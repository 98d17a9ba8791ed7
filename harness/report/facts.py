"""Numbers that a record holds besides its metrics, under the names that the claims use: time, memory, occupancy.

A table of such numbers (6, 7, figure 2) names its columns here; each number becomes a tidy row like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.report import formatting

_BITS_OF_FP16 = 16
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Fact:
    """A column of a table of facts. decimals: None for the rule of measured values."""

    metric: str
    head: tuple[str, ...]
    decimals: int | None = None
    what: str = ""  # how our number came about, for the remarks below the table

    def text(self, value: float | None) -> str:
        """A value of this column as it is printed."""
        if value is None or self.decimals is None:
            return formatting.number(value)
        return f"{value:.{self.decimals}f}"


# By the metric of the table: what stands in it, in order. Perplexity and bits come from the run's own entries.
FACTS: dict[str, tuple[Fact, ...]] = {
    "quantization_minutes": (
        Fact("quantization_minutes", ("Quantization", "min"), what="wall time of quantization alone, calibration in it"),
        Fact("quantization_peak_gb", ("Peak memory", "GB"), what="largest resident memory while quantizing"),
    ),
    "gpu_occupancy_percent": (
        Fact("weight_bits", ("Weight bits",), 3, "bits as the method's own paper counts them"),
        Fact("scale_bits", ("Scale bits",), 3),
        Fact("gpu_occupancy_percent", ("Occupancy", "%"), what="occupancy: those bits over 16, as the paper computes it"),
        Fact("payload_bits", ("Payload", "bits"), 3, "payload: all stored tensors of the quantized layers"),
        Fact("stored_percent", ("Stored", "%"), what="stored: payload bits over 16"),
        Fact("perplexity", ("Perplexity",)),
    ),
    "gpu_memory_gb": (
        Fact("gpu_memory_gb", ("Memory", "GB"), 3, "memory: all tensors that decoding needs, counted, without KV cache"),
        Fact("storage_gb", ("Storage", "GB"), 3, "storage: the packed file, and the rest of the model in 16 bits"),
        Fact("payload_bits", ("Payload", "bits"), 3, "payload: all stored tensors of the quantized layers"),
    ),
}


def fact(record: Record, metric: str) -> float | None:
    """The number `metric` of a record, or None if it lacks it."""
    found = _FACTS.get(metric)
    return None if found is None else found(record)


def _number(record: Record, *path: str) -> float | None:
    part: Any = record
    for name in path:
        part = part.get(name) if isinstance(part, Mapping) else None
    return float(part) if isinstance(part, (int, float)) and not isinstance(part, bool) else None


def _scaled(factor: float, *path: str) -> Any:
    def read(record: Record) -> float | None:
        value = _number(record, *path)
        return None if value is None else value * factor

    return read


def _nominal_occupancy(record: Record) -> float | None:
    parts = [_number(record, "ledger", f"nominal_{part}_bits") for part in ("weight", "scale")]
    return None if None in parts else 100 * sum(part or 0.0 for part in parts) / _BITS_OF_FP16


_FACTS = {
    "quantization_minutes": _scaled(1 / 60, "phases", "quantize", "seconds"),
    "quantization_peak_gb": _scaled(1e-9, "phases", "quantize", "peak_bytes"),
    "gpu_occupancy_percent": _nominal_occupancy,
    "payload_bits": _scaled(1, "ledger", "payload_bits"),
    "stored_percent": _scaled(100 / _BITS_OF_FP16, "ledger", "payload_bits"),
    "gpu_memory_gb": _scaled(1e-9, "ledger", "resident_bytes", "packed"),
    "storage_gb": _scaled(1e-9, "ledger", "artifact_bytes"),
}
