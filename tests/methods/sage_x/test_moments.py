"""Targets that make good the errors of earlier layers: the algebra, and the order in which a block runs."""

import pytest
import small_block
import torch

from kernels.errors import InputError
from methods.sage_x.moments import GroupMoments, Original, group_moments, watching


@pytest.fixture
def view():
    return small_block.view()


def moments(x, y):
    return GroupMoments(y.T @ y / len(y), x.T @ y / len(y))


@pytest.fixture
def pair():
    """Inputs in the unquantized and in the quantized model, and a weight."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 24, generator=generator)
    y = x + 0.4 * torch.randn(500, 24, generator=generator) @ torch.randn(24, 24, generator=generator) / 5
    return x, y, torch.randn(16, 24, generator=generator)


def test_for_any_quantized_weight_the_loss_is_its_distance_from_the_target_and_a_constant(pair):
    x, y, weight = pair
    found = moments(x, y)
    target = found.target(weight, damping=1e-7, strength=1.0)

    def loss(q):
        return float((x @ weight.T - y @ q.T).square().sum() / len(x))

    def distance(q):
        return float((((q - target) @ found.hessian) * (q - target)).sum())

    constant = loss(target)
    for seed in range(3):
        q = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        assert loss(q) == pytest.approx(distance(q) + constant, rel=1e-4)
    assert constant < 0.9 * loss(weight)


def test_the_target_is_the_weight_where_nothing_was_lost_and_at_strength_zero(pair):
    x, y, weight = pair
    assert torch.allclose(moments(x, x).target(weight, 0.01, 1.0), weight, atol=1e-5)
    assert torch.equal(moments(x, y).target(weight, 0.01, 0.0), weight)


def test_strength_goes_part_of_the_way(pair):
    x, y, weight = pair
    whole, half = (moments(x, y).target(weight, 0.01, strength) for strength in (1.0, 0.5))
    assert torch.allclose(half, (weight + whole) / 2, atol=1e-5)


def test_dead_inputs_do_not_pull(pair):
    x, y, weight = pair
    x, y = x.clone(), y.clone()
    y[:, 3] = 0
    target = moments(x, y).target(weight, 0.01, 1.0)
    assert torch.isfinite(target).all()
    assert torch.allclose(target[:, 3], weight[:, 3])


def test_groups_are_layers_that_read_one_tensor_in_the_order_in_which_they_run(view):
    original = Original.of(view)
    assert original.groups == (("gate", "up"), ("down",))
    assert torch.allclose(original.outputs, view.block(view.unquantized))
    assert len(original.inputs[0]) == len(view.hidden)
    assert torch.allclose(original.inputs[0][3], view.block.norm(view.unquantized)[3])


def test_moments_are_those_of_both_models_inputs(view):
    original = Original.of(view)
    found = group_moments(view, original, 0, None)
    x = view.block.norm(view.unquantized).reshape(-1, small_block.HIDDEN)
    y = view.block.norm(view.hidden).reshape(-1, small_block.HIDDEN)
    assert torch.allclose(found.hessian, y.T @ y / len(y), atol=1e-5)
    assert torch.allclose(found.cross, x.T @ y / len(y), atol=1e-5)


def test_a_token_counts_as_often_as_its_weight_says(view):
    weights = torch.zeros(view.hidden.shape[:2])
    weights[:2] = 4
    weighted = group_moments(view, Original.of(view), 0, weights)
    y = view.block.norm(view.hidden[:2]).reshape(-1, small_block.HIDDEN)
    assert torch.allclose(weighted.hessian, y.T @ y / len(y), atol=1e-5)


def test_later_groups_see_what_the_earlier_ones_have_become(view):
    original = Original.of(view)
    before = group_moments(view, original, 1, None)
    view.linears["gate"].weight.mul_(0.5)
    after = group_moments(view, original, 1, None)
    assert not torch.allclose(before.hessian, after.hessian, rtol=0.05)


def test_a_layer_that_does_not_see_every_token_is_refused(view):
    view.block.forward = lambda x: x + view.block.down(torch.nn.functional.silu(view.block.gate(x)))
    with pytest.raises(InputError, match="needs layers that see every token once; up does not"):
        Original.of(view)


def test_watching_leaves_no_hooks(view):
    with watching(view.linears, lambda name, x: None):
        assert all(linear._forward_pre_hooks for linear in view.linears.values())
    assert not any(linear._forward_pre_hooks for linear in view.linears.values())
