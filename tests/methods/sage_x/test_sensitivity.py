"""What an error in a layer costs: gradients of a tiny model, and a budget shared by all layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels.errors import NumericalError
from methods import ModelView
from methods.sage_x.allocation import CAP, column_prices, matrix_budgets
from methods.sage_x.encoder import Pivots, encode_matrix
from methods.sage_x.recipe import Recipe
from methods.sage_x.sensitivity import Sensitivity, measure

VOCABULARY, HIDDEN = 24, 32


class Output:
    def __init__(self, logits):
        self.logits = logits


class TinyModel(nn.Module):
    """Embedding, two linear layers of which the second is followed by a small gain, head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.loud = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.quiet = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids, use_cache=False):
        x = self.embed(ids)
        x = x + torch.tanh(self.loud(x))
        return Output(self.head(x + 0.05 * self.quiet(x)))


@pytest.fixture(scope="module")
def view():
    model = TinyModel()
    windows = torch.randint(0, VOCABULARY, (6, 64), generator=torch.Generator().manual_seed(1))
    return ModelView(model, {"loud": model.loud, "quiet": model.quiet}, windows)


@pytest.fixture(scope="module")
def found(view):
    return measure(view, seed=0)


def divergence(view, before):
    after = view.model(view.windows).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_shapes_and_that_weights_have_mean_one(view, found):
    for entry in found.values():
        assert entry.hessian.shape == (HIDDEN, HIDDEN)
        assert entry.importance.shape == (HIDDEN,)
        assert entry.token_weights.shape == view.windows.shape
        assert float(entry.token_weights.mean()) == pytest.approx(1, abs=1e-5)


def test_a_token_counts_by_the_size_of_its_gradient(view, found):
    sizes = []

    def watch(module, args, output):
        output.register_hook(lambda gradient: sizes.append(gradient[0].norm(dim=1)))

    handle = view.linears["loud"].register_forward_hook(watch)
    try:
        measure(view, seed=0)
    finally:
        handle.remove()
    sizes = torch.stack(sizes)
    assert torch.allclose(found["loud"].token_weights, sizes / sizes.mean(), rtol=1e-4)


def test_the_layer_behind_a_small_gain_is_less_sensitive(found):
    assert float(found["quiet"].importance.mean()) < 0.05 * float(found["loud"].importance.mean())


def test_the_predicted_divergence_is_the_measured_one(view, found):
    """Half the trace of diag(importance) E H E^T, for a small random error."""
    with torch.no_grad():
        before = view.model(view.windows).logits.log_softmax(-1)
        for name, linear in view.linears.items():
            kept = linear.weight.clone()
            predicted = measured = 0.0
            for seed in range(8):
                error = 0.01 * torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed))
                linear.weight.copy_(kept + error)
                measured += divergence(view, before)
                cost = (error @ found[name].hessian * error).sum(dim=1)
                predicted += 0.5 * float(cost @ found[name].importance)
            linear.weight.copy_(kept)
            assert predicted == pytest.approx(measured, rel=0.25)


def test_the_model_is_left_as_it_was(view):
    measure(view, seed=0)
    assert all(parameter.grad is None for parameter in view.model.parameters())
    assert not any(module._forward_hooks for module in view.model.modules())


def test_a_model_that_overflows_is_refused_in_words(view):
    head = view.model.head.weight
    kept = head.clone()
    head[3] = float("inf")
    with pytest.raises(NumericalError, match="logits overflow on calibration text"):
        measure(view, seed=0)
    head.copy_(kept)


def test_measuring_is_seeded(view, found):
    again = measure(view, seed=0)
    assert torch.equal(again["loud"].hessian, found["loud"].hessian)


@pytest.mark.parametrize("budget", [1.6, 2.2, 3.15])
def test_the_model_s_budget_is_kept_and_goes_where_errors_hurt(view, found, budget):
    weights = {name: linear.weight for name, linear in view.linears.items()}
    recipe = Recipe()
    budgets = matrix_budgets(weights, found, budget, recipe)
    assert budgets["loud"] > budgets["quiet"] + 1
    stored = sum(
        encode_matrix(weights[name], Pivots.of(found[name].hessian, recipe), bits, recipe).nbytes()
        for name, bits in budgets.items()
    )
    size = sum(weight.numel() for weight in weights.values())
    assert budget - 0.1 < 8 * stored / size <= budget


def three_unlike_layers():
    """Three layers with importances far apart, the largest one in the middle."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"dear": (64, 96), "plain": (128, 96), "cheap": (64, 96)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    importance = {"dear": 100.0, "plain": 1.0, "cheap": 0.01}
    sensitivities = {
        name: Sensitivity(torch.eye(96), torch.full((shapes[name][0],), value), torch.ones(1, 1))
        for name, value in importance.items()
    }
    return weights, sensitivities


@pytest.mark.parametrize("budget", [1.3, 1.9])
def test_below_two_bits_no_layer_is_far_from_the_mean(budget):
    weights, sensitivities = three_unlike_layers()
    free = matrix_budgets(weights, sensitivities, budget, Recipe(without=frozenset({"cap"})))
    assert free["dear"] > budget + CAP
    assert free["cheap"] < budget - CAP
    capped = matrix_budgets(weights, sensitivities, budget, Recipe())
    assert list(capped) == list(weights)
    assert capped["dear"] == budget + CAP
    assert capped["cheap"] == pytest.approx(budget - CAP, abs=0.02)
    assert capped["dear"] > capped["plain"] > capped["cheap"]
    size = {name: weight.numel() for name, weight in weights.items()}
    used = sum(capped[name] * size[name] for name in weights) / sum(size.values())
    assert budget - 0.02 < used <= budget


def test_what_the_cap_leaves_is_shared_at_one_slope_by_the_layers_inside_it():
    weights, sensitivities = three_unlike_layers()
    sensitivities["cheap"] = replace(sensitivities["cheap"], importance=torch.full((64,), 0.7))
    recipe, budget = Recipe(), 1.5
    capped = matrix_budgets(weights, sensitivities, budget, recipe)
    assert capped["dear"] == budget + CAP
    rest = {name: weights[name] for name in ("plain", "cheap")}
    size = sum(weight.numel() for weight in weights.values())
    left = (budget * size - capped["dear"] * weights["dear"].numel()) / sum(weight.numel() for weight in rest.values())
    alone = matrix_budgets(rest, sensitivities, left, Recipe(without=frozenset({"cap"})))
    assert {name: capped[name] for name in rest} == alone


def test_from_two_bits_on_nothing_is_capped():
    weights, sensitivities = three_unlike_layers()
    free = Recipe(without=frozenset({"cap"}))
    found = matrix_budgets(weights, sensitivities, 2.2, Recipe())
    assert found == matrix_budgets(weights, sensitivities, 2.2, free)
    assert found["dear"] > 2.2 + CAP


def test_column_prices_add_up_to_what_leaving_the_columns_out_costs_with_feedback(view, found):
    weight, recipe = view.linears["loud"].weight, Recipe(without=frozenset({"feedback", "order"}))
    prices = column_prices(weight, found["loud"], recipe)
    error = weight
    diagonal = found["loud"].hessian.diagonal() * 1.01
    direct = 0.5 * float((error.square() * diagonal).sum(dim=1) @ found["loud"].importance)
    # Rotated noise meets every output alike: equal up to the balance of the rows.
    assert float(prices.sum()) == pytest.approx(direct, rel=0.3)
