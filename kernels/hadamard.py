"""Orthogonal transforms with entries +-1: Hadamard matrices of any order that a layer has, or nearly.

Sylvester's doubling gives powers of two, Paley's two constructions (1933) orders q + 1 and 2 (q + 1) over a prime q,
and the Kronecker product of Hadamard matrices is one: 576 = 36 x 16, 1536 = 12 x 128, 14336 = 28 x 512. A length
without such a factorization is cut into powers of two. Sums run in a fixed order, one element at a time: the result is
the same on every device and with any number of threads.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Paley cores are applied densely; 2 x 4 x odd parts beyond this are cut into powers of two instead.
_LARGEST_CORE = 256


def rotate(x: Tensor, *, inverse: bool = False) -> Tensor:
    """x [..., n], float32 -> x H^T / sqrt(n) (inverse: x H / sqrt(n)) with the Hadamard matrix H of order n."""
    parts, start = [], 0
    for core, power in factors(x.shape[-1]):
        size = core * power
        parts.append(_rotate_part(x[..., start : start + size], core, power, inverse))
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@cache
def factors(length: int) -> tuple[tuple[int, int], ...]:
    """Orders (core, power of two) of the pieces of `length`, largest first; one piece wherever possible.

    A piece of core c and power p is transformed by H_c x H_p, core 1 being no core.
    """
    power = length & -length
    odd = length // power
    if odd == 1:
        return ((1, length),)
    doubled = 4
    while doubled <= power and odd * doubled <= _LARGEST_CORE:
        if _paley(odd * doubled) is not None:
            return ((odd * doubled, power // doubled),)
        doubled *= 2
    pieces = [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]
    return tuple((1, piece) for piece in pieces)


def hadamard(core: int, power: int) -> Tensor:
    """H_core x H_power with entries +-1, float64, for tests."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = _paley(core) if core > 1 else [[1]]
    assert signs is not None
    return torch.kron(torch.tensor(signs, dtype=torch.float64), matrix)


def _rotate_part(x: Tensor, core: int, power: int, inverse: bool) -> Tensor:
    shape = x.shape
    x = x.reshape(-1, core, power)
    half = power // 2
    while half:
        pairs = x.view(x.shape[0], core, -1, 2, half)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        x = torch.stack([first + second, first - second], dim=3).view(x.shape)
        half //= 2
    if core > 1:
        signs = _paley(core)
        assert signs is not None
        rows = list(zip(*signs, strict=True)) if inverse else signs
        x = torch.stack([_signed_sum(x, row) for row in rows], dim=1)
    return (x / (core * power) ** 0.5).reshape(shape)


def _signed_sum(x: Tensor, signs: list[int] | tuple[int, ...]) -> Tensor:
    """sum over c of signs[c] * x[:, c], in order: [batch, power]."""
    total = x[:, 0] * signs[0]
    for index, sign in enumerate(signs[1:], start=1):
        total = total.add_(x[:, index], alpha=sign)
    return total


@cache
def _paley(order: int) -> list[list[int]] | None:
    """A Hadamard matrix of `order` by one of Paley's constructions, or None if neither reaches it."""
    if order % 4 == 0 and _is_prime(order - 1) and (order - 1) % 4 == 3:
        core = _jacobsthal(order - 1)
        top = [[1] * order]
        return top + [[-1, *(value + (i == j) for j, value in enumerate(row))] for i, row in enumerate(core)]
    prime = order // 2 - 1
    if order % 4 == 0 and _is_prime(prime) and prime % 4 == 1:
        core = _jacobsthal(prime)
        symmetric = [[0] + [1] * prime, *([1, *row] for row in core)]
        blocks = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
        return [[blocks[value][half][side] for value in row for side in (0, 1)] for row in symmetric for half in (0, 1)]
    return None


def _jacobsthal(prime: int) -> list[list[int]]:
    """Q[i][j] = 1 if i - j is a square modulo the prime, 0 if it is 0, -1 otherwise."""
    squares = {value * value % prime for value in range(1, prime)}
    symbol = [0] + [1 if value in squares else -1 for value in range(1, prime)]
    return [[symbol[(i - j) % prime] for j in range(prime)] for i in range(prime)]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
