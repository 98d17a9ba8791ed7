"""MG-PTQ (reconstruction): the average is kept, the controls are what they say, the network learns."""

import itertools

import pytest
import torch

from kernels.errors import InputError
from methods import LayerContext, LayerStatistics, create_method
from methods.hessian import proxy_loss
from methods.mg_ptq.allocation import column_errors, knapsack, ranked, spend
from methods.mg_ptq.graph import normalized_adjacency


def layer(rows=48, columns=160, seed=0):
    """A weight and the statistics of correlated inputs of very unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4, 128, columns, generator=generator) @ mix
    x = x * torch.exp(torch.randn(columns, generator=generator))
    return 0.05 * torch.randn(rows, columns, generator=generator), LayerStatistics.from_inputs(x)


def mg_ptq(weight, statistics, context=None, **options):
    options = {"group_size": 32, "steps": 60, **options}
    return create_method("mg-ptq", **options).quantize_linear(weight, statistics, context)


@pytest.mark.parametrize("average", [1.5, 2.0, 2.37, 3.0])
@pytest.mark.parametrize("allocator", ["graph", "knapsack", "diagonal", "random"])
def test_the_average_is_the_one_that_was_asked_for(average, allocator):
    weight, statistics = layer()
    packed = mg_ptq(weight, statistics, average_bits=average, allocator=allocator)
    assert float(packed.column_widths().float().mean()) == pytest.approx(average, abs=0.01)
    assert create_method("mg-ptq").nominal_bits(packed).weight == pytest.approx(average, abs=0.01)


def test_widths_are_taken_from_the_choices_alone():
    weight, statistics = layer()
    packed = mg_ptq(weight, statistics, bit_choices=[2, 4], average_bits=2.5)
    assert set(packed.column_widths().tolist()) == {2, 4}


def test_the_knapsack_is_the_best_allocation_there_is():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(6, 1, generator=generator) * torch.tensor([[1.0, 0.25, 0.06]])
    for budget in range(6, 19):
        widths = knapsack(errors, [1, 2, 3], budget)
        assert int(widths.sum()) <= budget
        totals = {
            sum(float(errors[j, b - 1]) for j, b in enumerate(chosen))
            for chosen in itertools.product([1, 2, 3], repeat=6)
            if sum(chosen) <= budget
        }
        assert sum(float(errors[j, int(b) - 1]) for j, b in enumerate(widths)) == pytest.approx(min(totals), rel=1e-5)


def test_spending_repairs_any_allocation_without_going_over():
    errors = torch.rand(20, 3, generator=torch.Generator().manual_seed(1)).sort(dim=1, descending=True).values
    for first in ([1] * 20, [4] * 20, [2] * 20):
        for budget in (20, 33, 41, 80):
            total = int(spend(torch.tensor(first), errors, [1, 2, 4], budget).sum())
            assert budget - 1 <= total <= budget


def test_controls_hand_out_the_widths_of_the_knapsack():
    weight, statistics = layer()
    best, by_rank, random = (
        mg_ptq(weight, statistics, allocator=allocator).column_widths()
        for allocator in ("knapsack", "diagonal", "random")
    )
    assert best.sort().values.tolist() == by_rank.sort().values.tolist() == random.sort().values.tolist()
    diagonal = statistics.hessian.diagonal()
    assert diagonal[by_rank == 4].min() >= diagonal[by_rank == 3].max()
    assert ranked(torch.tensor([1, 2, 3]), torch.tensor([0.5, 9.0, 1.0])).tolist() == [1, 3, 2]


def test_the_network_learns_and_does_not_beat_the_optimum_of_its_own_model():
    weight, statistics = layer()
    context = LayerContext()
    mg_ptq(weight, statistics, context, steps=200)
    facts = context.facts
    equal = column_errors(weight, statistics.inverse_factor(0.01).diagonal(), [2], 32, torch.float16).sum()
    # By itself, before the repair: that would find the optimum from almost anything.
    assert abs(facts["average_before_repair"] - 2.0) < 0.1
    assert facts["modelled_error_before_repair"] < 0.5 * float(equal)
    assert facts["modelled_error_of_knapsack"] <= facts["modelled_error"]


@pytest.mark.parametrize("average", [1.5, 2.0, 3.0])
def test_columns_that_are_nearly_alike_do_not_go_to_one_width_together(average):
    generator = torch.Generator().manual_seed(1)
    statistics = LayerStatistics.from_inputs(torch.randn(4, 256, 192, generator=generator))
    context = LayerContext()
    mg_ptq(0.05 * torch.randn(64, 192, generator=generator), statistics, context, average_bits=average, steps=200)
    assert abs(context.facts["average_before_repair"] - average) < 0.2


def test_of_two_widths_half_the_columns_have_each_at_their_mean():
    weight, statistics = layer()
    packed = mg_ptq(weight, statistics, bit_choices=[2, 4], average_bits=3.0, group_size=-1)
    assert packed.column_widths().bincount().tolist() == [0, 0, 80, 0, 80]


def test_allotted_bits_lose_less_than_equal_bits_where_inputs_are_unequal():
    weight, statistics = layer()
    equal = create_method("gptq", bits=2, group_size=32).quantize_linear(weight, statistics).decode()
    random, best = (mg_ptq(weight, statistics, allocator=allocator).decode() for allocator in ("random", "knapsack"))
    losses = [proxy_loss(weight, decoded, statistics.hessian) for decoded in (best, random, equal)]
    assert losses[0] < 0.8 * min(losses[1:])


def test_errors_of_the_model_are_those_of_rounding_each_column_alone():
    weight, statistics = layer()
    pivots = statistics.inverse_factor(0.01).diagonal()
    errors = column_errors(weight, pivots, [2, 3], 32, torch.float32)
    for index, bits in enumerate((2, 3)):
        rounded = create_method("rtn", bits=bits, group_size=32, scale_dtype="float32").quantize_linear(weight).decode()
        expected = ((rounded - weight) / pivots).square().sum(dim=0)
        assert torch.allclose(errors[:, index], expected, rtol=1e-4)


def test_the_graph_is_normalized_and_sparse_where_it_is_wide(monkeypatch):
    upper = layer()[1].inverse_factor(0.01).upper
    dense = normalized_adjacency(upper)
    assert torch.allclose(dense, dense.T, atol=1e-6)
    assert float(torch.linalg.eigvalsh(dense)[-1]) == pytest.approx(1.0, abs=1e-4)
    monkeypatch.setattr("methods.mg_ptq.graph._DENSE_NODES", 100)
    sparse = normalized_adjacency(upper)
    assert sparse.is_sparse
    assert sparse.coalesce().values().numel() < 0.7 * 160 * 160
    weight, statistics = layer()
    assert mg_ptq(weight, statistics).shape == (48, 160)


def test_a_target_out_of_reach_and_bad_choices_are_refused():
    for options, said in (
        ({"average_bits": 5.0}, "average_bits=5.0 is not between bit_choices 1 and 4"),
        ({"bit_choices": [2, 1]}, "must be ascending widths from 1 to 8"),
        ({"bit_choices": [0, 2]}, "must be ascending widths from 1 to 8"),
        ({"bit_choices": []}, "bit_choices"),
    ):
        with pytest.raises(InputError, match="method 'mg-ptq'") as refused:
            create_method("mg-ptq", **options)
        assert said in str(refused.value)


def test_provenance_says_that_it_is_a_reconstruction():
    provenance = create_method("mg-ptq").provenance
    assert provenance.reconstruction
    assert provenance.code == "no public code"
