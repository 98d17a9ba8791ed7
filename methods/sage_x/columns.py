"""One column at a time: round its scale, search its trellis, refit the scale. The rounding step of error feedback."""

from __future__ import annotations

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
        self._factors = scale_factors()

    def begin_column(self, column: int, columns: WorkingColumns) -> None:
        """Nothing is shared between columns."""

    def round_column(self, column: int, values: Tensor) -> Tensor:
        """Encode one column, now `values` [m]; returns what it decodes to, still rotated."""
        if self._class_of[column] == 0:
            return torch.zeros_like(values)
        codes, scale_codes, found = self._encode(values[None].cpu(), self._class_of[column])
        self.codes[column], self.scale_codes[column] = codes[0], scale_codes[0]
        return found[0].to(values)

    def encode_all(self, target: Tensor) -> None:
        """Encode every column of `target` [m, n] by itself, all columns of a class at once."""
        for rate_class in self.classes.unique().tolist():
            if rate_class:
                members = self.classes == rate_class
                found = self._encode(target.T[members.to(target.device)].cpu(), rate_class)
                self.codes[members], self.scale_codes[members] = found[:2]

    def _encode(self, values: Tensor, rate_class: int) -> tuple[Tensor, Tensor, Tensor]:
        """values [k, m] -> codes [k, m], scale codes [k], decoded values [k, m]."""
        count, rows = values.shape
        scale = nearest_scale(values.square().mean(dim=1).sqrt())
        targets = values / self._factors[scale.long()][:, None]
        offsets = torch.arange(count)[:, None] * rows
        starts = torch.cat([(offsets + self._starts[:-1]).view(-1), torch.tensor([count * rows])])
        codes, found = encode_segments(targets.view(-1), starts, rate_class)
        codes, found = codes.view(count, rows), found.view(count, rows)
        # These codes are the nearest for this scale; the scale that is best for these codes may be a neighbour.
        best = nearest_scale((values * found).sum(dim=1) / found.square().sum(dim=1))
        return codes, best, found * self._factors[best.long()][:, None]


def nearest_scale(sizes: Tensor) -> Tensor:
    """The codes of the column scales nearest to `sizes`, on a logarithmic scale: uint8."""
    return (-SCALE_STEPS * sizes.clamp_min(1e-30).log2()).round().clamp(0, 255).to(torch.uint8)
