"""SliM-LLM: equal to the released code, the allocation's rules, and the cheap evaluation against the plain one."""

from pathlib import Path

import pytest
import torch

from kernels.errors import InputError
from methods import LayerContext, LayerStatistics, create_method
from methods.hessian import proxy_loss
from methods.slim_llm.allocation import (
    Rounding,
    candidates,
    divergence_losses,
    fewest,
    group_salience,
    ranking,
    squared_losses,
    widths_of,
)
from methods.slim_llm.ranges import salient_weights, search_range

CASES = sorted(path.stem for path in (Path(__file__).parents[2] / "golden").glob("slim*.json"))


def layer(rows=48, columns=256, seed=0):
    """A weight and the statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4, 96, columns, generator=generator) @ mix
    x = x * torch.exp(0.5 * torch.randn(columns, generator=generator))
    return 0.05 * torch.randn(rows, columns, generator=generator), LayerStatistics.from_inputs(x)


def slim(weight, statistics, context=None, **options):
    options = {"group_size": 32, **options}
    return create_method("slim-llm", **options).quantize_linear(weight, statistics, context)


# Parity with the released code


def test_there_are_golden_vectors():
    assert CASES == ["slim2-g128-1", "slim2-g32-0", "slim3-g32-0", "slim3-g64-2"]


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_released_code(golden, case):
    name, _, number = case.rpartition("-")
    vector = golden(name, int(number))
    context = LayerContext()
    packed = slim(
        vector.weight,
        vector.statistics_with_inputs(),
        context,
        bits=vector.options["bits"],
        group_size=vector.options["groupsize"],
        damping=vector.options["percdamp"],
        salience_weight=float(vector.options["lambda_salience"]),
        faithful=True,
        scale_dtype="float32",
    )
    assert context.facts["widths"] == vector.extra["block_bits"]
    decoded = packed.decode()
    # Near-ties flip with the last bit of H: the vectors say how many entries change at 1e-6 relative noise.
    assert vector.mismatch(decoded) <= max(0.001, vector.sensitivity)
    error, hessian = (vector.weight - decoded).double(), vector.statistics.hessian.double()
    assert float(((error @ hessian) * error).sum()) == pytest.approx(vector.proxy_loss, rel=1e-3)
    searched = vector.extra["kl_per_candidate"]
    if len(searched) > 1:  # of 64 tokens a sample
        assert [64 * loss for loss in context.facts["losses"]] == pytest.approx(searched, rel=1e-5)


# Allocation


def plain_losses(weight, inputs, order, bits, rounding, bias, faithful):
    """The released way: the whole matrix anew for every sample and number of pairs."""
    losses = []
    for pairs in candidates(len(order)):
        quantized = weight.clone()
        for group, width in enumerate(widths_of(order, bits, pairs)):
            change = rounding.change(weight, group, width)
            start = group * rounding.group_size
            quantized[:, start : start + change.shape[1]] += change
        total = 0.0
        for x in inputs:
            of_original = torch.softmax(x @ weight.T + bias, dim=1)
            of_quantized = torch.softmax(x @ quantized.T + (0 if faithful else bias), dim=1)
            if faithful:
                of_quantized, of_original = of_quantized.clamp(min=1e-6), of_original.clamp(min=1e-6)
                total += float((of_quantized * (of_quantized / of_original).log()).sum())
            else:
                total += float((of_original * (of_original / of_quantized).log()).sum())
        losses.append(total / (inputs.shape[0] * inputs.shape[1]))
    return losses


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("columns", [256, 272])  # 272: a narrower last group
def test_the_incremental_evaluation_gives_the_losses_of_the_plain_one(bits, faithful, biased, columns):
    weight, statistics = layer(columns=columns)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(2)) if biased else None
    order = ranking(torch.rand(-(-columns // 32), generator=torch.Generator().manual_seed(1)))
    rounding = Rounding(32, torch.float32, around_zero=faithful)
    arguments = (weight, statistics.inputs, order, bits, rounding)
    found = divergence_losses(*arguments, bias=bias, faithful=faithful)
    plain = plain_losses(*arguments, torch.zeros(len(weight)) if bias is None else bias, faithful)
    assert found == pytest.approx(plain, rel=1e-4)
    assert fewest(found) == fewest(plain)  # and with them the bits
    assert len(found) == columns // 64 - 1


def test_the_squared_loss_is_the_change_of_the_output():
    weight, statistics = layer()
    order = ranking(torch.rand(8, generator=torch.Generator().manual_seed(1)))
    rounding = Rounding(32, torch.float32, around_zero=False)
    found = squared_losses(weight, statistics.hessian, order, 2, rounding)
    for pairs, loss in zip(candidates(8), found, strict=True):
        widths = widths_of(order, 2, pairs)
        change = torch.cat([rounding.change(weight, group, width) for group, width in enumerate(widths)], dim=1)
        moved = (statistics.inputs @ change.T).square().sum() * 2 / statistics.samples
        assert loss == pytest.approx(float(moved), rel=1e-3)


@pytest.mark.parametrize(
    ("groups", "pairs"), [(1, []), (3, []), (4, [1]), (5, [1]), (6, [1, 2]), (12, [1, 2, 3, 4, 5])]
)
def test_pairs_run_from_one_to_half_the_groups_less_one(groups, pairs):
    assert list(candidates(groups)) == pairs


def test_as_many_groups_have_one_bit_more_as_one_less():
    order = ranking(torch.tensor([5.0, 1.0, 3.0, 9.0, 2.0, 4.0]))
    assert widths_of(order, 3, 2) == [4, 2, 3, 4, 2, 3]
    assert widths_of(order, 3, 0) == [3] * 6


@pytest.mark.parametrize("groups", [4, 5, 6, 7, 12])
@pytest.mark.parametrize("highest", [True, False])
def test_a_last_group_that_keeps_its_width_is_out_of_reach_of_every_number_of_pairs(groups, highest):
    salience = torch.rand(groups, generator=torch.Generator().manual_seed(groups))
    salience[-1] = 2.0 if highest else -1.0
    order = ranking(salience, last_keeps=True)
    assert sorted(order) == list(range(groups))
    others = [group for group in order if group != groups - 1]
    assert others == ranking(salience[:-1])
    for pairs in candidates(groups):
        widths = widths_of(order, 2, pairs)
        assert widths[-1] == 2
        assert widths.count(1) == widths.count(3) == pairs


@pytest.mark.parametrize("columns", [144, 176, 272])  # 4.5, 5.5 and 8.5 groups, as SmolLM2's 576 in groups of 128
def test_a_narrower_last_group_does_not_move_the_mean_width(columns):
    for factor in (0.1, 10.0):  # the narrow group least and most salient
        weight, statistics = layer(columns=columns)
        weight[:, columns // 32 * 32 :] *= factor
        packed = slim(weight, statistics)
        assert create_method("slim-llm").nominal_bits(packed).weight == 2
        assert set(packed.column_widths().tolist()) == {1, 2, 3}


def test_the_released_code_ranks_a_narrower_last_group_with_the_others():
    weight, statistics = layer(columns=144)
    weight[:, 128:] *= 10
    context = LayerContext()
    packed = slim(weight, statistics, context, faithful=True)
    assert context.facts["widths"][-1] == 3
    assert create_method("slim-llm").nominal_bits(packed).weight == pytest.approx(2 - 16 / 144)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_mean_width_is_the_headline(bits):
    weight, statistics = layer()
    context = LayerContext()
    packed = slim(weight, statistics, context, bits=bits)
    widths = context.facts["widths"]
    assert sum(widths) == bits * len(widths)
    assert set(widths) == {bits - 1, bits, bits + 1}
    assert 1 <= context.facts["pairs"] <= 3
    assert context.facts["pairs"] == fewest(context.facts["losses"]) == widths.count(bits + 1) == widths.count(bits - 1)
    assert packed.column_widths().view(8, 32)[:, 0].tolist() == widths
    assert create_method("slim-llm").nominal_bits(packed).weight == bits


def test_the_most_salient_groups_get_the_bits():
    weight, statistics = layer()
    context = LayerContext()
    slim(weight, statistics, context)
    salience = group_salience(weight, statistics.inverse_factor(0.01).diagonal(), 32)
    widths = torch.tensor(context.facts["widths"])
    assert salience[widths == 3].min() > salience[widths == 2].max()
    assert salience[widths == 1].max() < salience[widths == 2].min()


def test_the_salience_of_a_group_is_a_sum_over_its_columns():
    weight, pivots = torch.ones(4, 40), torch.full((40,), 0.5)
    assert group_salience(weight, pivots, 32).tolist() == [512.0, 128.0]


@pytest.mark.parametrize("columns", [32, 64, 96])
def test_fewer_than_four_groups_have_equal_widths_and_the_log_says_so(columns):
    weight, statistics = layer(columns=columns)
    context = LayerContext()
    packed = slim(weight, statistics, context)
    assert context.facts["widths"] == [2] * (columns // 32)
    assert "fewer than 4: all have 2 bits" in context.facts["fallback"]
    assert (packed.column_widths() == 2).all()


def test_one_candidate_is_taken_without_inputs():
    weight, statistics = layer(columns=160)
    context = LayerContext()
    slim(weight, LayerStatistics.from_hessian(statistics.hessian), context)
    assert context.facts["pairs"] == 1
    assert "losses" not in context.facts


def test_the_squared_objective_needs_the_hessian_alone():
    weight, statistics = layer()
    alone = LayerStatistics.from_hessian(statistics.hessian)
    with pytest.raises(InputError, match="needs the layer's inputs, not only their Hessian"):
        slim(weight, alone)
    context = LayerContext()
    slim(weight, alone, context, objective="mse")
    assert len(context.facts["losses"]) == 3
    assert create_method("slim-llm", objective="mse").needs == "hessian"
    assert create_method("slim-llm").needs == "inputs"


# The range search


def test_with_a_salience_weight_of_one_the_salient_mask_changes_nothing():
    weight, statistics = layer()
    pivots = statistics.inverse_factor(0.01).diagonal()[:32]
    group = weight[:, :32]
    grids = [search_range(group, pivots, 2, torch.float32, salience_weight=w) for w in (1.0, 1.0000001, 8.0)]
    assert salient_weights(group, pivots).any()
    assert torch.equal(grids[0].scale, grids[1].scale)
    assert not torch.equal(grids[0].scale, grids[2].scale)


def test_the_search_is_no_worse_than_the_plain_range_and_stays_within_a_tenth():
    weight, statistics = layer()
    pivots = statistics.inverse_factor(0.01).diagonal()[:32]
    group = weight[:, :32]
    grid = search_range(group, pivots, 3, torch.float32)
    plain = (group.amax(dim=1, keepdim=True).clamp(min=0) - group.amin(dim=1, keepdim=True).clamp(max=0)) / 7
    assert ((grid.scale / plain - 1).abs() < 0.1001).all()
    zero = torch.round(-group.amin(dim=1, keepdim=True).clamp(max=0) / plain)
    rounded = ((torch.round(group / plain) + zero).clamp(0, 7) - zero) * plain
    errors = [(values - group).abs().pow(2.4).sum(dim=1) for values in (grid.decode(grid.encode(group)), rounded)]
    assert (errors[0] <= errors[1] * 1.00001).all()
    assert float(errors[0].sum()) < 0.98 * float(errors[1].sum())


def test_a_group_without_salient_weights_is_searched_all_the_same():
    group = torch.ones(4, 32)  # every salience is the mean
    assert not salient_weights(group, torch.ones(32)).any()
    grid = search_range(group, torch.ones(32), 2, torch.float32, salience_weight=4.0)
    assert torch.allclose(grid.decode(grid.encode(group)), group)


# Faithful and corrected


def test_dead_inputs_are_zeroed_unless_faithful():
    weight, statistics = layer()
    x = statistics.inputs.clone()
    x[:, :, 17] = 0
    statistics = LayerStatistics.from_inputs(x)
    contexts = LayerContext(), LayerContext()
    corrected, faithful = (
        slim(weight, statistics, context, bits=3, faithful=flag).decode()
        for flag, context in zip((False, True), contexts, strict=True)
    )
    assert not corrected[:, 17].any()
    assert faithful[:, 17].any()
    assert [context.facts["dead_columns"] for context in contexts] == [1, 0]


def test_leading_low_groups_have_a_middle_zero_point_in_the_released_code_alone():
    weight, statistics = layer()
    weight[:, :32] = weight[:, :32].abs() * 0.01  # least salient, and one-sided: its zero point is 0
    corrected, faithful = (
        slim(weight, statistics, bits=3, faithful=flag, scale_dtype="float32") for flag in (False, True)
    )
    assert int(corrected.column_widths()[0]) == int(faithful.column_widths()[0]) == 2
    errors = [float((packed.decode() - weight)[:, :32].norm()) for packed in (corrected, faithful)]
    assert errors[0] < 0.7 * errors[1]


def test_it_loses_less_than_gptq_of_the_same_bits_where_columns_are_unequal():
    weight, statistics = layer(rows=96, columns=512)
    scale = torch.exp(1.5 * torch.randn(16, generator=torch.Generator().manual_seed(3)))
    x = statistics.inputs * scale.repeat_interleave(32)
    statistics = LayerStatistics.from_inputs(x)
    ours = slim(weight, statistics, objective="mse").decode()
    theirs = create_method("gptq", bits=2, group_size=32).quantize_linear(weight, statistics).decode()
    losses = [proxy_loss(weight, decoded, statistics.hessian) for decoded in (ours, theirs)]
    assert losses[0] < 0.9 * losses[1]
