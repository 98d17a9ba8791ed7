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
    """Moves the codes of `blocks` to host memory and brings them back band by band.

    layers: a band. host_bytes: what is on the host; device_bytes: the two buffers.
    """

    def __init__(self, blocks: list[Block], layers: int, device: torch.device) -> None:
        self.layers = layers
        self._count = len(blocks)
        self._device = device
        self._cuda = device.type == "cuda"
        self._host: list[Tensor] = []
        self.frozen = False
        """True: copy nothing, to time the computation alone."""
        grouped = [blocks[start : start + layers] for start in range(0, len(blocks), layers)]
        matrices = [[matrix for block in band for matrix in _matrices(block)] for band in grouped]
        sizes = [sum(words.numel() for matrix in band for words in matrix.codes()) for band in matrices]
        self._buffers = [torch.empty(max(sizes), dtype=torch.int32, device=device) for _ in range(min(2, len(sizes)))]
        for number, (band, size) in enumerate(zip(matrices, sizes, strict=True)):
            host = torch.empty(size, dtype=torch.int32, pin_memory=self._cuda)
            buffer, start = self._buffers[number % 2], 0
            for matrix in band:
                moved = []
                for words in matrix.codes():
                    part = slice(start, start + words.numel())
                    host[part].copy_(words.reshape(-1))
                    moved.append(buffer[part].view(words.shape))
                    start += words.numel()
                matrix.replace_codes(moved)
            self._host.append(host)
        if self._cuda:
            self._stream: Any = torch.cuda.Stream(device)
            self._ready = [torch.cuda.Event() for _ in self._buffers]
        for number in range(len(self._buffers)):
            self._fetch(number)

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


def _matrices(block: Block) -> list[Any]:
    found = []
    for product in block.products.values():
        parts = product.parts if isinstance(product, SideBySide) else [product]
        for part in parts:
            if not isinstance(part, PackedProduct) or not hasattr(part.matrix, "replace_codes"):
                raise InputError("the banded runtime needs packed weights on a CUDA device; use --runtime resident")
            found.append(part.matrix)
    return found
