"""sage-x as a method: options, what it claims."""

import pytest
import torch

from kernels.errors import InputError
from methods import LayerStatistics, create_method


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(5)
    weight = 0.02 * torch.randn(64, 96, generator=generator)
    weight[::7, ::11] *= 6
    return weight, LayerStatistics.from_inputs(torch.randn(2, 300, 96, generator=generator))


def test_the_claim_is_what_is_stored(layer):
    weight, statistics = layer
    for options in ({}, {"mode": "weights-only"}, {"budget": 3.15}):
        method = create_method("sage-x", **options)
        packed = method.quantize_linear(weight, statistics)
        nominal = method.nominal_bits(packed)
        assert nominal.weight + nominal.scale == pytest.approx(packed.payload_bits(), abs=1e-12)
        assert packed.payload_bits() <= method.config.budget


@pytest.mark.parametrize("budget", [2.2, 3.15, 4.16])
def test_weights_only_beats_rounding_to_nearest_with_more_bits(budget, layer):
    weight, _ = layer
    mine = create_method("sage-x", mode="weights-only", budget=budget).quantize_linear(weight)
    rounded = create_method("rtn", bits=int(budget), group_size=32).quantize_linear(weight)
    assert rounded.payload_bits() > mine.payload_bits()
    assert (mine.decode() - weight).norm() < 0.9 * (rounded.decode() - weight).norm()


def test_the_seed_changes_the_rotation_alone(layer):
    weight, statistics = layer
    first, second = (create_method("sage-x", seed=seed).quantize_linear(weight, statistics) for seed in (0, 1))
    assert first.nbytes() == pytest.approx(second.nbytes(), abs=16)
    assert torch.allclose(first.row_scales().abs().float(), second.row_scales().abs().float(), rtol=0.1)
    assert not torch.equal(first.row_scales(), second.row_scales())


@pytest.mark.parametrize("tuning", ["scales", "blocks", "model"])
def test_nothing_is_trained_without_data(tuning):
    with pytest.raises(InputError, match=f"tuning='{tuning}' needs text, and mode='weights-only' has none"):
        create_method("sage-x", mode="weights-only", tuning=tuning)


def test_a_budget_that_does_not_pay_for_the_scales_is_refused():
    with pytest.raises(InputError, match=r"budget=1 bits per weight is less than the .* bits that the scales"):
        create_method("sage-x", budget=1.0).check_shape(16, 17)
    with pytest.raises(InputError, match="budget"):
        create_method("sage-x", budget=0.9)
    with pytest.raises(InputError, match="out_features=8"):
        create_method("sage-x").check_shape(8, 96)
