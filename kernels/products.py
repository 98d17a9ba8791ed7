"""Kernels behind `PackedLinear`: the resident form of a packed weight, made at its first product and kept beside it.

A kernel answers for few vectors at once (decoding). For more, decoding the weight and one dense product costs little
per vector and gives the bits of a dense layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.cpu import cpu_matrix
from kernels.layouts import PackedWeight

# Vectors that a kernel multiplies; the weight is read once for up to 16 of them.
MOST_VECTORS = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Matrix(Protocol):
    """A packed weight in its resident form. nbytes: what one product reads of it, padding included."""

    shape: tuple[int, int]
    layout: str

    @property
    def nbytes(self) -> int: ...

    def multiply(self, inputs: Tensor) -> Tensor: ...

    def copy(self) -> Matrix: ...


_matrices: WeakKeyDictionary[PackedWeight, Matrix | None] = WeakKeyDictionary()


def resident_matrix(weights: Sequence[PackedWeight], device: torch.device) -> Matrix | None:
    """A new resident form of weights that share their input, on `device`; their outputs stand side by side.

    None if no kernel reads their layouts there, or not all of them at once.
    """
    if device.type == "cpu":
        return cpu_matrix(weights)
    if device.type == "cuda":
        from kernels.triton.launch import gpu_matrix  # needs triton, which CPU-only machines lack

        return gpu_matrix(weights, device)
    return None


def kept_matrix(weight: PackedWeight) -> Matrix | None:
    """The resident form of `weight` where its tensors are, made once; it lives as long as `weight`."""
    if weight not in _matrices:
        _matrices[weight] = resident_matrix([weight], next(iter(weight.tensors().values())).device)
    return _matrices[weight]


def kernel_product(inputs: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """inputs [..., in_features] times `packed`, by its kernel."""
    matrix: Any = kept_matrix(packed)
    out: Tensor = matrix.multiply(inputs)
    return out if bias is None else out + bias


def has_kernel(inputs: Tensor, packed: PackedWeight) -> bool:
    """True if a kernel multiplies these inputs by `packed`."""
    few = 0 < inputs.numel() <= MOST_VECTORS * inputs.shape[-1]
    return few and inputs.dtype in DTYPES and not inputs.requires_grad and kept_matrix(packed) is not None
