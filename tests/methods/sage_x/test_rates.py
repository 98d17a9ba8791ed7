"""Water-filling over rate classes: within the budget, and at one slope."""

import itertools

import pytest
import torch

from kernels.layouts.trellis_tables import RATES, distortions
from methods.sage_x.rates import assign_classes, class_bytes, share_budget

ROWS = 64


def spread_prices(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp()


def loss(prices, classes):
    return float((prices.double() * torch.tensor(distortions(), dtype=torch.float64)[classes]).sum())


def used(classes, rows=ROWS):
    return float(class_bytes(rows)[classes].sum())


@pytest.mark.parametrize("bits", [0.3, 1.06, 2.16, 3.11, 5.0])
def test_the_budget_is_met_to_within_one_step_of_one_column(bits):
    prices = spread_prices(100)
    budget = bits * ROWS * 100 / 8
    classes = assign_classes(prices, ROWS, budget)
    assert budget - ROWS / 8 < used(classes) <= budget


def test_dearer_columns_get_no_fewer_bits():
    prices = spread_prices(100)
    classes = assign_classes(prices, ROWS, 2.16 * ROWS * 100 / 8)
    in_order = classes[prices.argsort()]
    # The last bytes go where they fit: a single column may stand one class off.
    assert (in_order[1:] - in_order[:-1] >= -1).all()
    assert in_order[-1] > in_order[0]


def test_no_exchange_of_a_class_between_two_columns_lowers_the_loss():
    prices = spread_prices(12)
    classes = assign_classes(prices, ROWS, 2.2 * ROWS * 12 / 8)
    best, size = loss(prices, classes), used(classes)
    for up, down in itertools.permutations(range(12), 2):
        other = classes.clone()
        other[up] += 1
        other[down] -= 1
        if other.max() < len(RATES) and other.min() >= 0 and used(other) <= size:
            assert loss(prices, other) >= best - 1e-12


def test_it_is_as_good_as_trying_everything():
    prices = torch.tensor([0.1, 0.5, 1.0, 4.0])
    budget = 1.5 * ROWS * 4 / 8
    classes = assign_classes(prices, ROWS, budget)
    choices = torch.tensor(list(itertools.product(range(8), repeat=4)))
    allowed = [choice for choice in choices if used(choice) <= budget]
    assert loss(prices, classes) <= 1.05 * min(loss(prices, choice) for choice in allowed)


def test_columns_without_price_get_nothing():
    prices = torch.tensor([0.0, 1.0, 0.0, 1.0])
    classes = assign_classes(prices, ROWS, 1.0 * ROWS * 4 / 8)
    assert classes.tolist()[0::2] == [0, 0]
    assert not assign_classes(torch.zeros(5), ROWS, 1000.0).any()


@pytest.mark.parametrize("unit", [2.0**-80, 2.0**-40, 2.0**40])
def test_only_the_ratios_of_prices_matter(unit):
    prices = spread_prices(100)
    budget = 2.16 * ROWS * 100 / 8
    assert torch.equal(assign_classes(unit * prices, ROWS, budget), assign_classes(prices, ROWS, budget))


def test_equal_prices_share_a_budget_that_fits_evenly():
    assert assign_classes(torch.ones(7), ROWS, 2.0 * ROWS * 7 / 8).tolist() == [RATES.index(2.0)] * 7


def test_matrices_that_share_a_budget_stand_at_one_slope():
    first, second = spread_prices(50), 16 * spread_prices(50)
    rows = [ROWS, ROWS]
    shared = share_budget([first, second], rows, 2.5 * ROWS * 100 / 8)
    assert sum(used(classes) for classes in shared) <= 2.5 * ROWS * 100 / 8
    # Sixteen times the price is two bits more.
    rates = torch.tensor(RATES)
    assert float(rates[shared[1]].mean() - rates[shared[0]].mean()) == pytest.approx(2, abs=0.25)
