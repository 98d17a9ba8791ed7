"""Component 3: the dual-mode quantizer (SAGE-PTQ section 3.2, equations 5-10, algorithm 2).

Mode 1, salient weights: a scale per row and `salient_bits` bits a weight. Starting from B = sign(W), the paper repeats
    a_i = sum_j W_ij B_ij / sum_j B_ij^2,   B = clip(W / a, -1, 1)
Each step raises a_i; the fixed point is a_i = max_j |W_ij| over the row's salient weights (B = W / a then gives
a_i back, and nothing is clipped). Then B moves to the nearest of the 2^bits midpoints of 2^bits + 1 uniform levels on
[-1, 1]: magnitudes (2c + 1) / 2^bits with c = floor(|B| * 2^(bits - 1)), and the sign. a is not refitted.

Mode 2, unsalient weights: group k becomes sign(w) * a_k, a_k the mean of |w| over the group and the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SalientSet:
    """Salient weights of one matrix in row-major order.

    rows: [salient], ascending row numbers. values: [salient], float64. count: rows of the matrix.
    """

    rows: np.ndarray
    values: np.ndarray
    count: int

    @classmethod
    def of(cls, weight: np.ndarray, mask: np.ndarray) -> SalientSet:
        return cls(np.nonzero(mask)[0], weight[mask].astype(np.float64), weight.shape[0])

    def row_scales(self, iterations: int | None) -> np.ndarray:
        """Mode 1 scales a_i [count], float64; 0 for a row without salient weights. None: the fixed point."""
        magnitudes = np.abs(self.values)
        if iterations is None:
            scales = np.zeros(self.count)
            np.maximum.at(scales, self.rows, magnitudes)
            return scales
        relaxed = np.ones_like(magnitudes)  # |B|; B has the sign of W throughout
        scales = np.zeros(self.count)
        for _ in range(iterations):
            inner = np.bincount(self.rows, magnitudes * relaxed, self.count)
            norms = np.bincount(self.rows, relaxed * relaxed, self.count)
            scales = np.divide(inner, norms, out=np.zeros(self.count), where=norms > 0)
            per_weight = scales[self.rows]
            relaxed = np.divide(magnitudes, per_weight, out=np.zeros_like(magnitudes), where=per_weight > 0)
            np.minimum(relaxed, 1.0, out=relaxed)
        return scales

    def codes(self, scales: np.ndarray, bits: int) -> np.ndarray:
        """Magnitude codes c [salient], uint8, for scales [count] as they are stored."""
        half = 1 << (bits - 1)
        per_weight = scales[self.rows]
        relaxed = np.divide(np.abs(self.values), per_weight, out=np.zeros_like(self.values), where=per_weight > 0)
        return np.clip(np.floor(np.minimum(relaxed, 1.0) * half), 0, half - 1).astype(np.uint8)

    def relaxed_error(self, scales: np.ndarray) -> float:
        """sum (W - a B)^2 with B = clip(W / a, -1, 1): only what exceeds the scale is lost."""
        return float(np.square(np.maximum(np.abs(self.values) - scales[self.rows], 0.0)).sum())

    def discrete_error(self, scales: np.ndarray, bits: int) -> float:
        """sum (W - a B)^2 with B on the midpoints: what storing the salient weights really costs."""
        magnitudes = scales[self.rows] * (2.0 * self.codes(scales, bits) + 1.0) / (1 << bits)
        return float(np.square(np.abs(self.values) - magnitudes).sum())
