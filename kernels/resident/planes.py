"""Bit planes in the order that kernels read them: word by word along a row, rows side by side.

Bit b of word k is column 32 * k + b. Stored as int32 [row blocks, words, planes, rows]: the words of neighbouring
rows are neighbours in memory. Padding holds 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


def pack(planes: Sequence[Tensor], rows: int) -> Tensor:
    """planes: bool [m, n] each, all of one shape. Returns int32 [ceil(m / rows), ceil(n / 32), planes, rows]."""
    packed = []
    for plane in planes:
        padded = F.pad(plane, (0, -plane.shape[1] % WORD, 0, -plane.shape[0] % rows))
        tiles = padded.view(-1, rows, padded.shape[1] // WORD, WORD)
        words = torch.zeros(tiles.shape[:3], dtype=torch.int32, device=plane.device)
        for bit in range(WORD):
            words |= tiles[..., bit].to(torch.int32) << bit
        packed.append(words.transpose(1, 2))
    return torch.stack(packed, dim=2).contiguous()


def unpack(words: Tensor, plane: int, shape: tuple[int, int]) -> Tensor:
    """Plane number `plane` [m, n], bool, of what `pack` made."""
    chosen = words[:, :, plane].transpose(1, 2)
    bits = torch.stack([(chosen >> bit) & 1 for bit in range(WORD)], dim=-1).bool()
    return bits.reshape(chosen.shape[0] * chosen.shape[1], -1)[: shape[0], : shape[1]]
