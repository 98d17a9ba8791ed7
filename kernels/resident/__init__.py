"""Packed weights re-ordered once, when they are loaded, into the forms that kernels read.

A form holds what the packed tensors hold, bit for bit, and padding; nothing is rounded. `decode()` of the packed
weight stays the reference: every kernel is tested against it.
"""

from kernels.resident.codes import CodeMatrix, Segment, code_matrix
from kernels.resident.lane16 import Tile
from kernels.resident.plane_matrix import PlaneMatrix, plane_matrix
from kernels.resident.sparse import SparseRows

__all__ = ["CodeMatrix", "PlaneMatrix", "Segment", "SparseRows", "Tile", "code_matrix", "plane_matrix"]
