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


_COUNTED = (
    "memory: weights on the device, counted from all tensors that decoding needs, or measured where the run decoded"
)
# A table of speed: its runs evaluate no text.
SPEED = "token_latency_ms"
# By the metric of the table: what stands in it, in order. Perplexity and bits come from the run's own entries.
FACTS: dict[str, tuple[Fact, ...]] = {
    "quantization_minutes": (
        Fact(
            "quantization_minutes", ("Quantization", "min"), what="wall time of quantization alone, calibration in it"
        ),
        Fact("quantization_peak_gb", ("Peak memory", "GB"), what="largest resident memory while quantizing"),
    ),
    "gpu_occupancy_percent": (
        Fact("weight_bits", ("Weight bits",), 3, "bits as the method's own paper counts them"),
        Fact("scale_bits", ("Scale bits",), 3),
        Fact(
            "gpu_occupancy_percent", ("Occupancy", "%"), what="occupancy: those bits over 16, as the paper computes it"
        ),
        Fact("payload_bits", ("Payload", "bits"), 3, "payload: all stored tensors of the quantized layers"),
        Fact("stored_percent", ("Stored", "%"), what="stored: payload bits over 16"),
        Fact("perplexity", ("Perplexity",)),
    ),
    "token_latency_ms": (
        Fact("layer_io_ms", ("Layer I/O", "ms"), what="layer I/O: copying one layer's host part to the device"),
        Fact("band_dequant_ms", ("Band", "ms"), what="band: computing one band's layers from what is on the device"),
        Fact("token_latency_ms", ("Token", "ms"), what="token: median decode step"),
        Fact("tokens_per_second", ("Tokens/s",)),
        Fact("first_token_ms", ("First token", "ms"), what="first token: prefill of the prompt"),
        Fact(
            "copy_share_percent", ("Of copy", "%"), what="of copy: bytes a step reads, of the measured copy bandwidth"
        ),
        Fact("gpu_memory_gb", ("Resident", "GB"), 3, "resident: weights on the device"),
    ),
    "gpu_memory_gb": (
        Fact("gpu_memory_gb", ("Memory", "GB"), 3, _COUNTED),
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


def _of_metric(metric: str, *path: str, factor: float = 1.0) -> Any:
    """A number of the record's entry of one metric: decode throughput, memory."""

    def read(record: Record) -> float | None:
        entries = record.get("metrics")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping) and entry.get("metric") == metric:
                value = _number(entry, *path)
                return None if value is None else value * factor
        return None

    return read


def _of_main_arm(name: str, factor: float = 1.0) -> Any:
    """A number of the arm that a decode entry is about: packed, or dense for an unquantized model."""

    def read(record: Record) -> float | None:
        found = [_of_metric("decode", "arms", arm, name, factor=factor)(record) for arm in ("packed", "dense")]
        return found[0] if found[0] is not None else found[1]

    return read


def _memory(record: Record) -> float | None:
    measured = _of_metric("memory", "value", factor=1e-9)(record)
    return _scaled(1e-9, "ledger", "resident_bytes", "packed")(record) if measured is None else measured


_FACTS = {
    "layer_io_ms": _of_metric("decode", "bands", "layer_io_ms"),
    "band_dequant_ms": _of_metric("decode", "bands", "band_decode_ms"),
    "token_latency_ms": _of_metric("decode", "token_latency_ms"),
    "tokens_per_second": _of_metric("decode", "value"),
    "first_token_ms": _of_main_arm("time_to_first_token_ms"),
    "copy_share_percent": _of_main_arm("share_of_copy", 100.0),
    "quantization_minutes": _scaled(1 / 60, "phases", "quantize", "seconds"),
    "quantization_peak_gb": _scaled(1e-9, "phases", "quantize", "peak_bytes"),
    "gpu_occupancy_percent": _nominal_occupancy,
    "payload_bits": _scaled(1, "ledger", "payload_bits"),
    "stored_percent": _scaled(100 / _BITS_OF_FP16, "ledger", "payload_bits"),
    "gpu_memory_gb": _memory,
    "storage_gb": _scaled(1e-9, "ledger", "artifact_bytes"),
}
