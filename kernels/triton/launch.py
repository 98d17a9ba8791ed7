"""A packed weight on a GPU: its resident form, and the launches of its products."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.layouts import PackedWeight, TrellisWeight
from kernels.resident import CodeMatrix, Segment, Tile, code_matrix
from kernels.resident.stack import stack_rows
from kernels.triton import kernels
from kernels.triton.trellis import GpuTrellis, gpu_trellis
from kernels.triton.tuning import Launch, chosen_launch, launch_key, tune

TILE = Tile(rows=64, words=8)
# One more bit than 7 does not fit beside the implicit one in a bfloat16 mantissa.
_WIDEST = 7
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Vectors that are multiplied from the packed form; more are multiplied by rows decoded to a scratch matrix, which the
# dense product of the GPU's own library then reads.
MOST_VECTORS = 64
_SCRATCH_WEIGHTS = 1 << 26
# Of a candidate launch: products of one graph, and how often it is replayed.
_TIMED_PRODUCTS, _TIMED_REPLAYS = 24, 9


@dataclass(frozen=True)
class _Inputs:
    """x and x_salient: [vectors, stride]. columns: of x that are real. plain: [vectors, in_features]."""

    x: Tensor
    x_salient: Tensor
    plain: Tensor
    columns: int


class GpuMatrix:
    """A resident form ready for products on the device where it is. nbytes: what a product reads, padding included."""

    def __init__(self, form: CodeMatrix) -> None:
        self._form = form
        self.shape = form.shape
        self.layout = form.layout
        self.device = form.segments[0].words.device
        self._nothing = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._arguments = [self._segment_arguments(segment) for segment in form.segments]
        self._sparse = self._sparse_arguments()

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self._form))

    def copy(self) -> GpuMatrix:
        """The same matrix with memory of its own."""
        return GpuMatrix(_cloned(self._form))

    def codes(self) -> list[Tensor]:
        """The codes of each segment, int32."""
        return [segment.words for segment in self._form.segments]

    def replace_codes(self, codes: list[Tensor]) -> None:
        """Read the codes from these tensors, of the same shapes, from now on."""
        pairs = zip(self._form.segments, codes, strict=True)
        segments = tuple(dataclasses.replace(segment, words=words) for segment, words in pairs)
        self._form = dataclasses.replace(self._form, segments=segments)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """inputs [..., in_features], float32, float16 or bfloat16: [..., out_features] of the same dtype."""
        plain = inputs.reshape(-1, self.shape[1]).contiguous()
        if plain.shape[0] > MOST_VECTORS:
            out = self._multiply_dense(plain)
            out = out if bias is None else out + bias
        else:
            out = self._multiply_packed(plain, bias)
        return out.view(*inputs.shape[:-1], self.shape[0])

    def tune(self, vectors: int, dtype: torch.dtype) -> None:
        """Measure the launches of a product with so many vectors, unless that was done on this GPU before."""
        if self.device.type != "cuda" or vectors > MOST_VECTORS:
            return
        timer = self._timer(torch.randn(vectors, self.shape[1], device=self.device).to(dtype))
        for segment in self._form.segments:
            tiles = segment.words.shape[1]
            key = launch_key(self.layout, segment.width, self.shape[0], tiles, vectors, dtype)
            # The kernel of one vector and a table has no dot product whose loads could be pipelined.
            staged = segment.table is None or vectors > 1
            tune(key, tiles, timer, self.device, staged=staged)

    def _timer(self, inputs: Tensor) -> Callable[[], float]:
        """Times a product in milliseconds, from a graph that goes round copies of the matrix: weights come from memory,
        not from the second-level cache, and the host's time for a launch, longer than many a kernel, is left out."""
        copies = [self]

        def milliseconds() -> float:
            if len(copies) == 1:  # only now: the choice may be known
                cache = torch.cuda.get_device_properties(self.device).L2_cache_size
                copies.extend(self.copy() for _ in range(-(-2 * cache // self.nbytes)))
                copies.extend(copies * (-(-_TIMED_PRODUCTS // len(copies)) - 1))
            here, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                self.multiply(inputs)  # compiles, which a capture must not
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for matrix in copies:
                    matrix.multiply(inputs)
            times = []
            for _ in range(_TIMED_REPLAYS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / len(copies))
            return statistics.median(times)

        return milliseconds

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out_features, in_features], by the kernels that prefill uses."""
        rows, columns = self.shape
        dense = self._decode_rows(0, rows, dtype)
        order = self._combined_order()
        if order is None:
            return dense[:, :columns]
        out = torch.zeros(rows, columns + 1, dtype=torch.float32, device=self.device)
        # A column may lie in two segments (its low and its high bits): their values add up.
        return out.index_add_(1, order, dense.float())[:, :columns].to(dtype)

    def _multiply_packed(self, plain: Tensor, bias: Tensor | None) -> Tensor:
        rows, vectors = self.shape[0], plain.shape[0]
        inputs = self._prepare(plain)
        blocks = -(-rows // TILE.rows)
        launches = []
        for segment in self._form.segments:
            tiles = segment.words.shape[1]
            launch = chosen_launch(self.layout, segment.width, rows, tiles, vectors, plain.dtype, self.device)
            launches.append(launch.fitted(tiles))
        splits = sum(launch.splits for launch in launches)
        out = torch.empty(vectors, rows, dtype=plain.dtype, device=self.device)
        alone = splits == 1 and bias is None
        partial = out[None] if alone else torch.empty(splits, vectors, rows, dtype=torch.float32, device=self.device)
        done = start = 0
        for index, (segment, launch) in enumerate(zip(self._form.segments, launches, strict=True)):
            part = partial[done : done + launch.splits]
            self._launch(index, segment, launch, inputs, start, part, blocks)
            done += launch.splits
            start += segment.columns
        if not alone:
            count = vectors * rows
            given = self._nothing if bias is None else bias
            kernels.reduce_kernel[(triton.cdiv(count, 256),)](
                partial, given, out, count, splits, rows, HAS_BIAS=bias is not None, SIZE=256, num_warps=2
            )
        return out

    def _launch(
        self, index: int, segment: Segment, launch: Launch, inputs: _Inputs, start: int, part: Tensor, blocks: int
    ) -> None:
        rows, vectors = self.shape[0], inputs.plain.shape[0]
        tiles = segment.words.shape[1]
        each = -(-tiles // launch.splits)
        tensors, numbers, constants = self._arguments[index]
        sparse_tensors, slabs, sparse_constants = self._sparse if index == 0 else self._no_sparse()
        if segment.table is not None and vectors == 1:
            used = {name: sparse_constants[name] for name in ("HAS_SPARSE", "SLAB", "COLUMN_BITS")}
            kernels.table_kernel[(blocks, launch.splits)](
                segment.words, inputs.x, tensors["table"], part, *sparse_tensors,
                rows, inputs.columns, tiles, each, slabs,
                WIDTH=segment.width, BN=TILE.rows, **used, num_warps=1, num_stages=launch.stages,
            )  # fmt: skip
            return
        size = 8 if vectors <= 8 else 16
        kernels.dot_kernel[(blocks, launch.splits, triton.cdiv(vectors, size))](
            segment.words, inputs.x[:, start:], inputs.x_salient[:, start:], *tensors.values(), part,
            inputs.plain, *sparse_tensors,
            rows, inputs.columns - start, self.shape[1], vectors, inputs.x.stride(0), tiles, each,
            numbers["groups"], slabs, numbers["step"], numbers["base"],
            **constants, **sparse_constants,
            BN=TILE.rows, BM=size, DTYPE=_TYPES[inputs.x.dtype], UP=_INTERPRETED,
            # Eight values a row are more than one warp's registers hold; table lookups are shuffles inside one.
            num_warps=2 if segment.four is not None else 1, num_stages=launch.stages,
        )  # fmt: skip

    def _prepare(self, plain: Tensor) -> _Inputs:
        form = self._form
        if form.order is None:
            return _Inputs(plain, plain, plain, self.shape[1])
        padded = F.pad(plain, (0, 1))
        x = padded[:, form.order]
        salient = x if form.order_salient is None else padded[:, form.order_salient]
        return _Inputs(x, salient, plain, x.shape[1])

    def _multiply_dense(self, plain: Tensor) -> Tensor:
        rows, columns = self.shape
        order = self._combined_order()
        x = plain if order is None else F.pad(plain, (0, 1))[:, order]
        out = torch.empty(plain.shape[0], rows, dtype=plain.dtype, device=self.device)
        most = max(_SCRATCH_WEIGHTS // self._form.padded_columns // TILE.rows, 1) * TILE.rows
        for first in range(0, rows, most):
            count = min(most, rows - first)
            dense = self._decode_rows(first, count, plain.dtype)
            torch.matmul(x, (dense[:, :columns] if order is None else dense).T, out=out[:, first : first + count])
        return out

    def _combined_order(self) -> Tensor | None:
        order, salient = self._form.order, self._form.order_salient
        if order is None or salient is None:
            return order
        return torch.where(order == self.shape[1], salient, order)

    def _decode_rows(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows first .. first + count - 1, [count, padded columns], in prepared column order; first is a block's
        first."""
        form, stride = self._form, self._form.padded_columns
        out = torch.empty(count, stride, dtype=dtype, device=self.device)
        start = 0
        marked = self._nothing if form.order_salient is None else (form.order_salient != self.shape[1]).to(torch.int8)
        for segment, (tensors, numbers, constants) in zip(form.segments, self._arguments, strict=True):
            tiles = segment.words.shape[1]
            kept = {name: value for name, value in constants.items() if name != "SALIENT_FIELDS"}
            kernels.decode_kernel[(triton.cdiv(count, TILE.rows), tiles)](
                segment.words, marked, *tensors.values(), out,
                count, tiles, numbers["groups"], stride, start, first // TILE.rows, numbers["step"], numbers["base"],
                **kept, BN=TILE.rows, num_warps=1,
            )  # fmt: skip
            start += segment.columns
        if form.sparse is not None:
            tensors_, slabs, constants_ = self._sparse
            entries, pointers, table, scales, zeros, _ = tensors_
            places = self._places()
            kernels.scatter_kernel[(triton.cdiv(count, 32), slabs)](
                entries, pointers, table, scales, zeros, self._nothing if places is None else places, out,
                count, self.shape[0], stride, first,
                SLAB=constants_["SLAB"], COLUMN_BITS=constants_["COLUMN_BITS"],
                HAS_ZEROS=form.sparse.zeros is not None, HAS_PLACES=places is not None, BN=32, CHUNK=8, num_warps=1,
            )  # fmt: skip
        return out

    def _places(self) -> Tensor | None:
        """Where each column lies in prepared order, int32 [in_features], or None where it is."""
        order = self._form.order
        if order is None:
            return None
        places = torch.zeros(self.shape[1] + 1, dtype=torch.int32, device=self.device)
        places[order] = torch.arange(order.numel(), dtype=torch.int32, device=self.device)
        return places

    def _segment_arguments(self, segment: Segment) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Tensors in the order of the kernels' arguments, numbers, and compile-time constants."""
        kind = (
            kernels.TABLE if segment.table is not None else kernels.FOUR if segment.four is not None else kernels.AFFINE
        )
        table = segment.table
        if table is not None:  # [row blocks, 32]: stacked matrices have a table each
            blocks = segment.words.shape[0]
            table = F.pad(
                table.expand(blocks, -1) if table.dim() == 1 else table, (0, 32 - table.shape[-1])
            ).contiguous()
        tensors = {
            "table": table,
            "scales": segment.scales,
            "offsets": segment.offsets,
            "means": segment.means,
            "four": segment.four,
        }
        grouped = next((t for t in (segment.scales, segment.four) if t is not None), None)
        shared = segment.group is not None and segment.group < TILE.columns  # several groups share a tile
        group = segment.group if shared and segment.group is not None else TILE.columns
        group_tiles = segment.words.shape[1] if segment.group is None else max(segment.group // TILE.columns, 1)
        constants = {
            "KIND": kind.value,
            "WIDTH": segment.width,
            "GROUP_FIELDS": group // 16,
            "GROUP_TILES": group_tiles,
            # Only small groups are sure to begin with a tile's group of fields.
            "SALIENT_FIELDS": -(-segment.salient_most // 16) if shared else 16 if segment.salient_most else 0,
            "HAS_OFFSETS": segment.offsets is not None,
            "HAS_MEANS": segment.means is not None,
        }
        numbers = {"groups": 1 if grouped is None else grouped.shape[1], "step": segment.step, "base": segment.base}
        return {name: self._nothing if t is None else t for name, t in tensors.items()}, numbers, constants

    def _sparse_arguments(self) -> tuple[tuple[Tensor, ...], int, dict[str, Any]]:
        part = self._form.sparse
        if part is None:
            return self._no_sparse()
        given = (part.rows.entries, part.rows.pointers, part.table, part.scales, part.zeros, part.base)
        tensors = tuple(self._nothing if tensor is None else tensor for tensor in given)
        constants = {
            "HAS_SPARSE": True,
            "HAS_BASE": part.base is not None,
            "SLAB": part.rows.slab,
            "COLUMN_BITS": part.rows.column_bits,
            "BASE_GROUP": max(part.group, 1),
        }
        return tensors, part.rows.slabs, constants

    def _no_sparse(self) -> tuple[tuple[Tensor, ...], int, dict[str, Any]]:
        constants = {"HAS_SPARSE": False, "HAS_BASE": False, "SLAB": 1, "COLUMN_BITS": 8, "BASE_GROUP": 1}
        return (self._nothing,) * 6, 0, constants


def _cloned(part: Any) -> Any:
    """A dataclass with clones of its tensors. Unlike a deep copy, which takes all of the memory that a view is a part
    of, as codes in a band's buffer are."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, tuple):
        return tuple(_cloned(one) for one in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    values = {field.name: _cloned(getattr(part, field.name)) for field in dataclasses.fields(part)}
    return type(part)(**values)


def tensors_of(form: CodeMatrix) -> list[Tensor]:
    """Every tensor of a resident form, each once."""
    found = [form.order, form.order_salient]
    for segment in form.segments:
        found += [segment.words, segment.table, segment.scales, segment.offsets, segment.means, segment.four]
    if form.sparse is not None:
        part = form.sparse
        found += [part.rows.entries, part.rows.pointers, part.table, part.scales, part.zeros, part.base]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


def gpu_matrix(weights: Sequence[PackedWeight], device: torch.device | str) -> GpuMatrix | GpuTrellis | None:
    """`weights`, which share their input, as one matrix on `device`; None if one has no form, or they do not stack."""
    trellises = [weight for weight in weights if isinstance(weight, TrellisWeight)]
    if trellises:
        return gpu_trellis(trellises, device) if len(trellises) == len(weights) else None
    forms = []
    for weight in weights:
        form = code_matrix(weight.to(device), TILE, widest=_WIDEST)
        if form is None:
            return None
        forms.append(form)
    stacked = stack_rows(forms)
    return None if stacked is None else GpuMatrix(stacked)
