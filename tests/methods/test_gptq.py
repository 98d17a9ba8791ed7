"""GPTQ: equal to the released code, and the identities that any right implementation obeys."""

import itertools
from pathlib import Path

import pytest
import torch

from methods import LayerContext, LayerStatistics, create_method
from methods.compensation import compensate_columns
from methods.hessian import damped, factorize, proxy_loss

CASES = sorted(path.stem for path in (Path(__file__).parents[1] / "golden").glob("gptq*.json"))


def layer(rows=48, columns=256, seed=0):
    """A weight and the statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4, 256, columns, generator=generator) @ mix
    x = x * torch.exp(0.5 * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), LayerStatistics.from_inputs(x)


def gptq(weight, statistics, context=None, **options):
    return create_method("gptq", **options).quantize_linear(weight, statistics, context)


def share_changed(packed, other):
    return float((packed.codes() != other.codes()).float().mean())


# Parity with the released code


def test_there_are_golden_vectors():
    assert len(CASES) == 11
    assert {"gptq3-g128-act-2", "gptq3-g128-act-static-0", "gptq4-g64-0", "gptq3-row-0", "gptq2-g128-1"} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_released_code(golden, case):
    name, _, number = case.rpartition("-")
    vector = golden(name, int(number))
    options = vector.options
    packed = gptq(
        vector.weight,
        vector.statistics,
        bits=options["bits"],
        group_size=options["groupsize"],
        symmetric=options["sym"],
        act_order=options["actorder"],
        static_groups=options["static_groups"],
        damping=options["percdamp"],
        block_size=options["blocksize"],
        faithful=True,
        scale_dtype="float32",
    )
    decoded = packed.decode()
    # Near-ties flip with the last bit of the arithmetic: up to 0.05 % of the entries when H changes by 1e-6.
    assert vector.mismatch(decoded) <= 0.001
    error, hessian = (vector.weight - decoded).double(), vector.statistics.hessian.double()
    assert float(((error @ hessian) * error).sum()) == pytest.approx(vector.proxy_loss, rel=1e-4)


# Identities


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product([2, 3, 4], [-1, 128, 32])))
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_uncorrelated_inputs_gptq_is_rtn_bit_for_bit(bits, group_size, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    packed = gptq(weight, LayerStatistics.from_hessian(torch.eye(256)), **options)
    rounded = create_method("rtn", **options).quantize_linear(weight)
    assert packed.tensors().keys() == rounded.tensors().keys()
    assert all(torch.equal(tensor, rounded.tensors()[name]) for name, tensor in packed.tensors().items())


class Weird:
    """A rounding rule that no one would use: coarse steps that differ by column and row, and some columns random."""

    def __init__(self, rows):
        self._generator = torch.Generator().manual_seed(7)
        self._steps = 0.3 + torch.rand(rows, generator=self._generator)

    def begin_column(self, column, columns):
        self._scale = 0.1 + column % 5

    def round_column(self, column, values):
        if column % 11 == 0:
            return torch.randn(values.shape, generator=self._generator)
        return torch.floor(values / (self._steps * self._scale)) * self._steps * self._scale + 0.05


@pytest.mark.parametrize("block_size", [1, 7, 128, 1000])
@pytest.mark.parametrize("dead", [False, True])
def test_the_sum_of_squared_errors_is_the_loss_whatever_the_rounding_rule(block_size, dead):
    weight, statistics = layer()
    hessian = statistics.hessian.clone()
    if dead:
        hessian[9, :] = hessian[:, 9] = 0
    factor = factorize(hessian, 0.01)
    before = weight.clone()
    quantized, squared = compensate_columns(weight, factor.upper, Weird(weight.shape[0]), block_size)
    error = (weight - quantized).double()
    matrix = damped(hessian, 0.01)[0].double()
    assert squared == pytest.approx(float(((error @ matrix) * error).sum()), rel=1e-4)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"group_size": -1}, {"symmetric": True}], ids=str)
def test_the_squared_error_in_the_log_is_the_loss_on_the_damped_hessian(options):
    weight, statistics = layer()
    context = LayerContext()
    decoded = gptq(weight, statistics, context, bits=3, scale_dtype="float32", **options).decode()
    error = (weight - decoded).double()
    matrix = damped(statistics.hessian, 0.01)[0].double()
    assert context.facts["squared_error"] == pytest.approx(float(((error @ matrix) * error).sum()), rel=1e-4)


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product([2, 3, 4], [-1, 128, 32])))
def test_with_correlated_inputs_gptq_loses_less_than_rtn(bits, group_size):
    weight, statistics = layer()
    options = {"bits": bits, "group_size": group_size}
    compensated = proxy_loss(weight, gptq(weight, statistics, **options).decode(), statistics.hessian)
    rounded = create_method("rtn", **options).quantize_linear(weight).decode()
    assert compensated < 0.9 * proxy_loss(weight, rounded, statistics.hessian)


def test_one_bit_between_minimum_and_maximum_is_a_strawman():
    torch.manual_seed(0)
    weight = torch.randn(64, 1024)
    packed = gptq(weight, LayerStatistics.from_hessian(torch.eye(1024)), bits=1, group_size=-1)
    assert float((packed.decode() == 0).float().mean()) >= 0.99


# Groups and blocks


def test_groups_inside_a_block_are_fitted_on_stale_weights_by_the_released_code_alone():
    weight, statistics = layer()
    corrected, stale = (
        gptq(weight, statistics, bits=3, group_size=32, faithful=faithful) for faithful in (False, True)
    )
    # The first group of each block of 128 is fitted on the same weights, the other three are not.
    assert torch.equal(corrected.scales()[:, 0], stale.scales()[:, 0])
    assert not torch.equal(corrected.scales()[:, 1], stale.scales()[:, 1])
    losses = [proxy_loss(weight, packed.decode(), statistics.hessian) for packed in (corrected, stale)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("group_size", [128, 256, -1])
def test_groups_of_whole_blocks_are_the_same_either_way(group_size):
    weight, statistics = layer()
    corrected, stale = (
        gptq(weight, statistics, bits=3, group_size=group_size, faithful=faithful) for faithful in (False, True)
    )
    assert torch.equal(corrected.decode(), stale.decode())


@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_block_size_changes_nothing_but_speed(block_size, group_size):
    weight, statistics = layer()
    by_column = gptq(weight, statistics, group_size=group_size, block_size=1)
    # Sums in another order: near-ties may flip.
    assert share_changed(gptq(weight, statistics, group_size=group_size, block_size=block_size), by_column) < 0.002


def test_a_group_that_straddles_blocks_is_fitted_on_weights_as_they_stand():
    weight, statistics = layer(rows=24, columns=576)
    options = {"bits": 3, "group_size": 192}
    by_column = gptq(weight, statistics, block_size=1, **options)
    assert share_changed(gptq(weight, statistics, block_size=128, **options), by_column) < 0.002
    # The released code fits such a group on weights that lack a block's updates, and that does show.
    assert share_changed(gptq(weight, statistics, block_size=128, faithful=True, **options), by_column) > 0.01


def test_static_groups_are_the_grids_of_rtn():
    weight, statistics = layer()
    for act_order in (False, True):
        packed = gptq(weight, statistics, bits=3, static_groups=True, act_order=act_order)
        rounded = create_method("rtn", bits=3).quantize_linear(weight)
        assert torch.equal(packed.scales(), rounded.scales())
        assert torch.equal(packed.zeros(), rounded.zeros())
        assert not torch.equal(packed.codes(), rounded.codes())


# Order of columns


def test_act_order_stores_columns_by_decreasing_hessian_diagonal():
    weight, statistics = layer()
    packed = gptq(weight, statistics, act_order=True)
    diagonal = statistics.hessian.diagonal()[packed.permutation()]
    assert (diagonal[:-1] >= diagonal[1:]).all()
    assert not torch.equal(packed.permutation(), torch.arange(256))


def test_static_groups_need_no_permutation():
    weight, statistics = layer()
    packed = gptq(weight, statistics, act_order=True, static_groups=True)
    assert packed.permutation() is None
    assert "permutation" not in packed.bytes_by_role()
    # And it is the order that was used, not ignored.
    assert not torch.equal(packed.codes(), gptq(weight, statistics, static_groups=True).codes())


@pytest.mark.parametrize("group_size", [64, -1])
def test_act_order_is_gptq_on_columns_in_that_order(group_size):
    weight, statistics = layer()
    packed = gptq(weight, statistics, act_order=True, group_size=group_size)
    order = gptq(weight, statistics, act_order=True).permutation()
    ordered = LayerStatistics.from_hessian(statistics.hessian[order][:, order])
    by_hand = gptq(weight[:, order], ordered, group_size=group_size)
    assert torch.equal(packed.decode()[:, order], by_hand.decode())
    # A row that is one group is the same in any order: none is stored.
    assert ("permutation" in packed.bytes_by_role()) == (group_size > 0)


def test_act_order_helps_where_inputs_are_unequal():
    weight, statistics = layer()
    losses = [
        proxy_loss(weight, gptq(weight, statistics, bits=3, act_order=act_order).decode(), statistics.hessian)
        for act_order in (False, True)
    ]
    assert losses[1] < losses[0]


# Dead inputs and damping


@pytest.mark.parametrize("act_order", [False, True])
def test_weights_of_dead_inputs_become_zero_and_cost_nothing(act_order):
    weight, _ = layer()
    x = torch.randn(4, 200, 256)
    x[:, :, 17] = 0
    context = LayerContext()
    statistics = LayerStatistics.from_inputs(x)
    decoded = gptq(weight, statistics, context, act_order=act_order).decode()
    assert not decoded[:, 17].any()
    assert (decoded[:, :17] != 0).any()
    assert context.facts["dead_columns"] == 1


def test_dead_inputs_rank_with_a_diagonal_of_one():
    hessian = torch.diag(torch.tensor([0.5, 0.0, 3.0, 0.25] * 8))
    packed = gptq(torch.randn(4, 32), LayerStatistics.from_hessian(hessian), act_order=True, group_size=16)
    ranked = hessian.diagonal()[packed.permutation()]
    assert ranked.tolist() == [3.0] * 8 + [0.0] * 8 + [0.5] * 8 + [0.25] * 8


def test_the_released_code_alone_lets_dead_weights_widen_the_grid_of_a_whole_row():
    weight, _ = layer()
    weight[:, 17] = 50.0
    x = torch.randn(4, 200, 256)
    x[:, :, 17] = 0
    statistics = LayerStatistics.from_inputs(x)
    corrected, faithful = (gptq(weight, statistics, group_size=-1, faithful=flag) for flag in (False, True))
    assert (faithful.scales() > 50 / 16).all()
    assert (corrected.scales() < 1).all()
    for packed in (corrected, faithful):
        assert not packed.decode()[:, 17].any()


def test_damping_that_had_to_be_raised_is_logged():
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    context = LayerContext()
    gptq(torch.randn(4, 64), LayerStatistics.from_hessian(hessian), context, group_size=32)
    assert context.facts["damping"] == pytest.approx(0.1)
    context = LayerContext()
    gptq(torch.randn(4, 64), LayerStatistics.from_hessian(torch.eye(64)), context, group_size=32)
    assert "damping" not in context.facts


def test_huge_damping_leaves_rtn():
    weight, statistics = layer()
    rounded = create_method("rtn").quantize_linear(weight)
    light, heavy = (share_changed(gptq(weight, statistics, damping=damping), rounded) for damping in (0.01, 10.0))
    assert heavy < light


def test_neither_weight_nor_statistics_are_changed():
    weight, statistics = layer()
    statistics.hessian[3, :] = statistics.hessian[:, 3] = 0
    before = weight.clone(), statistics.hessian.clone()
    for options in ({}, {"act_order": True}, {"static_groups": True, "act_order": True}):
        gptq(weight, statistics, **options)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.hessian, before[1])


def test_layers_that_share_statistics_share_the_factor():
    weight, statistics = layer()
    gptq(weight, statistics)
    factor = statistics.inverse_factor(0.01)
    gptq(weight * 2, statistics)
    assert statistics.inverse_factor(0.01) is factor
