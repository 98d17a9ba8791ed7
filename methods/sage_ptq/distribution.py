"""The bell curve of a weight matrix: where the groups' edges lie (SAGE-PTQ section 3.1, equations 2 and 4).

beta and gamma are the mean and the standard deviation of all entries of W, zeta is the salient fraction. With N groups,
    edge(k) = beta + gamma * z(k),  z(k) = Phi^-1((1 + k * (1 - zeta) / N) / 2),  k = 1 .. N
group k holds edge(k-1) < |w| <= edge(k); all |w| <= edge(1) belong to group 1, and |w| > edge(N) is salient.
The printed equation 4 lacks the divisor N, the printed equation 2 has Phi^-1(zeta / 2), a negative threshold; this is
the only reading under which the top edge of equation 4 meets equation 2. Both can be had as printed: see `edges` and
saliency.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri


@dataclass(frozen=True)
class Distribution:
    """Magnitudes of one matrix, sorted once, with running sums: every statistic of a group is two look-ups.

    magnitudes: |w| ascending, float32 [count]. sums, squares: running sums of |w| and w^2 with a leading zero,
    float64 [count + 1].
    """

    mean: float
    deviation: float
    magnitudes: np.ndarray
    sums: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray, unsalient: np.ndarray | None = None) -> Distribution:
        """The distribution of `weight` (any shape); running sums over the entries where `unsalient`, or over all."""
        mean = float(weight.mean(dtype=np.float64))
        # Rounding may leave a constant matrix with a variance a hair below zero.
        variance = max(0.0, float(np.square(weight, dtype=np.float64).mean()) - mean * mean)
        magnitudes = np.abs(weight[unsalient] if unsalient is not None else weight.reshape(-1))
        magnitudes.sort()
        exact = magnitudes.astype(np.float64)
        return cls(
            mean,
            variance**0.5,
            magnitudes,
            np.concatenate([[0.0], np.cumsum(exact)]),
            np.concatenate([[0.0], np.cumsum(exact * exact)]),
        )

    def edges(self, groups: int, zeta: float, quantiles: str) -> np.ndarray:
        """Upper edges of the groups, ascending, [groups].

        "gaussian": the formula; "empirical": equal counts; "printed": z(k) = Phi^-1((k (1 - zeta) + 1) / 2) to the
        letter, which is infinite from the second group on, so that one group holds all but the last zeta.
        """
        if quantiles == "printed":
            upper = (1.0 + np.arange(1, groups + 1) * (1.0 - zeta)) / 2.0
            edges = np.full(groups, np.inf)
            edges[upper < 1.0] = self.mean + self.deviation * ndtri(upper[upper < 1.0])
            return edges
        # k/N first: the last fraction is then exactly 1 - zeta, so the last edge is the same for every N.
        fractions = np.arange(1, groups + 1) / groups * (1.0 - zeta)
        nothing_salient = fractions[-1] == 1.0
        if nothing_salient:
            fractions[-1] = 0.0  # where the last edge lies does not matter: it is replaced below
        if quantiles == "gaussian":
            edges = self.mean + self.deviation * ndtri((1.0 + fractions) / 2.0)
        else:
            ranks = np.rint(fractions * self.magnitudes.size).astype(np.int64) - 1
            edges = self.magnitudes[np.maximum(ranks, 0)].astype(np.float64)
        if nothing_salient:
            edges[-1] = np.inf
        return edges

    def bounds(self, edges: np.ndarray) -> np.ndarray:
        """Ranks that separate the groups: group k is magnitudes[bounds[k-1] : bounds[k]]; [groups + 1], from 0."""
        inner = np.searchsorted(self.magnitudes, edges.astype(np.float32), side="right")
        return np.maximum.accumulate(np.concatenate([[0], inner]))

    def group_errors(self, bounds: np.ndarray) -> np.ndarray:
        """Squared error of each group when its magnitudes become their mean: [groups], float64."""
        sums = np.diff(self.sums[bounds])
        counts = np.maximum(np.diff(bounds), 1)
        return np.maximum(np.diff(self.squares[bounds]) - sums * sums / counts, 0.0)

    def group_means(self, bounds: np.ndarray) -> np.ndarray:
        """Mean magnitude a_k of each group (equation 9): [groups], float64; 0 for an empty group."""
        counts = np.diff(bounds)
        return np.where(counts > 0, np.diff(self.sums[bounds]) / np.maximum(counts, 1), 0.0)
