"""Wall time and peak memory of each phase of a run (load, calibrate and quantize, evaluate).

CPU: resident set size of the process, sampled. CUDA: the allocator's peaks, and the whole device's use through NVML.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

_INTERVAL = 0.05


class Phases:
    """Collects `{phase: {"seconds": ..., "peak_bytes": ..., ...}}` for a record."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self.measured: dict[str, dict[str, Any]] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Time the body as `phase`; a phase entered twice adds its seconds and keeps its larger peak."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        sampler = _ResidentSampler()
        start = time.perf_counter()
        sampler.start()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - start
            entry = {"seconds": seconds, "peak_resident_bytes": sampler.stop()}
            if self._cuda:
                entry["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self._device)
                entry["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
                entry.update(_nvml(self._device))
            entry["peak_bytes"] = entry["peak_allocated_bytes" if self._cuda else "peak_resident_bytes"]
            before = self.measured.get(phase, {})
            self.measured[phase] = {
                key: value + before.get(key, 0) if key == "seconds" else max(value, before.get(key, 0))
                for key, value in entry.items()
            }


def _nvml(device: torch.device) -> dict[str, int]:
    """Bytes in use on the whole device, by all processes; nothing where NVML's Python package is missing."""
    try:
        return {"device_used_bytes": torch.cuda.device_memory_used(device)}
    except Exception:  # NVML has exceptions of its own, in a package that may be missing
        return {}


class _ResidentSampler(threading.Thread):
    """Largest resident set size of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self._peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak, self._process.memory_info().rss)
