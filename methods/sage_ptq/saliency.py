"""Component 1: which weights are salient (SAGE-PTQ section 3.1.1, equation 2; appendix C.1 for the Hessian score).

A `Saliency` ranks the weights of one matrix and says, for any fraction zeta, which of them are salient. By magnitude
(the paper's choice) the threshold is that of the Gaussian with the matrix's mean and deviation, so heavy tails let a
little more than zeta through. By Hessian the zeta most salient entries are taken.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy.special import ndtri
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
        # Equation 4 as printed has no last edge that equation 2 could meet: the Gaussian threshold stays.
        self._quantiles = "empirical" if quantiles == "empirical" else "gaussian"

    def mask(self, zeta: float) -> np.ndarray:
        return self._magnitudes > np.float32(self._distribution.edges(1, zeta, self._quantiles)[-1])


class PrintedSaliency:
    """|w| > beta + gamma * Phi^-1(zeta / 2): equation 2 to the letter.

    The threshold is negative unless the mean is far from zero, and then every weight is salient.
    """

    def __init__(self, weight: np.ndarray, distribution: Distribution) -> None:
        self._magnitudes = np.abs(weight)
        self._distribution = distribution

    def mask(self, zeta: float) -> np.ndarray:
        if zeta == 0.0:  # Phi^-1(0) is minus infinity, of which a deviation of 0 would make NaN
            return np.ones(self._magnitudes.shape, dtype=bool)
        return self._magnitudes > self._distribution.mean + self._distribution.deviation * ndtri(zeta / 2)


class HessianSaliency:
    """The zeta entries with the largest w^2 / d_j.

    score: what d_j is, with U the upper Cholesky factor of the damped inverse Hessian, H^-1 = U^T U.
        "factor": U_jj^2, the loss of rounding column j when those before it are done (as in GPTQ);
        "inverse": [H^-1]_jj, the loss of pruning w alone (Optimal Brain Surgeon);
        "inverse-squared": [H^-1]_jj^2, as papers on binarization print it.
    """

    def __init__(self, weight: np.ndarray, factor: Tensor, score: str = "factor") -> None:
        squared = np.square(factor.cpu().numpy())
        divisors = np.diagonal(squared) if score == "factor" else squared.sum(axis=0)
        self._scores = np.square(weight) / (np.square(divisors) if score == "inverse-squared" else divisors)[None, :]
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
