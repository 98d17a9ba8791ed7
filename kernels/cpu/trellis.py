"""Trellis weights behind the compiled library: the structures that trellis.cpp reads, and their product."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int, c_int32, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.cpu.build import NONE, chosen, library_path
from kernels.layouts import TrellisWeight
from kernels.layouts.trellis import segment_starts
from kernels.resident.trellis import (
    TrellisMatrix,
    rotation_pieces,
    segment_words,
    tables,
    trellis_matrix,
    window_starts,
)

_SOURCE = Path(__file__).with_name("trellis.cpp")


class _Piece(Structure):
    _fields_ = (
        ("first", c_void_p),
        ("second", c_void_p),
        ("start", c_int32),
        ("a", c_int32),
        ("b", c_int32),
        ("unused", c_int32),
    )


class _Trellis(Structure):
    _fields_ = (
        ("words", c_void_p),
        ("columns", c_void_p),
        ("bounds", c_void_p),
        ("begins", c_void_p),
        ("factors", c_void_p),
        ("segment_words", c_void_p),
        ("starts", c_void_p),
        ("row_scales", c_void_p),
        ("pieces", POINTER(_Piece)),
        ("tables", c_void_p),
        ("windows", c_void_p),
        ("rows", c_int32),
        ("inputs", c_int32),
        ("live", c_int32),
        ("segments", c_int32),
        ("piece_count", c_int32),
        ("unused", c_int32),
    )


class CpuTrellis:
    """Trellis weights [out_i, in] that share their input, ready for products on this CPU; the outputs stand side by
    side.

    nbytes: what a product reads but for the tables, which all trellis weights share.
    """

    def __init__(self, forms: Sequence[TrellisMatrix], library: Any) -> None:
        columns = {form.shape[1] for form in forms}
        assert len(columns) == 1, f"matrices with one input must have as many columns, not {sorted(columns)}"
        self.shape = (sum(form.shape[0] for form in forms), columns.pop())
        self.layout = TrellisWeight.layout
        self._forms = list(forms)
        self._library = library
        self._kept: list[Any] = []  # what the structures point into
        pointers = [ctypes.pointer(self._structure(form)) for form in forms]
        self._matrices = (POINTER(_Trellis) * len(forms))(*pointers)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for form in self._forms for part in form.tensors())

    def copy(self) -> CpuTrellis:
        """The same matrix with memory of its own."""
        return CpuTrellis(copy.deepcopy(self._forms), self._library)

    def multiply(self, inputs: Tensor) -> Tensor:
        """inputs [..., in_features], float32, float16 or bfloat16: [..., out_features] of the same dtype."""
        rows, columns = self.shape
        plain = inputs.reshape(-1, columns).float().contiguous()
        out = torch.empty(*inputs.shape[:-1], rows)
        self._library.sage_trellis_multiply(
            self._matrices, len(self._matrices), plain.data_ptr(), plain.shape[0], out.data_ptr()
        )
        return out.to(inputs.dtype)

    def _structure(self, form: TrellisMatrix) -> _Trellis:
        rows, columns = form.shape
        starts = segment_starts(rows)
        structure = _Trellis(
            words=self._keep(form.words),
            columns=self._keep(form.columns),
            bounds=self._keep(form.bounds),
            begins=self._keep(form.begins),
            factors=self._keep(form.factors),
            segment_words=self._keep(segment_words(rows)),
            starts=self._keep(torch.tensor(starts, dtype=torch.int32)),
            row_scales=self._keep(form.row_scales.float()),
            tables=self._keep(tables()),
            windows=self._keep(window_starts()),
            rows=rows,
            inputs=columns,
            live=form.columns.numel(),
            segments=len(starts) - 1,
        )
        if form.rotated:
            found = rotation_pieces(rows)
            pieces = (_Piece * len(found))(
                *(_Piece(self._keep(a), self._keep(b), start, len(a), len(b), 0) for start, _, a, b in found)
            )
            self._kept.append(pieces)
            structure.pieces, structure.piece_count = pieces, len(found)
        self._kept.append(structure)
        return structure

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def cpu_trellis(weights: Sequence[TrellisWeight]) -> CpuTrellis | None:
    """`weights`, which share their input, as the library multiplies by them; None without a library."""
    instruction_set = chosen()
    path = None if instruction_set == NONE else library_path(instruction_set, _SOURCE)
    return None if path is None else CpuTrellis([trellis_matrix(weight) for weight in weights], _open(str(path)))


@cache
def _open(path: str) -> Any:
    library = ctypes.CDLL(path)
    library.sage_trellis_multiply.argtypes = [c_void_p, c_int, c_void_p, c_long, c_void_p]
    library.sage_trellis_multiply.restype = None
    return library
