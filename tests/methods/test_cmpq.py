"""CMPQ (reconstruction): widths by activation norm, k-means, outliers."""

import pytest
import torch

from methods import LayerContext, LayerStatistics, create_method
from methods.cmpq import channel_widths, codebooks, largest


def layer(rows=64, columns=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 64, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    return 0.05 * torch.randn(rows, columns, generator=generator), LayerStatistics.from_inputs(x)


def cmpq(weight, statistics, context=None, **options):
    return create_method("cmpq", **options).quantize_linear(weight, statistics, context)


@pytest.mark.parametrize("average", [2.0, 2.2, 3.75, 4.0])
def test_the_average_is_any_fraction_and_larger_activations_get_more(average):
    weight, statistics = layer()
    packed = cmpq(weight, statistics, average_bits=average)
    widths = packed.column_widths()
    assert float(widths.float().mean()) == pytest.approx(average, abs=1 / 40)
    assert int(widths.max() - widths.min()) <= 1
    norms = statistics.hessian.diagonal()
    if widths.min() < widths.max():
        assert norms[widths == widths.max()].min() > norms[widths == widths.min()].max()
    assert create_method("cmpq").nominal_bits(packed).weight == pytest.approx(average, abs=1 / 40)


def test_at_a_whole_number_all_columns_have_as_many_bits():
    assert channel_widths(torch.rand(576), 3.0).tolist() == [3] * 576


def test_widths_at_the_upper_end_stay_in_range():
    assert channel_widths(torch.rand(5), 8.0).tolist() == [8] * 5


def lloyd(values, size, steps):
    """Plain 1-d k-means from the same quantiles, distance by distance."""
    ordered = values.sort().values
    at = ((torch.arange(size) + 0.5) / size * len(values)).ceil().long() - 1
    centers = ordered[at].clone()
    for _ in range(steps):
        nearest = (values[:, None] - centers).abs().argmin(dim=1)
        for k in range(size):
            if (nearest == k).any():
                centers[k] = values[nearest == k].double().mean().float()
    return centers


def test_codebooks_are_those_of_plain_k_means():
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(4))
    counted = torch.rand(3, 50, generator=torch.Generator().manual_seed(5)) < 0.8
    for size in (2, 4, 8):
        found = codebooks(values, counted, size, 12)
        for row in range(3):
            assert torch.allclose(found[row], lloyd(values[row][counted[row]], size, 12), atol=1e-6)


def test_k_means_is_better_than_a_uniform_grid_of_the_same_bits():
    weight, statistics = layer(rows=256)
    ours = cmpq(weight, statistics, average_bits=3.0, activation_outliers=0.0, error_outliers=0.0).decode()
    theirs = create_method("rtn", bits=3, group_size=-1).quantize_linear(weight.T.contiguous()).decode().T
    assert float((ours - weight).norm()) < 0.8 * float((theirs - weight).norm())


def test_outliers_are_kept_exactly_and_are_the_largest_by_activation():
    weight, statistics = layer()
    weight[7, 9] = 3.0
    packed = cmpq(weight, statistics, activation_outliers=0.01, error_outliers=0.0)
    rows, columns = packed.outlier_positions()
    assert packed.outliers == round(0.01 * weight.numel())
    assert torch.equal(packed.decode()[rows, columns], weight[rows, columns].half().float())
    score = weight.abs() * statistics.hessian.diagonal().sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[rows, columns] = True
    assert score[mask].min() >= score[~mask].max()
    assert mask[7, 9]


def test_error_outliers_are_the_worst_rounded_weights():
    weight, statistics = layer()
    none = cmpq(weight, statistics, activation_outliers=0.0, error_outliers=0.0).decode()
    packed = cmpq(weight, statistics, activation_outliers=0.0, error_outliers=0.02)
    mask = largest((weight - none).abs(), 0.02)
    rows, columns = packed.outlier_positions()
    assert torch.equal(torch.stack([rows, columns], dim=1), mask.nonzero())
    assert torch.equal(packed.decode()[~mask], none[~mask])


def test_a_column_of_outliers_alone_is_no_trouble():
    weight, statistics = layer()
    weight[:, 3] = 50.0
    context = LayerContext()
    decoded = cmpq(weight, statistics, context, activation_outliers=0.1).decode()
    assert torch.equal(decoded[:, 3], weight[:, 3])
    assert context.facts["outliers"] == round(0.1 * weight.numel()) + round(0.0005 * weight.numel())
