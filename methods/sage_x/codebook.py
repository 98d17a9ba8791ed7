"""Train the tables of the trellis layout for N(0, 1): `python -m methods.sage_x.codebook`.

Start: every set of states that one step can reach is a scalar quantizer with a random offset, its levels in random
order (a dithered quantizer, so that no two sets agree). Then Lloyd rounds: encode fresh samples, move each entry toward
the mean of the samples that used it. A table ends at centroids, E[x | value] = value, which the encoder's scales rely
on. The result is seeded and rounded to float16; it is shipped, and only this module writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.layouts.trellis_tables import STATE_BITS, TABLES, WIDTHS
from methods.sage_x.viterbi import reversed_bits, search

SEGMENT = 256
# Samples a state in each round: few while the table still moves, many at the end.
ROUNDS = (32,) * 10 + (128,) * 4
# A state counts as having been seen twice more, at its old value: rarely used states must not jump.
_INERTIA = 2


def train(widths: tuple[int, ...], bits: int, seed: int, rounds: tuple[int, ...] = ROUNDS) -> Tensor:
    """The table [2^bits], float32 holding float16 values, newest bit of the index lowest."""
    generator = torch.Generator().manual_seed(seed)
    table = _initial(max(widths), bits, generator)
    for samples in rounds:
        x = torch.randn(-(-samples * table.numel() // SEGMENT) * SEGMENT, generator=generator)
        _, _values, states = encode_states(x, widths, table)
        count = torch.bincount(states, minlength=table.numel()).float()
        total = torch.bincount(states, weights=x.double(), minlength=table.numel()).float()
        table = (total + _INERTIA * table) / (count + _INERTIA)
    return table.half().float()


def encode_states(x: Tensor, widths: tuple[int, ...], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and states (newest bit lowest) of `x`, whole segments of SEGMENT samples: each [N]."""
    starts = torch.arange(0, x.numel() + 1, SEGMENT)
    codes, values = search(x, starts, widths, table)
    bits = table.numel().bit_length() - 1
    steps = codes.long().view(-1, SEGMENT)
    # Twice around: after the first round every state is that of the circular stream.
    state = torch.zeros(steps.shape[0], dtype=torch.int64)
    states = torch.empty_like(steps)
    for t in [*range(SEGMENT), *range(SEGMENT)]:
        state = ((state << widths[t % len(widths)]) & ((1 << bits) - 1)) | steps[:, t]
        states[:, t] = state
    return codes, values, states.view(-1)


def distortion(widths: tuple[int, ...], table: Tensor, seed: int, segments: int = 1024) -> float:
    """Mean squared error on fresh samples."""
    x = torch.randn(segments * SEGMENT, generator=torch.Generator().manual_seed(seed))
    return float((encode_states(x, widths, table)[1] - x).square().mean())


def _initial(width: int, bits: int, generator: torch.Generator) -> Tensor:
    heads, branches = 1 << (bits - width), 1 << width
    # Reversed, so that in a pattern with narrower steps too the branches of a step lie far apart.
    level = reversed_bits(width)[None] ^ torch.randint(0, branches, (heads, 1), generator=generator)
    quantile = (level + torch.rand(heads, 1, generator=generator)) / branches
    return torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).float().view(-1)


def main(path: Path = TABLES) -> None:
    values, errors = [], [1.0]
    for index, widths in enumerate(WIDTHS):
        if widths:
            table = train(widths, STATE_BITS, seed=index)
            values.append(table[reversed_bits(STATE_BITS)].half())
            errors.append(distortion(widths, table, seed=1000 + index))
            print(f"{sum(widths) / len(widths):.2f} bits: {errors[-1]:.5f}", file=sys.stderr, flush=True)
    save_file({"values": torch.stack(values), "distortion": torch.tensor(errors)}, path)


if __name__ == "__main__":
    main()
