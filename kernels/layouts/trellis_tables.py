"""The rate classes of the trellis layout and their codebooks: constants of the format.

A class says how many new bits each weight of a column brings (a short repeating pattern) and which value a state of
STATE_BITS bits stands for. The tables are trained for N(0, 1) (methods/sage_x/codebook.py) and shipped with the
package, like the levels of NF4: no checkpoint holds them. `distortion` is the mean squared error that they reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

STATE_BITS = 12

# New bits of weight t of a segment, t modulo the length of the pattern. Class 0 stores nothing: its weights are 0.
WIDTHS: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (1, 1, 1, 2),
    (1, 2),
    (1, 2, 2, 2),
    (2,),
    (2, 2, 2, 3),
    (2, 3),
    (2, 3, 3, 3),
    (3,),
    (3, 4),
    (4,),
    (4, 5),
    (5,),
    (6,),
    (7,),
)
# Bits per weight of each class.
RATES: tuple[float, ...] = tuple(sum(widths) / len(widths) if widths else 0.0 for widths in WIDTHS)

TABLES = Path(__file__).with_name("trellis_tables.safetensors")


@dataclass(frozen=True)
class RateTable:
    """Values of one class: [2^STATE_BITS], float32 (stored as float16), by the state as the stream gives it."""

    values: Tensor
    distortion: float


@cache
def rate_table(rate_class: int) -> RateTable:
    """The table of class 1 .. 15."""
    tensors = load_file(TABLES)
    distortion = float(tensors["distortion"][rate_class])
    return RateTable(tensors["values"][rate_class - 1].to(torch.float32), distortion)


@cache
def distortions() -> tuple[float, ...]:
    """Mean squared error on N(0, 1) of each class; 1 for class 0."""
    return (1.0, *(rate_table(c).distortion for c in range(1, len(WIDTHS))))
