import numpy as np
import pytest
import torch
from scipy.stats import norm

from harness.metrics.weight_distribution import BINS, SPAN, weight_distribution


def test_every_weight_is_counted_once():
    torch.manual_seed(0)
    weight = torch.randn(300, 200) ** 3
    found = weight_distribution(weight)
    assert len(found["counts"]) == BINS
    assert sum(found["counts"]) + found["below"] + found["above"] == weight.numel()
    assert found["below"] > 0 and found["above"] > 0


def test_mean_deviation_and_counts_are_those_of_numpy():
    torch.manual_seed(1)
    weight = 0.02 * torch.randn(128, 64) + 0.003
    found = weight_distribution(weight)
    values = weight.double().numpy().ravel()
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert found["std"] == pytest.approx(values.std(), rel=1e-6)
    counts, _ = np.histogram((values - values.mean()) / values.std(), BINS, (-SPAN, SPAN))
    assert np.abs(counts - found["counts"]).sum() <= 2  # a weight on an edge may fall to either side


def test_a_gaussian_has_next_to_no_divergence_and_heavy_tails_have_more():
    torch.manual_seed(2)
    gaussian = weight_distribution(torch.randn(1000, 500))
    laplace = weight_distribution(torch.distributions.Laplace(0.0, 1.0).sample((1000, 500)))
    assert gaussian["kl"] < 1e-3
    assert abs(gaussian["excess_kurtosis"]) < 0.05
    assert laplace["excess_kurtosis"] == pytest.approx(3.0, abs=0.3)
    assert laplace["kl"] > 50 * gaussian["kl"]


def test_the_divergence_is_the_sum_over_bins_and_tails():
    torch.manual_seed(3)
    found = weight_distribution(torch.rand(400, 100))
    counts = np.array([found["below"], *found["counts"], found["above"]])
    edges = np.concatenate([[-np.inf], np.linspace(-SPAN, SPAN, BINS + 1), [np.inf]])
    expected = np.diff(norm.cdf(edges))
    shares = counts / counts.sum()
    by_hand = sum(p * np.log(p / q) for p, q in zip(shares, expected, strict=True) if p)
    assert found["kl"] == pytest.approx(by_hand, rel=1e-9)


def test_a_constant_matrix_has_no_divergence():
    found = weight_distribution(torch.full((4, 4), 0.5, dtype=torch.bfloat16))
    assert found["kl"] is None and found["excess_kurtosis"] is None
    assert sum(found["counts"]) == 16
