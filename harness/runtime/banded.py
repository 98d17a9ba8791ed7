"""The banded runtime (SAGE-PTQ, section 3.4): code planes in pinned host memory, bands of layers prefetched to the
device.

Two buffers on the device hold a band each; while one is worked on, the next band is copied into the other on a second
stream. Scales, tables, sparse entries and everything that is not a code stay on the device. Band b always uses buffer
b % 2, so addresses never change. The copy is the limit: a token cannot be faster than its bytes over the bus.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.runtime.build import SideBySide
from harness.runtime.decoder import Block
from harness.runtime.products import PackedProduct
from kernels.errors import InputError


class Bands:
    """Takes the codes of blocks to host memory as the blocks are made, and brings them back band by band: no model ever
    lies on the device as a whole.

    layers: a band. host_bytes: what is on the host; device_bytes: the two buffers. `take` every block in order, then
    `start`.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.layers = layers
        self._device = device
        self._cuda = device.type == "cuda"
        self._count = 0
        self._waiting: list[Any] = []
        self._bands: list[list[Any]] = []
        self._host: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self.frozen = False
        """True: copy nothing, to time the computation alone."""

    def take(self, block: Block) -> None:
        """The codes of the next block; they leave the device when their band is complete. Raises InputError for
        products that have none."""
        self._waiting += _matrices(block)
        self._count += 1
        if self._count % self.layers == 0:
            self._to_host()

    def start(self) -> None:
        """All blocks were taken: their products read the buffers from now on, and the first bands are on their way."""
        if self._waiting:
            self._to_host()
        largest = max(host.numel() for host in self._host)
        count = min(2, len(self._host))
        self._buffers = [torch.empty(largest, dtype=torch.int32, device=self._device) for _ in range(count)]
        for number, band in enumerate(self._bands):
            _read_from(self._buffers[number % 2], band)
        if self._cuda:
            self._stream: Any = torch.cuda.Stream(self._device)
            self._ready = [torch.cuda.Event() for _ in self._buffers]
        for number in range(len(self._buffers)):
            self._fetch(number)

    def _to_host(self) -> None:
        band, self._waiting = self._waiting, []
        words = [words for matrix in band for words in matrix.codes()]
        host = torch.empty(sum(part.numel() for part in words), dtype=torch.int32, pin_memory=self._cuda)
        for part, place in zip(words, host.split([part.numel() for part in words]), strict=True):
            place.copy_(part.reshape(-1))
        _read_from(host, band)
        self._bands.append(band)
        self._host.append(host)

    @property
    def host_bytes(self) -> int:
        return sum(host.numel() * host.element_size() for host in self._host)

    @property
    def device_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    def before(self, index: int) -> None:
        """Called before block `index`: its band must have arrived."""
        if self._cuda and index % self.layers == 0 and not self.frozen:
            torch.cuda.current_stream(self._device).wait_event(self._ready[index // self.layers % 2])

    def after(self, index: int) -> None:
        """Called after block `index`: its band's buffer is free for the next band that uses it."""
        band = index // self.layers
        if self.frozen or not ((index + 1) % self.layers == 0 or index + 1 == self._count):
            return
        self._fetch(band + 2 if band + 2 < len(self._host) else band % 2)

    def _fetch(self, band: int) -> None:
        host = self._host[band]
        to = self._buffers[band % 2][: host.numel()]
        if not self._cuda:
            to.copy_(host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(host, non_blocking=True)
            self._ready[band % 2].record(self._stream)


def _read_from(memory: Tensor, band: list[Any]) -> None:
    """Let the matrices of a band read their codes from `memory`, where they stand one after the other."""
    start = 0
    for matrix in band:
        moved = []
        for words in matrix.codes():
            moved.append(memory[start : start + words.numel()].view(words.shape))
            start += words.numel()
        matrix.replace_codes(moved)


def _matrices(block: Block) -> list[Any]:
    found = []
    for product in block.products.values():
        parts = product.parts if isinstance(product, SideBySide) else [product]
        for part in parts:
            if not isinstance(part, PackedProduct) or not hasattr(part.matrix, "replace_codes"):
                raise InputError("the banded runtime needs packed weights on a CUDA device; use --runtime resident")
            found.append(part.matrix)
    return found
