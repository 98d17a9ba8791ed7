"""The compiled library behind Python: a packed weight as the structures that packed.cpp reads, and its product."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int, c_int32, c_long, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import NONE, chosen, library_path
from kernels.cpu.signs import signs_apart
from kernels.cpu.trellis import CpuTrellis, cpu_trellis
from kernels.layouts import PackedWeight, TrellisWeight
from kernels.resident import CodeMatrix, PlaneMatrix, Tile, code_matrix, plane_matrix
from kernels.resident.codes import Segment, SparsePart

# Rows of a block and words a row, as packed.cpp has them; codes of more bits than fit its table are split.
TILE = Tile(rows=64, words=1)
_WIDEST = 5
# Sparse entries that may be read beyond the last one.
_READ_AHEAD = 8
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Segment(Structure):
    _fields_ = (
        ("words", c_void_p),
        ("signs", c_void_p),
        ("table", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("width", c_int32),
        ("tiles", c_int32),
        ("group_tiles", c_int32),
        ("half_scales", c_int32),
    )


class _Sparse(Structure):
    _fields_ = (
        ("entries", c_void_p),
        ("pointers", c_void_p),
        ("table", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("base", c_void_p),
        ("slabs", c_int32),
        ("slab", c_int32),
        ("column_bits", c_int32),
        ("base_group", c_int32),
        ("base_groups", c_int32),
        ("rows", c_int32),
    )


class _Matrix(Structure):
    _fields_ = (
        ("rows", c_int32),
        ("columns", c_int32),
        ("padded", c_int32),
        ("segments", c_int32),
        ("order", c_void_p),
        ("segment", POINTER(_Segment)),
        ("sparse", POINTER(_Sparse)),
        ("planes", c_void_p),
        ("constants", c_void_p),
        ("salient", c_void_p),
        ("words", c_int32),
        ("group_words", c_int32),
        ("plane_count", c_int32),
        ("half_constants", c_int32),
    )


class CpuMatrix:
    """Packed weights [out_i, in] that share their input, ready for products on this CPU; the outputs stand side by
    side.

    nbytes: what a product reads, padding included.
    """

    def __init__(self, forms: Sequence[CodeMatrix | PlaneMatrix], library: Any) -> None:
        columns = {form.shape[1] for form in forms}
        assert len(columns) == 1, f"matrices with one input must have as many columns, not {sorted(columns)}"
        self.shape = (sum(form.shape[0] for form in forms), columns.pop())
        self.layout = " ".join(sorted({form.layout for form in forms}))
        self._forms = list(forms)
        self._library = library
        self._multiply = library.sage_multiply
        self._kept: dict[int, Tensor] = {}  # what the structures point into
        self._structures: list[Any] = []
        pointers = [ctypes.pointer(self._matrix(form)) for form in forms]
        self._matrices = (POINTER(_Matrix) * len(forms))(*pointers)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())

    def copy(self) -> CpuMatrix:
        """The same matrix with memory of its own."""
        return CpuMatrix(copy.deepcopy(self._forms), self._library)

    def multiply(self, inputs: Tensor) -> Tensor:
        """inputs [..., in_features], float32, float16 or bfloat16: [..., out_features] of the same dtype."""
        rows, columns = self.shape
        flat = inputs.reshape(-1, columns).contiguous()
        out = torch.empty((*inputs.shape[:-1], rows), dtype=inputs.dtype)
        self.multiply_into(flat, out)
        return out

    def multiply_into(self, inputs: Tensor, out: Tensor) -> None:
        """inputs [vectors, in_features] into out [vectors, out_features], both contiguous and of one dtype."""
        kind, number = _KINDS[inputs.dtype], len(self._matrices)
        self._multiply(self._matrices, number, inputs.data_ptr(), kind, inputs.shape[0], out.data_ptr())

    def _matrix(self, form: CodeMatrix | PlaneMatrix) -> _Matrix:
        matrix = self._codes(form) if isinstance(form, CodeMatrix) else self._planes(form)
        self._structures.append(matrix)
        return matrix

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._kept[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def _codes(self, form: CodeMatrix) -> _Matrix:
        segments = (_Segment * len(form.segments))(*(self._segment(part) for part in form.segments))
        self._structures.append(segments)
        return self._whole(form, segments=len(form.segments), segment=segments)

    def _segment(self, part: Segment) -> _Segment:
        table = part.table
        if table is None:
            table = part.step * torch.arange(1 << part.width, dtype=torch.float32) + part.base
        scales = part.scales
        groups = 1 if scales is None else scales.shape[1]
        return _Segment(
            words=self._keep(part.words),
            signs=self._keep(part.signs),
            table=self._keep(_whole_registers(table)),
            scales=self._keep(scales),
            offsets=self._keep(part.offsets),
            width=part.width,
            tiles=part.words.shape[1],
            group_tiles=part.words.shape[1] if part.group is None or groups == 1 else part.group // TILE.columns,
            half_scales=int(scales is not None and scales.dtype == torch.float16),
        )

    def _planes(self, form: PlaneMatrix) -> _Matrix:
        return self._whole(
            form,
            planes=self._keep(form.words),
            constants=self._keep(form.constants),
            salient=self._keep(form.salient),
            words=form.words.shape[1],
            group_words=form.group_words,
            plane_count=form.words.shape[2],
            half_constants=int(form.constants.dtype == torch.float16),
        )

    def _whole(self, form: CodeMatrix | PlaneMatrix, **parts: Any) -> _Matrix:
        order = None if form.order is None else form.order.to(torch.int32)
        matrix = _Matrix(
            rows=form.shape[0], columns=form.shape[1], padded=form.padded_columns, order=self._keep(order), **parts
        )
        if form.sparse is not None:
            matrix.sparse = ctypes.pointer(self._sparse(form.sparse, form.shape[0]))
        return matrix

    def _sparse(self, part: SparsePart, count: int) -> _Sparse:
        rows = part.rows
        sparse = _Sparse(
            entries=self._keep(F.pad(rows.entries, (0, _READ_AHEAD))),
            pointers=self._keep(rows.pointers),
            # With zero points the codes are the values.
            table=self._keep(None if part.zeros is not None else _whole_registers(part.table)),
            scales=self._keep(part.scales.float()),
            zeros=self._keep(None if part.zeros is None else part.zeros.float()),
            base=self._keep(part.base),
            slabs=rows.slabs,
            slab=rows.slab,
            column_bits=rows.column_bits,
            base_group=part.group,
            base_groups=0 if part.base is None else part.base.shape[1],
            rows=count,
        )
        self._structures.append(sparse)
        return sparse


def _whole_registers(table: Tensor) -> Tensor:
    """A table of 32 entries or more, repeated: the bits of an index above its width then do not matter."""
    return table.repeat(max(32 // table.numel(), 1))


def cpu_matrix(weights: Sequence[PackedWeight]) -> CpuMatrix | CpuTrellis | None:
    """`weights`, which share their input, as the library multiplies by them; None without a library, or without a
    form for the layout of one of them. Trellis weights have a library of their own."""
    trellises = [weight for weight in weights if isinstance(weight, TrellisWeight)]
    if trellises:
        return cpu_trellis(trellises) if len(trellises) == len(weights) else None
    library = _library()
    if library is None:
        return None
    forms = []
    for weight in weights:
        form = plane_matrix(weight, TILE.rows) or code_matrix(weight, TILE, widest=_WIDEST)
        if form is None:
            return None
        if chosen() == "avx2" and isinstance(form, CodeMatrix):
            form = signs_apart(form)
        forms.append(form)
    return CpuMatrix(forms, library)


@cache
def _open(path: str) -> Any:
    library = ctypes.CDLL(path)
    library.sage_multiply.argtypes = [c_void_p, c_int, c_void_p, c_int, c_long, c_void_p]
    library.sage_multiply.restype = None
    return library


def _library() -> Any:
    instruction_set = chosen()
    path = None if instruction_set == NONE else library_path(instruction_set)
    return None if path is None else _open(str(path))
