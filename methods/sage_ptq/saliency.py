"""Component 1: which weights are salient (SAGE-PTQ section 3.1.1, equation 2; appendix C.1 for the Hessian score).

A `Saliency` ranks the weights of one matrix and says, for any fraction zeta, which of them are salient. By magnitude
(the paper's choice) the threshold is that of the Gaussian with the matrix's mean and deviation, so heavy tails let a
little more than zeta through. By Hessian the zeta most salient entries are taken.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from methods.sage_ptq.distribution import Distribution


class Saliency(Protocol):
    """Says which weights of one matrix are salient."""

    def mask(self, zeta: float) -> np.ndarray:
        """Salient entries [m, n], bool, at fraction `zeta`."""


class MagnitudeSaliency:
    """|w| > edge(N): equation 2. Does not depend on N, since the last edge is the same for every N."""

    def __init__(self, weight: np.ndarray, distribution: Distribution, quantiles: str) -> None:
        self._magnitudes = np.abs(weight)
        self._distribution = distribution
        self._quantiles = quantiles

    def mask(self, zeta: float) -> np.ndarray:
        return self._magnitudes > np.float32(self._distribution.edges(1, zeta, self._quantiles)[-1])


class HessianSaliency:
    """The zeta entries with the largest w^2 / U_jj^2, U the factor of the inverse Hessian: the exact OBS error."""

    def __init__(self, weight: np.ndarray, pivots: Tensor) -> None:
        self._scores = np.square(weight) / np.square(pivots.cpu().numpy())[None, :]
        self._sorted = np.sort(self._scores, axis=None)

    def mask(self, zeta: float) -> np.ndarray:
        count = round(zeta * self._sorted.size)
        if count == 0:
            return np.zeros(self._scores.shape, dtype=bool)
        return self._scores >= self._sorted[-count]


class NoSaliency:
    """Nothing is salient: every weight is binarized (figure 9)."""

    def __init__(self, weight: np.ndarray) -> None:
        self._shape = weight.shape

    def mask(self, zeta: float) -> np.ndarray:
        return np.zeros(self._shape, dtype=bool)
