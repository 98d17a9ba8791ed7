"""The products of a decode step, whatever holds the weights: a dense matrix, a packed one, or several with one
input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layouts import PackedWeight
from kernels.products import Matrix, resident_matrix


class Product(Protocol):
    """y = x W^T + b, x [vectors, in_features]. nbytes: what a call reads. kernel: what it is computed by."""

    @property
    def kernel(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def __call__(self, inputs: Tensor) -> Tensor: ...


@dataclass
class DenseProduct:
    """weight [out_features, in_features]; bias [out_features] or None; both in the dtype of the inputs."""

    weight: Tensor
    bias: Tensor | None = None
    kernel: str = "torch"

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


@dataclass
class PackedProduct:
    """A packed weight in its resident form."""

    matrix: Matrix
    bias: Tensor | None = None

    @property
    def kernel(self) -> str:
        return type(self.matrix).__name__

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def __call__(self, inputs: Tensor) -> Tensor:
        out = self.matrix.multiply(inputs)
        return out if self.bias is None else out.add_(self.bias)


def dense_product(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> DenseProduct:
    """One product for several matrices [out_i, in] with one input; its outputs stand side by side."""
    return DenseProduct(torch.cat(list(weights)), _joined(biases))


def packed_product(
    weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], device: torch.device, dtype: torch.dtype
) -> Product | None:
    """One product for packed matrices with one input, or None if no kernel reads them all at once."""
    matrix = resident_matrix(weights, device)
    if matrix is None:
        return None
    return PackedProduct(matrix, _joined([None if bias is None else bias.to(device, dtype) for bias in biases]))


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    found = [bias for bias in biases if bias is not None]
    if not found:
        return None
    assert len(found) == len(biases), "some of the fused layers have a bias and some have not"
    return torch.cat(found)


def kernels_used(products: Mapping[str, Product]) -> dict[str, str]:
    """What computes each of a block's products."""
    return {name: product.kernel for name, product in products.items()}


def tune_products(products: Mapping[str, Product], vectors: int, dtype: torch.dtype) -> None:
    """Let kernels that have a choice of launches measure it now, before anything is timed or captured."""
    for product in products.values():
        for part in getattr(product, "parts", [product]):
            tune = getattr(getattr(part, "matrix", None), "tune", None)
            if tune is not None:
                tune(vectors, dtype)
