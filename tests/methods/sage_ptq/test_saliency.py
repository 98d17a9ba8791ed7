"""Which weights are salient."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm

from methods import LayerStatistics
from methods.hessian import damped
from methods.sage_ptq.distribution import Distribution
from methods.sage_ptq.saliency import HessianSaliency, MagnitudeSaliency, NoSaliency, PrintedSaliency


def weights(seed=0, shape=(60, 80)):
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("zeta", [0.001, 0.01, 0.1, 0.5])
def test_by_magnitude_it_is_equation_2(zeta):
    weight = weights()
    mask = MagnitudeSaliency(weight, Distribution.of(weight), "gaussian").mask(zeta)
    threshold = weight.mean(dtype=np.float64) + weight.std(dtype=np.float64) * norm.ppf(1 - zeta / 2)
    assert np.array_equal(mask, np.abs(weight) > threshold)
    # The weights are Gaussian, so about zeta of them: within five standard deviations of the count.
    assert mask.mean() == pytest.approx(zeta, abs=5 * np.sqrt(zeta / weight.size))


def test_heavy_tails_let_more_than_zeta_through():
    weight = (0.02 * np.random.default_rng(0).standard_t(4, (60, 80))).astype(np.float32)
    assert MagnitudeSaliency(weight, Distribution.of(weight), "gaussian").mask(0.01).mean() > 0.012


@pytest.mark.parametrize("zeta", [0.01, 0.1, 0.25])
def test_by_empirical_quantiles_it_is_the_largest_weights(zeta):
    weight = weights()
    mask = MagnitudeSaliency(weight, Distribution.of(weight), "empirical").mask(zeta)
    assert mask.sum() == round(zeta * weight.size)
    assert np.abs(weight)[mask].min() > np.abs(weight)[~mask].max()


@pytest.mark.parametrize("score", ["factor", "inverse", "inverse-squared"])
@pytest.mark.parametrize("zeta", [0.0, 0.01, 0.1, 0.25])
def test_by_hessian_it_is_the_largest_scores(zeta, score):
    weight = weights()
    torch.manual_seed(0)
    statistics = LayerStatistics.from_inputs(torch.randn(2, 200, 80) * torch.linspace(0.1, 3, 80))
    factor = statistics.inverse_factor(0.01)
    inverse = torch.linalg.inv(damped(statistics.hessian, 0.01)[0].double()).diagonal()
    divisors = {"factor": factor.diagonal().square(), "inverse": inverse, "inverse-squared": inverse.square()}
    scores = np.square(weight.astype(np.float64)) / divisors[score].double().numpy()
    mask = HessianSaliency(weight, factor.upper, score).mask(zeta)
    assert mask.sum() == round(zeta * weight.size)
    if zeta:
        assert scores[mask].min() >= (1 - 1e-5) * scores[~mask].max()
        assert mask[:, 60:].sum() > mask[:, :20].sum()  # loud inputs


def test_more_zeta_never_takes_a_salient_weight_away():
    weight = weights()
    factor = torch.diag(torch.linspace(1, 2, 80))
    distribution = Distribution.of(weight)
    for saliency in (
        MagnitudeSaliency(weight, distribution, "gaussian"),
        MagnitudeSaliency(weight, distribution, "empirical"),
        HessianSaliency(weight, factor),
    ):
        masks = [saliency.mask(zeta) for zeta in (0.0, 0.003, 0.01, 0.07, 0.3, 0.5)]
        assert not masks[0].any()
        for smaller, larger in pairwise(masks):
            assert not (smaller & ~larger).any()
            assert larger.sum() > smaller.sum()


@pytest.mark.parametrize("zeta", [0.0, 0.001, 0.01, 0.1, 0.5])
def test_equation_2_to_the_letter_has_a_negative_threshold(zeta):
    weight = weights()
    assert PrintedSaliency(weight, Distribution.of(weight)).mask(zeta).all()
    # It is a threshold all the same: where the mean is far from zero it separates.
    shifted = weight + np.float32(0.05)
    mask = PrintedSaliency(shifted, Distribution.of(shifted)).mask(zeta)
    threshold = shifted.mean(dtype=np.float64) + shifted.std(dtype=np.float64) * norm.ppf(zeta / 2)
    assert np.array_equal(mask, np.abs(shifted) > threshold)
    assert not (zeta == 0.5 and mask.all())


def test_equation_4_to_the_letter_keeps_the_threshold_of_equation_2():
    weight = weights()
    masks = [MagnitudeSaliency(weight, Distribution.of(weight), form).mask(0.02) for form in ("gaussian", "printed")]
    assert np.array_equal(*masks)


def test_without_saliency_nothing_is_salient():
    assert not NoSaliency(weights()).mask(0.5).any()
    assert NoSaliency(weights()).mask(0.5).shape == (60, 80)
