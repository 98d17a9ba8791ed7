"""One column at a time: round its scale, search its trellis, refit the scale. The rounding step of error feedback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.layouts.trellis import SCALE_STEPS, scale_factors, segment_starts
from methods.compensation import WorkingColumns
from methods.sage_x.viterbi import encode_segments


class ColumnEncoder:
    """Encodes columns; the results stand in `codes` [n, m] and `scale_codes` [n], in the order of `classes` [n]."""

    def __init__(self, rows: int, classes: Tensor) -> None:
        self.classes = classes
        self.codes = torch.zeros(len(classes), rows, dtype=torch.uint8)
        self.scale_codes = torch.full((len(classes),), 255, dtype=torch.uint8)
        self._class_of = classes.tolist()
        self._starts = torch.tensor(segment_starts(rows))
        self._factors = scale_factors().tolist()

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        """Nothing is shared between columns."""

    def round_column(self, column: int, values: Tensor) -> Tensor:
        """Encode one column, now `values` [m]; returns what it decodes to, still rotated."""
        if self._class_of[column] == 0:
            return torch.zeros_like(values)
        targets = values.cpu()
        scale = self._factors[nearest_scale(float(targets.square().mean()) ** 0.5)]
        codes, found = encode_segments(targets / scale, self._starts, self._class_of[column])
        # These codes are the nearest for this scale; the scale that is best for these codes may be a neighbour.
        best = nearest_scale(float(targets @ found) / float(found @ found))
        self.codes[column], self.scale_codes[column] = codes, best
        return (found * self._factors[best]).to(values)

    def encode_all(self, target: Tensor) -> None:
        """Encode every column of `target` [m, n] by itself, all columns of a class at once."""
        for rate_class in self.classes.unique().tolist():
            if rate_class:
                members = (self.classes == rate_class).nonzero()[:, 0]
                self._encode_class(members, target.T[members.to(target.device)].cpu(), rate_class)

    def _encode_class(self, members: Tensor, values: Tensor, rate_class: int) -> None:
        """values: [k, m], the columns `members` [k]."""
        count, rows = values.shape
        scales = torch.tensor([self._factors[nearest_scale(size)] for size in _sizes(values)])
        starts = torch.cat(
            [(torch.arange(count)[:, None] * rows + self._starts[:-1]).view(-1), self._starts[-1:] * count]
        )
        codes, found = encode_segments((values / scales[:, None]).view(-1), starts, rate_class)
        found = found.view(count, rows)
        ratios = (values * found).sum(dim=1) / found.square().sum(dim=1)
        self.codes[members] = codes.view(count, rows)
        self.scale_codes[members] = torch.tensor([nearest_scale(ratio) for ratio in ratios.tolist()], dtype=torch.uint8)


def nearest_scale(size: float) -> int:
    """The code of the column scale nearest to `size`, on a logarithmic scale."""
    return min(max(round(-SCALE_STEPS * math.log2(max(size, 1e-30))), 0), 255)


def _sizes(columns: Tensor) -> list[float]:
    """The root mean square of each of `columns` [k, m]."""
    return columns.square().mean(dim=1).sqrt().tolist()
