"""Balanced rows and the rotation of the outputs."""

import pytest
import torch

from kernels.hadamard import rotate
from methods.sage_x.recipe import Recipe
from methods.sage_x.rotation import rotated, row_scales


def heavy_rows(seed=0):
    """Weights whose rows differ in size, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 48, generator=generator) * torch.randn(64, 1, generator=generator).exp()
    weight[::9, ::7] *= 8
    return weight


def restored(target, scales):
    return rotate(target.T.contiguous(), inverse=True).T * scales.float()[:, None]


def test_rotating_back_gives_the_weight():
    weight, recipe = heavy_rows(), Recipe()
    scales = row_scales(weight, recipe)
    assert torch.allclose(restored(rotated(weight, scales, recipe), scales), weight, atol=1e-4)
    plain = Recipe(without=frozenset({"rotation"}))
    assert torch.allclose(rotated(weight, scales, plain) * scales.float()[:, None], weight, atol=1e-4)


def test_columns_become_gaussian():
    weight, recipe = heavy_rows(), Recipe()
    target = rotated(weight, row_scales(weight, recipe), recipe)

    def kurtosis(x):
        x = x / x.square().mean(dim=0).sqrt()
        return float(x.pow(4).mean())

    assert kurtosis(weight) > 6
    assert kurtosis(target) < 3.4


def test_the_largest_column_has_room_above_it():
    weight, recipe = heavy_rows(), Recipe()
    sizes = rotated(weight, row_scales(weight, recipe), recipe).square().mean(dim=0).sqrt()
    assert float(sizes.max()) == pytest.approx(1 / 8, rel=1e-2)


def test_balancing_by_the_fourth_root_loses_least():
    """Noise spread evenly over rotated rows costs sum of scale^2 times the energy of the balanced weight."""
    weight, recipe = heavy_rows(), Recipe()
    norms = weight.square().sum(dim=1)

    def cost(scales):
        return float(scales.square().sum() * (norms / scales.square()).sum())

    mine = cost(row_scales(weight, recipe).float())
    assert mine == pytest.approx(float(norms.sqrt().sum() ** 2), rel=1e-2)
    assert mine < 0.8 * cost(torch.ones(64))
    assert cost(torch.ones(64)) == pytest.approx(cost(norms.sqrt()), rel=1e-3)


def test_important_outputs_get_smaller_errors():
    weight, recipe = heavy_rows(), Recipe()
    importance = torch.ones(64)
    importance[:8] = 16
    ratio = row_scales(weight, recipe, importance).float().abs() / row_scales(weight, recipe).float().abs()
    assert float(ratio[8:].mean() / ratio[:8].mean()) == pytest.approx(2, rel=1e-2)


def test_signs_are_drawn_from_the_seed_and_zero_rows_stay_zero():
    weight = heavy_rows()
    weight[5] = 0
    first, second, other = (row_scales(weight, Recipe(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert 10 < int((first.sign() != other.sign()).sum()) < 54
    assert first[5] == 0
    assert not restored(rotated(weight, first, Recipe()), first)[5].any()
