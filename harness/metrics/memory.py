"""Memory of decoding: what a record says of it, in bytes.

`resident` is what lies on the compute device for as long as the model is there; peaks are taken by phase. CUDA: the
allocator's figures and the whole device through NVML. CPU: resident set size of the process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """value: resident weight bytes, linear layers and the rest. linear_bytes: the packed linear layers as kernels read
    them; ledger_bytes: their stored tensors, of which quality is measured and size counted; over_ledger: linear_bytes
    over ledger_bytes, less one. other_bytes: embeddings, head, norms, biases. host_bytes: weights kept in host memory
    (banded). dense_bytes: the linear layers in 16 bits. kv_cache_bytes: allocated for `prompt + tokens`.
    activation_bytes: peak above weights and cache while decoding; None where it cannot be told apart (CPU). phases:
    peaks of load, prefill and decode, as in every record."""

    value: int
    dataset: str
    device: str
    dtype: str
    runtime: str
    synthetic: bool
    batch: int
    prompt: int
    tokens: int
    linear_bytes: int
    ledger_bytes: int
    over_ledger: float
    other_bytes: int
    host_bytes: int
    dense_bytes: int
    kv_cache_bytes: int
    activation_bytes: int | None
    phases: dict[str, dict[str, Any]]

    def as_record(self) -> dict[str, Any]:
        return {"metric": "memory", **asdict(self)}
