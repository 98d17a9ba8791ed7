"""Edges and group statistics against equations 2, 4 and 9 written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy.stats import norm

from methods.sage_ptq.distribution import Distribution

QUANTILES = ["gaussian", "empirical"]


def weights(rows=40, columns=50, seed=0):
    """Weights with a heavy tail and a small mean, float32."""
    generator = np.random.default_rng(seed)
    return (0.02 * generator.standard_t(5, (rows, columns)) + 0.0005).astype(np.float32)


def naive_groups(weight, edges):
    """Magnitudes of each group, edge(k-1) < |w| <= edge(k), with group 1 from zero; the salient ones are left out."""
    magnitudes = np.abs(weight.reshape(-1))
    number = np.array([(w > edges.astype(np.float32)).sum() for w in magnitudes])
    return [magnitudes[number == k].astype(np.float64) for k in range(len(edges))]


def test_mean_and_deviation_are_those_of_all_entries():
    weight = weights()
    for mask in (None, np.abs(weight) < 0.03):
        distribution = Distribution.of(weight, mask)
        assert distribution.mean == pytest.approx(weight.astype(np.float64).mean(), rel=1e-12)
        assert distribution.deviation == pytest.approx(weight.astype(np.float64).std(), rel=1e-9)


def test_running_sums_cover_the_entries_asked_for():
    weight = weights()
    mask = np.abs(weight) < 0.03
    for entries, distribution in ((weight, Distribution.of(weight)), (weight[mask], Distribution.of(weight, mask))):
        assert distribution.magnitudes.tolist() == sorted(np.abs(entries).reshape(-1).tolist())
        assert distribution.sums[0] == distribution.squares[0] == 0
        assert distribution.sums[-1] == pytest.approx(np.abs(entries.astype(np.float64)).sum())
        assert distribution.squares[-1] == pytest.approx(np.square(entries.astype(np.float64)).sum())


def test_the_weight_is_not_sorted_in_place():
    weight = weights()
    before = weight.copy()
    Distribution.of(weight)
    Distribution.of(np.abs(weight).reshape(-1))
    assert np.array_equal(weight, before)


@pytest.mark.parametrize("groups", [1, 2, 9, 15, 63])
@pytest.mark.parametrize("zeta", [0.001, 0.01, 0.1, 0.5])
def test_gaussian_edges_are_equation_4(groups, zeta):
    distribution = Distribution.of(weights())
    edges = distribution.edges(groups, zeta, "gaussian")
    written = [
        distribution.mean + distribution.deviation * norm.ppf((1 + k * (1 - zeta) / groups) / 2)
        for k in range(1, groups + 1)
    ]
    assert edges == pytest.approx(np.array(written), rel=1e-9)
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("zeta", [0.0, 0.01, 0.5, 0.9])
def test_without_its_divisor_equation_4_has_few_finite_edges(zeta):
    distribution = Distribution.of(weights())
    edges = distribution.edges(9, zeta, "printed")
    for k, edge in enumerate(edges, start=1):
        upper = (k * (1 - zeta) + 1) / 2
        expected = distribution.mean + distribution.deviation * norm.ppf(upper) if upper < 1 else np.inf
        assert edge == pytest.approx(expected)
    assert np.isfinite(edges).sum() == (0 if zeta == 0 else 9 if zeta == 0.9 else 1)


@pytest.mark.parametrize("zeta", [1e-4, 0.01, 0.0123, 0.1, 0.5])
def test_the_last_gaussian_edge_is_the_threshold_of_equation_2(zeta):
    distribution = Distribution.of(weights())
    threshold = distribution.mean + distribution.deviation * norm.ppf(1 - zeta / 2)
    assert distribution.edges(7, zeta, "gaussian")[-1] == pytest.approx(threshold, rel=1e-9)


@given(zeta=st.floats(0, 0.5), quantiles=st.sampled_from(QUANTILES))
@settings(max_examples=200)
def test_the_last_edge_is_the_same_for_every_number_of_groups(zeta, quantiles):
    distribution = Distribution.of(weights())
    last = {distribution.edges(groups, zeta, quantiles)[-1] for groups in range(1, 64)}
    assert len(last) == 1


@pytest.mark.parametrize("quantiles", QUANTILES)
def test_nothing_lies_beyond_the_last_edge_when_nothing_is_salient(quantiles):
    distribution = Distribution.of(weights())
    assert distribution.edges(9, 0.0, quantiles)[-1] == np.inf
    assert distribution.bounds(distribution.edges(9, 0.0, quantiles))[-1] == 2000


@pytest.mark.parametrize("groups", [1, 3, 8, 15])
@pytest.mark.parametrize("zeta", [0.0, 0.01, 0.1])
def test_empirical_groups_hold_equal_counts(groups, zeta):
    weight = weights()
    distribution = Distribution.of(weight)
    assert np.unique(distribution.magnitudes).size == 2000  # no ties in this draw
    counts = np.diff(distribution.bounds(distribution.edges(groups, zeta, "empirical")))
    assert counts.sum() == round(2000 * (1 - zeta))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("quantiles", QUANTILES)
@pytest.mark.parametrize("groups", [1, 2, 9, 15])
@pytest.mark.parametrize("zeta", [0.0, 0.01, 0.3])
def test_means_and_errors_from_running_sums_are_those_of_the_groups(quantiles, groups, zeta):
    weight = weights()
    distribution = Distribution.of(weight)
    edges = distribution.edges(groups, zeta, quantiles)
    bounds = distribution.bounds(edges)
    members = naive_groups(weight, edges)
    assert np.diff(bounds).tolist() == [group.size for group in members]
    means = [group.mean() if group.size else 0.0 for group in members]
    errors = [np.square(group - mean).sum() for group, mean in zip(members, means, strict=True)]
    assert distribution.group_means(bounds) == pytest.approx(np.array(means), rel=1e-9)
    assert distribution.group_errors(bounds) == pytest.approx(np.array(errors), rel=1e-6, abs=1e-12)


@given(
    weight=st_np.arrays(np.float32, (4, 6), elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0])),
    groups=st.integers(1, 15),
    zeta=st.floats(0, 0.5),
    quantiles=st.sampled_from(QUANTILES),
)
@settings(max_examples=200)
def test_ties_and_empty_groups_are_counted_once(weight, groups, zeta, quantiles):
    distribution = Distribution.of(weight)
    edges = distribution.edges(groups, zeta, quantiles)
    bounds = distribution.bounds(edges)
    members = naive_groups(weight, np.maximum.accumulate(edges))
    assert np.diff(bounds).tolist() == [group.size for group in members]
    means = [group.mean() if group.size else 0.0 for group in members]
    assert distribution.group_means(bounds) == pytest.approx(np.array(means))
    assert (distribution.group_errors(bounds) >= 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1 / 3, 1e-20, 1e10])
@pytest.mark.parametrize("quantiles", QUANTILES)
@pytest.mark.parametrize("zeta", [0.0, 1e-300, 0.01])
def test_a_constant_matrix_has_edges_without_nan(value, quantiles, zeta):
    distribution = Distribution.of(np.full((30, 40), value, dtype=np.float32))
    assert distribution.deviation == pytest.approx(0, abs=1e-6 * abs(value))
    edges = distribution.edges(9, zeta, quantiles)
    assert not np.isnan(edges).any()
    assert (np.diff(edges) >= 0).all()
