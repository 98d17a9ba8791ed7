"""Trellis weights on a GPU: their resident form, and the launches of their products."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.layouts import TrellisWeight
from kernels.layouts.trellis import segment_starts
from kernels.resident.trellis import (
    TrellisMatrix,
    rotate_back,
    segment_words,
    tables,
    trellis_matrix,
    window_starts,
)
from kernels.triton import trellis_kernels

# Vectors that are multiplied from the packed form; for more, values are written out and a dense product reads them.
MOST_VECTORS = 64
_SCRATCH_WEIGHTS = 1 << 26
_BN = 64
# Columns at once, and vectors, of a program with one vector and with more.
_ONE, _SOME = (8, 1), (4, 8)
# A split has at least so many columns: its start-up looks at every class.
_LEAST_COLUMNS = 64
# Columns of a program that writes values out.
_SLAB = 16


@dataclass(frozen=True)
class _Part:
    """A form, and what its launches need. where: classes, streams, states, segments and rows, where each begins."""

    form: TrellisMatrix
    segments: int
    blocks: int
    where: tuple[Tensor, ...]

    @classmethod
    def of(cls, form: TrellisMatrix) -> _Part:
        rows, device = form.shape[0], form.words.device
        starts = segment_starts(rows)
        longest = max(stop - start for start, stop in itertools.pairwise(starts))
        first_rows = torch.tensor(starts, dtype=torch.int32, device=device)
        where = (form.bounds, form.begins, window_starts(device), segment_words(rows, device), first_rows)
        return cls(form, len(starts) - 1, -(-longest // _BN), where)

    def multiply(self, plain: Tensor) -> Tensor:
        """plain [vectors, in_features] -> [vectors, out_features], float32."""
        form, rows, vectors, live = self.form, self.form.shape[0], plain.shape[0], self.form.columns.numel()
        if live == 0:
            return torch.zeros(vectors, rows, device=plain.device)
        x = plain.index_select(1, form.columns).float() * form.factors
        programs = self.segments * self.blocks
        splits = _splits(programs, live, plain.device)
        columns, count = _ONE if vectors == 1 else _SOME
        partial = torch.empty(splits, vectors, rows, dtype=torch.float32, device=plain.device)
        trellis_kernels.product_kernel[(programs, splits, triton.cdiv(vectors, count))](
            form.words, x, tables(plain.device), *self.where, partial,
            rows, live, self.segments, self.blocks, triton.cdiv(live, splits), vectors,
            BN=_BN, BC=columns, BM=count, num_warps=1, num_stages=1,
        )  # fmt: skip
        return self._finished(partial.sum(dim=0))

    def multiply_dense(self, plain: Tensor) -> Tensor:
        """The same for many vectors: columns decoded to a scratch matrix in the dtype of the inputs, dense products."""
        out = torch.zeros(plain.shape[0], self.form.shape[0], device=plain.device)
        most = max(_SCRATCH_WEIGHTS // self.form.shape[0], 1)
        for start in range(0, self.form.columns.numel(), most):
            inputs = plain.index_select(1, self.form.columns[start : start + most])
            out += inputs @ self.decoded(start, inputs.shape[1]).to(plain.dtype)
        return out

    def decoded(self, start: int, count: int) -> Tensor:
        """Decoded weights of `count` live columns from `start` on, a column a row: [count, out_features], float32."""
        form, rows = self.form, self.form.shape[0]
        values = torch.empty(count, rows, dtype=torch.float32, device=form.words.device)
        if count:
            trellis_kernels.values_kernel[(self.segments * self.blocks, triton.cdiv(count, _SLAB))](
                form.words, tables(form.words.device), form.factors, *self.where, values,
                rows, self.segments, self.blocks, start, count,
                BN=_BN, BC=_ONE[0], SLAB=_SLAB, num_warps=1, num_stages=1,
            )  # fmt: skip
        return self._finished(values)

    def _finished(self, z: Tensor) -> Tensor:
        return (rotate_back(z) if self.form.rotated else z) * self.form.row_scales.float()


class GpuTrellis:
    """Trellis weights [out_i, in] that share their input, on the device where they are; the outputs stand side by side.

    nbytes: what a product reads but for the tables, which all trellis weights share.
    """

    def __init__(self, forms: Sequence[TrellisMatrix]) -> None:
        self._parts = [_Part.of(form) for form in forms]
        self.shape = (sum(form.shape[0] for form in forms), forms[0].shape[1])
        self.layout = TrellisWeight.layout
        self.device = forms[0].words.device

    @property
    def nbytes(self) -> int:
        tensors = [tensor for part in self._parts for tensor in part.form.tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self) -> GpuTrellis:
        """The same matrix with memory of its own."""
        return GpuTrellis([copy.deepcopy(part.form) for part in self._parts])

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """inputs [..., in_features], float32, float16 or bfloat16: [..., out_features] of the same dtype."""
        plain = inputs.reshape(-1, self.shape[1])
        few = plain.shape[0] <= MOST_VECTORS
        found = [part.multiply(plain) if few else part.multiply_dense(plain) for part in self._parts]
        out = torch.cat(found, dim=1)
        out = (out if bias is None else out + bias).to(inputs.dtype)
        return out.view(*inputs.shape[:-1], self.shape[0])

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out_features, in_features], by the kernel that prefill uses."""
        dense = torch.zeros(self.shape[1], self.shape[0], dtype=dtype, device=self.device)
        start = 0
        for part in self._parts:
            columns, rows = part.form.columns, part.form.shape[0]
            dense[columns.long(), start : start + rows] = part.decoded(0, columns.numel()).to(dtype)
            start += rows
        return dense.T


def gpu_trellis(weights: Sequence[TrellisWeight], device: torch.device | str) -> GpuTrellis:
    """`weights`, which share their input, as one matrix on `device`."""
    return GpuTrellis([trellis_matrix(weight.to(device)) for weight in weights])


def _splits(programs: int, live: int, device: torch.device) -> int:
    """Slabs of columns: sixteen one-warp programs for each multiprocessor, or as many as are worth it."""
    if device.type != "cuda":
        return 2
    wanted = 16 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, live // _LEAST_COLUMNS))
