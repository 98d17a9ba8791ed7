"""Matrices with one input, stacked into one: queries, keys and values, or gate and up, in a single product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.resident.codes import CodeMatrix, Segment, SparsePart
from kernels.resident.sparse import SparseRows


def stack_rows(forms: Sequence[CodeMatrix]) -> CodeMatrix | None:
    """The forms one above the other, or None if they do not fit: another width, grouping or order of columns, or rows
    that do not fill their last block."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if any(form.shape[0] % form.tile.rows for form in forms[:-1]):
        return None
    if not all(_same(first, form) for form in forms):
        return None
    segments = tuple(_stack_segments(parts) for parts in zip(*(form.segments for form in forms), strict=True))
    if any(segment is None for segment in segments):
        return None
    sparse = _stack_sparse([form.sparse for form in forms])
    shape = (sum(form.shape[0] for form in forms), first.shape[1])
    return replace(first, shape=shape, segments=tuple(s for s in segments if s is not None), sparse=sparse)


def _same(one: CodeMatrix, other: CodeMatrix) -> bool:
    sparse = [form.sparse for form in (one, other)]
    return (
        (one.layout, one.tile, one.shape[1], len(one.segments))
        == (other.layout, other.tile, other.shape[1], len(other.segments))
        and _equal(one.order, other.order)
        and _equal(one.order_salient, other.order_salient)
        and (sparse[0] is None) == (sparse[1] is None)
        and (sparse[0] is None or sparse[1] is None or _sparse_format(sparse[0]) == _sparse_format(sparse[1]))
    )


def _sparse_format(part: SparsePart) -> tuple[object, ...]:
    missing = (part.zeros is None, part.base is None)
    return part.rows.slab, part.rows.column_bits, part.group, missing, part.table.tolist()


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _stack_segments(parts: tuple[Segment, ...]) -> Segment | None:
    formats = {(p.width, p.group, p.step, p.base, p.salient_most > 0, p.words.shape[1]) for p in parts}
    names = ("scales", "offsets", "means", "four")
    stacked: dict[str, Any] = {}
    for name in names:
        tensors = [getattr(part, name) for part in parts]
        if len({None if tensor is None else tensor.dtype for tensor in tensors}) > 1:
            return None
        stacked[name] = None if tensors[0] is None else torch.cat(tensors)
    if len(formats) > 1:
        return None
    tables = [part.table for part in parts]
    table = None
    if tables[0] is not None:
        table = torch.cat([t.expand(p.words.shape[0], -1) for t, p in zip(tables, parts, strict=True) if t is not None])
    words = torch.cat([part.words for part in parts])
    most = max(part.salient_most for part in parts)
    return replace(parts[0], words=words, table=table, salient_most=most, **stacked)


def _stack_sparse(parts: Sequence[SparsePart | None]) -> SparsePart | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    rows = [part.rows for part in found]
    pieces, pointers, done = [], [], 0
    for slab in range(rows[0].slabs):
        row = [torch.zeros(1, dtype=torch.int64, device=rows[0].pointers.device) + done]
        for one in rows:
            start, end = int(one.pointers[slab, 0]), int(one.pointers[slab, -1])
            pieces.append(one.entries[start:end])
            row.append(one.pointers[slab, 1:].long() - start + done)
            done += end - start
        pointers.append(torch.cat(row))
    joined = SparseRows(torch.cat(pieces), torch.stack(pointers).to(torch.int32), rows[0].slab, rows[0].column_bits)
    zeros = [part.zeros for part in found if part.zeros is not None]
    base = [part.base for part in found if part.base is not None]
    return replace(
        found[0],
        rows=joined,
        scales=torch.cat([part.scales for part in found]),
        zeros=torch.cat(zeros) if zeros else None,
        base=torch.cat(base) if base else None,
    )
