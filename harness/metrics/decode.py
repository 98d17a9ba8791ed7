"""Decode throughput: what a record says of it. Batched greedy decoding with a static key-value cache.

Every arm generates the same number of tokens from the same prompt, round by round in turns with the other arms, so that
all of them see the same machine. Beside each figure stand the bytes that a token reads, and the bandwidth that this
machine was measured to copy with: a decode step cannot be faster than its bytes at that rate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ArmTimes:
    """One arm. tokens_per_second: over the whole batch, median over rounds; iqr: its first and third quartile over
    rounds. time_to_first_token_ms: prefill of the prompt, median over rounds. ms_p50, ms_p95, ms_p99: time of a decode
    step over all steps of all rounds. bytes_per_token: weights, head and key-value cache that one step reads.
    effective_gb_s: bytes_per_token at the median step. share_of_copy: of the measured copy bandwidth.
    rounds: tokens per second of each round, in order."""

    tokens_per_second: float
    iqr: tuple[float, float]
    time_to_first_token_ms: float
    ms_p50: float
    ms_p95: float
    ms_p99: float
    bytes_per_token: int
    effective_gb_s: float
    share_of_copy: float
    rounds: list[float]


@dataclass(frozen=True)
class BandTimes:
    """The banded runtime's own figures, as the paper's table 5 has them. layer_io_ms: copying one layer's host part to
    the device. band_decode_ms: computing one band's layers from what is on the device. host_bytes: in pinned memory."""

    layers_per_band: int
    layer_io_ms: float
    band_decode_ms: float
    host_bytes: int
    host_to_device_gb_s: float


@dataclass(frozen=True)
class Decode:
    """value: tokens per second of the main arm, `packed` (or `dense` for an unquantized model). arms: by name: packed,
    dense, and on CUDA packed-eager, dense-eager without a CUDA graph. An arm that cannot run here is missing and
    `absent` says why. speedup: of packed over dense in this loop, or None. copy_gb_s: measured, bytes read plus bytes
    written. roofline_tokens_per_second: the packed arm's bytes at copy_gb_s. correctness: worst relative error of a
    layer's product against decode() in float64, and the tolerance that it was held to. kernels: which product each
    layout took. token_latency_ms: of the main arm's median step."""

    value: float
    dataset: str
    device: str
    dtype: str
    runtime: str
    synthetic: bool
    batch: int
    prompt: int
    tokens: int
    threads: int
    arms: dict[str, ArmTimes]
    speedup: float | None
    token_latency_ms: float
    copy_gb_s: float
    roofline_tokens_per_second: float
    correctness: dict[str, float]
    kernels: dict[str, str]
    absent: dict[str, str] = field(default_factory=dict)
    bands: BandTimes | None = None

    def as_record(self) -> dict[str, Any]:
        return {"metric": "decode", **asdict(self)}
