"""The encoder of the trellis layout: for each segment the bits whose decoded values lie nearest to the targets.

A state of L bits steps by its pattern's k new bits a weight, and the weight's value is the table's entry for the state;
the best path is found by the Viterbi algorithm (Ungerboeck 1982; Marcellin and Fischer 1990). The stream of a segment
is circular, so that no start state is stored (tail-biting). As in QTIP (arXiv 2406.11235, section 3.2) two searches do:
one around the seam that says which L - k bits a good path has there, and one over the segment that begins and ends
with them. viterbi.cpp does the same, bit for bit, and much faster.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.layouts.trellis_tables import STATE_BITS, WIDTHS, rate_table
from kernels.native import native_library

# Weights before and after the seam in the first search: four to five times the memory of a 1-bit trellis.
WARMUP = 48
_FAR = 1e30


def encode_segments(targets: Tensor, starts: Tensor, rate_class: int) -> tuple[Tensor, Tensor]:
    """Codes [N], uint8, and the values [N], float32, that they decode to, for `targets` [N], float32.

    starts: [segments + 1], int64, where each segment begins, and N. A code holds the new bits of its weight, the oldest
    one in its highest bit. rate_class: 1 .. 15. Every segment must bring at least STATE_BITS bits.
    """
    table = _newest_lowest(rate_class)
    return search(targets, starts, WIDTHS[rate_class], table)


def search(targets: Tensor, starts: Tensor, widths: tuple[int, ...], table: Tensor) -> tuple[Tensor, Tensor]:
    """The same for any table [2^L], float32, whose index has the newest bit lowest."""
    encode = compiled() if targets.device.type == "cpu" else None
    # Its vectors have up to 16 lanes, its steps 7 bits.
    if encode is None or max(widths) > 7 or not 16 << max(widths) <= table.numel() <= 1 << 12:
        return _search_torch(targets, starts.tolist(), widths, table)
    targets, starts = targets.contiguous(), starts.contiguous()
    codes, values = torch.empty(targets.shape, dtype=torch.uint8), torch.empty_like(targets)
    encode(
        targets.data_ptr(),
        starts.data_ptr(),
        starts.numel() - 1,
        WARMUP,
        bytes(widths),
        len(widths),
        _bits(table),
        table.data_ptr(),
        codes.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, values


@cache
def compiled() -> Callable[..., None] | None:
    """`encode_segments` of viterbi.cpp, or None without a compiler."""
    library = native_library(Path(__file__).with_name("viterbi.cpp"))
    if library is None:
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    function = library.encode_segments
    function.restype = None
    function.argtypes = [
        pointer, pointer, integer, integer, ctypes.c_char_p, integer, integer, pointer, pointer, pointer, integer,
    ]  # fmt: skip
    return function


def reversed_bits(bits: int) -> Tensor:
    """[2^bits], int64: each number with its bits in reverse order; from one numbering of states to the other."""
    index = torch.arange(1 << bits)
    result = torch.zeros_like(index)
    for bit in range(bits):
        result |= ((index >> bit) & 1) << (bits - 1 - bit)
    return result


@cache
def _newest_lowest(rate_class: int) -> Tensor:
    """The class's table in the numbering in which the predecessors of neighbouring states are neighbours."""
    return rate_table(rate_class).values[reversed_bits(STATE_BITS)].contiguous()


def _bits(table: Tensor) -> int:
    return table.numel().bit_length() - 1


def _search_torch(targets: Tensor, starts: list[int], widths: tuple[int, ...], table: Tensor) -> tuple[Tensor, Tensor]:
    """All segments of one length at once."""
    codes, values = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
    table = table.to(targets.device)
    for length in {stop - start for start, stop in itertools.pairwise(starts)}:
        first = [start for start, stop in itertools.pairwise(starts) if stop - start == length]
        index = torch.tensor(first, device=targets.device)[:, None] + torch.arange(length, device=targets.device)
        codes[index], values[index] = _search_batch(targets[index], widths, table)
    return codes, values


def _search_batch(x: Tensor, widths: tuple[int, ...], table: Tensor) -> tuple[Tensor, Tensor]:
    """x: [segments, length] -> codes and values of that shape."""
    length, bits = x.shape[1], _bits(table)
    before = min(WARMUP, length // 2)
    steps = [(length - before + i) % length for i in range(2 * before)]
    cost, choices = _forward(x, torch.zeros(x.shape[0], table.numel(), device=x.device), steps, widths, table)
    state = cost.argmin(dim=1)  # the first of equal ones
    for i in reversed(range(before, 2 * before)):
        state = _previous(state, choices[i], widths[(i - before) % len(widths)], bits)
    overlap = state & ((1 << (bits - widths[0])) - 1)

    # The states that the segment may begin from and end in: those with the overlap in their newest bits.
    seam = overlap[:, None] + (torch.arange(1 << widths[0], device=x.device) << (bits - widths[0]))
    cost = torch.full_like(cost, _FAR).scatter_(1, seam, 0.0)
    cost, choices = _forward(x, cost, range(length), widths, table)
    state = seam.gather(1, cost.gather(1, seam).argmin(dim=1, keepdim=True)).squeeze(1)
    states = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    for t in reversed(range(length)):
        states[:, t] = state
        state = _previous(state, choices[t], widths[t % len(widths)], bits)
    masks = torch.tensor([(1 << widths[t % len(widths)]) - 1 for t in range(length)], device=x.device)
    return (states & masks).to(torch.uint8), table[states]


def _forward(
    x: Tensor, cost: Tensor, steps: list[int] | range, widths: tuple[int, ...], table: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Costs [segments, states] after `steps`, and for each step the best predecessor's oldest bits by the others."""
    choices = []
    for t in steps:
        width = widths[t % len(widths)]
        by_oldest = cost.view(x.shape[0], 1 << width, -1)
        best = by_oldest[:, 0].clone()
        choice = torch.zeros_like(best, dtype=torch.uint8)
        for oldest in range(1, 1 << width):
            better = by_oldest[:, oldest] < best
            best = torch.where(better, by_oldest[:, oldest], best)
            choice[better] = oldest
        choices.append(choice)
        cost = best.repeat_interleave(1 << width, dim=1) + (x[:, t : t + 1] - table).square()
    return cost, choices


def _previous(state: Tensor, choice: Tensor, width: int, bits: int) -> Tensor:
    head = state >> width
    return (choice.gather(1, head[:, None]).squeeze(1).long() << (bits - width)) | head
