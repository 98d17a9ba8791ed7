"""The objective of equation 11: the fast form against the definition, and the search."""

import numpy as np
import pytest

from methods.sage_ptq.distribution import Distribution
from methods.sage_ptq.quantizer import SalientSet
from methods.sage_ptq.saliency import MagnitudeSaliency
from methods.sage_ptq.threshold import general_objective, magnitude_objective, minimise, unsalient_bounds

SALIENT_ERRORS = {
    "converged": lambda salient: 0.0,
    "truncated": lambda salient: salient.relaxed_error(salient.row_scales(5)),
    "discrete": lambda salient: salient.discrete_error(salient.row_scales(None), 2),
}


def weights(seed=0):
    generator = np.random.default_rng(seed)
    return (0.02 * generator.standard_t(5, (50, 80)) + 0.0003).astype(np.float32)


def objectives(weight, groups, quantiles, salient_error, limit=0.5):
    distribution = Distribution.of(weight)
    saliency = MagnitudeSaliency(weight, distribution, quantiles)
    fast = magnitude_objective(weight, distribution, groups, limit, quantiles, salient_error)
    return fast, general_objective(weight, saliency.mask, groups, quantiles, salient_error)


def equation_11(weight, zeta, groups):
    """J with Gaussian edges and Mode 1 at its fixed point (no salient error), written out with masks."""
    distribution = Distribution.of(weight)
    magnitudes = np.abs(weight).astype(np.float64)
    edges = np.float32(distribution.edges(groups, zeta, "gaussian")).astype(np.float64)
    below, lost = -1.0, 0.0
    for edge in edges:
        group = magnitudes[(magnitudes > below) & (magnitudes <= edge)]
        if group.size:
            lost += np.square(group - group.mean()).sum()
        below = edge
    return lost / np.square(magnitudes).sum()


@pytest.mark.parametrize("salient_error", SALIENT_ERRORS.values(), ids=SALIENT_ERRORS)
@pytest.mark.parametrize("groups", [1, 9, 15])
def test_the_fast_objective_is_the_definition_for_gaussian_edges(groups, salient_error):
    fast, general = objectives(weights(), groups, "gaussian", salient_error)
    for zeta in [0.0, 1e-6, 0.001, *np.linspace(0.004, 0.5, 30)]:
        assert fast(zeta) == pytest.approx(general(zeta), rel=1e-9)


@pytest.mark.parametrize("salient_error", SALIENT_ERRORS.values(), ids=SALIENT_ERRORS)
@pytest.mark.parametrize("groups", [1, 9, 15])
def test_the_fast_objective_is_the_definition_for_empirical_edges(groups, salient_error):
    fast, general = objectives(weights(), groups, "empirical", salient_error)
    for salient in [0, 1, 4, 40, 41, 99, 400, 1234, 2000]:
        assert fast(salient / 4000) == pytest.approx(general(salient / 4000), rel=1e-9)
    # Where zeta is no whole number of the 4000 weights, an edge may differ by one weight: the definition cuts the
    # unsalient weights into equal counts, the fast form cuts (1 - zeta) of all.
    for zeta in [1e-6, *np.linspace(0.0041, 0.4999, 30)]:
        assert fast(zeta) == pytest.approx(general(zeta), rel=0.01)


def test_both_are_equation_11():
    weight = weights()
    fast, general = objectives(weight, 9, "gaussian", SALIENT_ERRORS["converged"])
    for zeta in (0.001, 0.01, 0.05, 0.3):
        assert fast(zeta) == pytest.approx(equation_11(weight, zeta, 9), rel=1e-6)
        assert general(zeta) == pytest.approx(equation_11(weight, zeta, 9), rel=1e-6)


def test_the_objective_is_a_share_of_the_energy():
    fast, _ = objectives(weights(), 1, "gaussian", SALIENT_ERRORS["converged"])
    assert 0 < fast(0.01) < fast(0.0) < 1


def test_at_the_fixed_point_more_salient_weights_lose_less():
    fast, _ = objectives(weights(), 9, "gaussian", SALIENT_ERRORS["converged"])
    # Its steps are single weights, so the search may stop a few of them short of the end.
    assert 0.0095 <= minimise(fast, 0.01) <= 0.01


def test_the_search_finds_an_inner_minimum():
    # One bit for a salient weight: it costs more to have many of them than few.
    def salient_error(salient):
        return salient.discrete_error(salient.row_scales(None), 1)

    fast, _ = objectives(weights(), 15, "gaussian", salient_error)
    found = minimise(fast, 0.5)
    grid = np.linspace(1e-4, 0.5, 400)
    best = min(fast(zeta) for zeta in grid)
    assert 0 < found < 0.45
    assert fast(found) <= best * 1.05  # Brent's method finds a minimum of a rough curve, near the best


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.1, 0.5])
def test_the_search_stays_inside_its_limit(limit):
    for objective in (lambda zeta: zeta, lambda zeta: -zeta, lambda zeta: (zeta - 0.3 * limit) ** 2):
        assert 0 <= minimise(objective, limit) <= limit
    assert minimise(lambda zeta: (zeta - 0.3 * limit) ** 2, limit) == pytest.approx(0.3 * limit, abs=1e-4)


def test_unsalient_weights_beyond_the_last_edge_join_the_last_group():
    weight = weights()
    everything = np.ones(weight.shape, dtype=bool)
    for quantiles in ("gaussian", "empirical"):
        bounds = unsalient_bounds(Distribution.of(weight, everything), 9, 0.1, quantiles)
        assert bounds[0] == 0
        assert bounds[-1] == weight.size
    assert np.ptp(np.diff(bounds)) <= 1


def test_of_a_matrix_of_zeros_nothing_is_lost():
    for objective in objectives(np.zeros((50, 80), dtype=np.float32), 9, "gaussian", SALIENT_ERRORS["discrete"]):
        assert objective(0.01) == 0


def test_candidates_beyond_the_limit_are_not_needed():
    weight = weights()
    wide, _ = objectives(weight, 9, "gaussian", SALIENT_ERRORS["discrete"], limit=0.5)
    narrow, _ = objectives(weight, 9, "gaussian", SALIENT_ERRORS["discrete"], limit=0.02)
    for zeta in (0.001, 0.01, 0.02):
        assert wide(zeta) == narrow(zeta)


def test_the_salient_set_seen_by_the_objective_is_the_one_that_is_stored():
    weight = weights()
    distribution = Distribution.of(weight)
    seen = []

    def watch(salient):
        seen.append(salient)
        return 0.0

    magnitude_objective(weight, distribution, 9, 0.1, "gaussian", watch)(0.03)
    mask = MagnitudeSaliency(weight, distribution, "gaussian").mask(0.03)
    stored = SalientSet.of(weight, mask)
    assert np.array_equal(seen[0].values, stored.values)
    assert np.array_equal(seen[0].rows, stored.rows)
