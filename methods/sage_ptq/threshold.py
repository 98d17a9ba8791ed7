"""Component 4: how much is salient (SAGE-PTQ section 3.3, equation 11).

    J(zeta) = (||W_sal - a B||^2 + sum_k ||W_k - a_k B_k||^2) / ||W||^2,   minimised over 0 <= zeta <= zeta_max

with Brent's method, the number of groups and of bits fixed. The paper uses the relaxed B of Mode 1 here. At Mode 1's
fixed point the relaxed error is zero, so J falls as zeta grows and the search ends next to zeta_max; it has an inner
minimum with a truncated Mode 1 (`iterations`) or with the error after rounding (objective "discrete").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar

from methods.sage_ptq.distribution import Distribution
from methods.sage_ptq.quantizer import SalientSet

SalientError = Callable[[SalientSet], float]


def magnitude_objective(
    weight: np.ndarray,
    distribution: Distribution,
    groups: int,
    max_salient: float,
    quantiles: str,
    salient_error: SalientError,
) -> Callable[[float], float]:
    """J for saliency by magnitude. A value costs O(groups) look-ups and work on the salient candidates alone."""
    energy = float(distribution.squares[-1]) or 1.0  # of a matrix of zeros, nothing is lost
    widest = np.abs(weight) > np.float32(distribution.edges(1, max_salient, quantiles)[-1])
    candidates = SalientSet.of(weight, widest)
    magnitudes = np.abs(candidates.values)

    def objective(zeta: float) -> float:
        edges = distribution.edges(groups, zeta, quantiles)
        lost = distribution.group_errors(distribution.bounds(edges)).sum()
        chosen = magnitudes > np.float32(edges[-1])
        salient = SalientSet(candidates.rows[chosen], candidates.values[chosen], candidates.count)
        return (lost + salient_error(salient)) / energy

    return objective


def general_objective(
    weight: np.ndarray,
    mask: Callable[[float], np.ndarray],
    groups: int,
    quantiles: str,
    salient_error: SalientError,
) -> Callable[[float], float]:
    """J for any saliency: the unsalient weights are sorted anew for each zeta. Slow: the definition."""
    energy = float(np.square(weight, dtype=np.float64).sum()) or 1.0

    def objective(zeta: float) -> float:
        chosen = mask(zeta)
        unsalient = Distribution.of(weight, ~chosen)
        bounds = unsalient_bounds(unsalient, groups, zeta, quantiles)
        lost = unsalient.group_errors(bounds).sum()
        return (lost + salient_error(SalientSet.of(weight, chosen))) / energy

    return objective


def unsalient_bounds(unsalient: Distribution, groups: int, zeta: float, quantiles: str) -> np.ndarray:
    """Group bounds of unsalient weights; what lies above the last edge joins the last group, so no weight is lost.

    The empirical quantiles are those of the unsalient weights themselves, hence equal counts at zeta = 0.
    """
    if unsalient.magnitudes.size == 0:
        return np.zeros(groups + 1, dtype=np.int64)
    bounds = unsalient.bounds(unsalient.edges(groups, 0.0 if quantiles == "empirical" else zeta, quantiles))
    bounds[-1] = unsalient.magnitudes.size
    return bounds


def minimise(objective: Callable[[float], float], max_salient: float) -> float:
    """The fraction in [0, max_salient] with the smallest J, by Brent's bounded method."""
    found = minimize_scalar(objective, bounds=(0.0, max_salient), method="bounded")
    return float(found.x)
