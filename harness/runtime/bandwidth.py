"""The bandwidth that this machine reaches, measured: the roofline beside every decode figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Far larger than any cache: 1 GB on a GPU, 256 MB on a CPU.
_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_ROUNDS = 9
# Copies in a row on a GPU: waiting for one of them costs as much as a few hundredths of it.
_IN_A_ROW = 10


@dataclass(frozen=True)
class Bandwidth:
    """copy_gb_s: bytes read plus bytes written, a second. host_to_device_gb_s: from pinned memory; None without a
    GPU."""

    copy_gb_s: float
    host_to_device_gb_s: float | None


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Median of several copies in 1e9 bytes a second."""
    size = _BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _median_seconds(lambda: target.copy_(source), device) / 1e9
    if device.type != "cuda":
        return Bandwidth(copied, None)
    pinned = torch.ones(size // 16, dtype=torch.float32, pin_memory=True)
    to = target[: pinned.numel()]
    moved = size // 4 / _median_seconds(lambda: to.copy_(pinned, non_blocking=True), device) / 1e9
    return Bandwidth(copied, moved)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, the device's part of it included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    count = _IN_A_ROW if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(count):
            work()

    several()
    return statistics.median(seconds_of(several, device) for _ in range(_ROUNDS)) / count
