"""One matrix: within its budget, and every ingredient worth its place on a matrix that gives it something to do."""

import itertools

import pytest
import torch

from methods import LayerStatistics
from methods.hessian import proxy_loss
from methods.sage_x.encoder import Pivots, encode_matrix, overhead_bytes, whole_bytes
from methods.sage_x.recipe import Recipe

ROWS, COLUMNS = 64, 96


@pytest.fixture(scope="module")
def layer():
    """A weight with outliers, and the Hessian of correlated inputs of unlike size."""
    generator = torch.Generator().manual_seed(5)
    weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)
    weight[::7, ::11] *= 6
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    sizes = torch.randn(COLUMNS, generator=generator).mul(0.7).exp()
    inputs = torch.randn(4, 400, COLUMNS, generator=generator) @ mix * sizes
    return weight, LayerStatistics.from_inputs(inputs).hessian


def lost(layer, budget=2.3, **options):
    weight, hessian = layer
    recipe = Recipe(**options)
    return proxy_loss(weight, encode_matrix(weight, Pivots.of(hessian, recipe), budget, recipe).decode(), hessian)


@pytest.mark.parametrize("budget", [1.1, 1.6, 2.2, 3.15, 4.16])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_stored_bits_are_within_the_budget_and_use_it_up(budget, calibrated, layer):
    weight, hessian = layer
    packed = encode_matrix(weight, Pivots.of(hessian, Recipe()) if calibrated else None, budget, Recipe())
    assert budget - 8 / COLUMNS < packed.payload_bits() <= budget
    roles = packed.bytes_by_role()
    assert roles["index"] + roles["scale"] == overhead_bytes(ROWS, COLUMNS, torch.float16)


def test_a_number_of_bytes_survives_its_way_through_bits_per_weight():
    size = 576 * 576
    budgets = {count: 8 * count / size * size for count in range(1000, 60000)}
    assert any(bits / 8 < count for count, bits in budgets.items())
    assert all(whole_bytes(bits) == count for count, bits in budgets.items())
    assert whole_bytes(8 * 1000.9) == 1000


def test_a_budget_of_so_many_bytes_is_used_to_the_last(layer):
    weight = layer[0][:, :90]
    size = weight.numel()
    lossy = [count for count in range(1400, 1600) if 8 * count / size * size / 8 < count]
    found = {count: encode_matrix(weight, None, 8 * count / size, Recipe()).nbytes() for count in lossy}
    assert any(used == count for count, used in found.items())  # not every number of bytes can be met
    for count, used in found.items():
        assert used == encode_matrix(weight, None, 8 * (count + 0.5) / size, Recipe()).nbytes()


def test_more_bits_lose_less(layer):
    losses = [lost(layer, budget) for budget in (1.3, 1.8, 2.3, 3.3, 4.3)]
    assert all(after < 0.8 * before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("ingredient", ["rotation", "rates", "feedback"])
def test_leaving_an_ingredient_out_loses_more(ingredient, layer):
    everything = sum(lost(layer, seed=seed) for seed in range(3))
    without = sum(lost(layer, seed=seed, without=frozenset({ingredient})) for seed in range(3))
    assert without > 1.03 * everything


def test_without_correlations_feedback_changes_nothing(layer):
    weight, _ = layer
    diagonal = torch.linspace(3, 1, COLUMNS).diag()
    recipes = Recipe(), Recipe(without=frozenset({"feedback"}))
    first, second = (encode_matrix(weight, Pivots.of(diagonal, recipe), 2.3, recipe) for recipe in recipes)
    assert torch.equal(first.decode(), second.decode())


def test_without_a_hessian_the_error_is_that_of_the_codes(layer):
    weight, _ = layer
    packed = encode_matrix(weight, None, 3.4, Recipe())
    error = float((packed.decode() - weight).square().sum() / weight.square().sum())
    assert error < 0.025  # 3.05 bits are left for the codes; a scalar quantizer of 3 bits loses 0.0345


def test_without_a_hessian_large_inputs_get_the_better_columns(layer):
    weight, _ = layer
    inputs = torch.linspace(-2, 2, COLUMNS).exp()
    alike, told = (encode_matrix(weight, None, 2.3, Recipe(), inputs=known) for known in (None, inputs))
    lost = [float(((packed.decode() - weight).square() * inputs).sum()) for packed in (alike, told)]
    assert lost[1] < 0.9 * lost[0]
    assert told.payload_bits() <= 2.3
    same = encode_matrix(weight, None, 2.3, Recipe(), inputs=torch.full((COLUMNS,), 0.25))
    assert torch.equal(same.decode(), alike.decode())


def test_dead_inputs_take_no_bits(layer):
    weight, hessian = layer
    hessian = hessian.clone()
    hessian[:, 10:13] = 0
    hessian[10:13] = 0
    packed = encode_matrix(weight, Pivots.of(hessian, Recipe()), 2.3, Recipe())
    assert packed.classes()[10:13].tolist() == [0, 0, 0]
    assert not packed.decode()[:, 10:13].any()
