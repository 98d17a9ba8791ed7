"""The 1-bit floor, and the binarization numerics that three methods share."""

import pytest
import torch

from kernels.errors import InputError
from kernels.layouts import load_packed, save_packed
from methods import LayerContext, LayerStatistics, create_method
from methods.binarization import residual_binarization, row_moments
from methods.hessian import damped


def problem(rows, columns, seed=0):
    torch.manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns) + 0.02
    mixing = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    return weight, LayerStatistics.from_inputs(torch.randn(8, 2 * columns, columns) @ mixing)


def test_row_moments_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0, 100.0], [5.0, 5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, True, False], [False, False, False, False]])
    mean, scale = row_moments(values, mask)
    assert mean.tolist() == [[3.0], [0.0]]
    assert scale.tolist() == [[2.0], [0.0]]  # (2 + 1 + 3) / 3, and nothing


def test_second_order_never_errs_more_than_first():
    torch.manual_seed(0)
    values = torch.randn(200, 64)
    mask = torch.rand(200, 64) < torch.rand(200, 1)
    errors = [((values - residual_binarization(values, mask, order)) * mask).square().sum(dim=1) for order in (1, 2, 3)]
    assert (errors[1] <= errors[0] + 1e-5).all()
    assert (errors[2] <= errors[1] + 1e-5).all()
    assert errors[1].sum() < 0.5 * errors[0].sum()


def test_rows_without_entries_and_entries_outside_the_mask_are_zero():
    values = torch.randn(4, 16) + 3
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[1, 2:9] = True
    binarized = residual_binarization(values, mask, 2)
    assert (binarized[~mask] == 0).all()
    assert (binarized[mask] != 0).all()


def test_the_scale_is_the_least_squares_one():
    weight, _ = problem(8, 96)
    mean, scale = row_moments(weight, torch.ones(1, 96, dtype=torch.bool))
    best = (weight - mean).square().sum()  # any other level pair with these signs errs more
    for factor in (0.98, 1.0, 1.02):
        level = mean + factor * scale * torch.where(weight < mean, -1.0, 1.0)
        error = (weight - level).square().sum()
        if factor == 1.0:
            optimum = error
        else:
            best = min(best, error)
    assert optimum < best


@pytest.mark.parametrize("group_size", [-1, 32])
def test_without_mean_every_weight_is_its_sign_times_the_mean_magnitude(group_size):
    weight, _ = problem(6, 96)
    decoded = create_method("binary", group_size=group_size, scale_dtype="float32").quantize_linear(weight).decode()
    size = 96 if group_size == -1 else group_size
    for start in range(0, 96, size):
        group = weight[:, start : start + size]
        expected = group.sign() * group.abs().mean(dim=1, keepdim=True)
        torch.testing.assert_close(decoded[:, start : start + size], expected, rtol=1e-6, atol=0)


def test_removing_the_mean_lowers_the_error_of_weights_that_have_one():
    weight, _ = problem(16, 128)
    plain = create_method("binary").quantize_linear(weight)
    centred = create_method("binary", mean_removal=True).quantize_linear(weight)
    assert (weight - centred.decode()).square().sum() < (weight - plain.decode()).square().sum()
    assert centred.payload_bits() == plain.payload_bits() + 16 / 128


@pytest.mark.parametrize("mean_removal", [False, True])
@pytest.mark.parametrize("group_size", [-1, 96, 32])
def test_compensation_lowers_the_true_loss_and_reports_it(mean_removal, group_size):
    weight, statistics = problem(24, 192)
    hessian = damped(statistics.hessian, 0.01)[0].double()
    losses = []
    for compensation in ("none", "column"):
        context = LayerContext()
        method = create_method(
            "binary",
            compensation=compensation,
            mean_removal=mean_removal,
            group_size=group_size,
            scale_dtype="bfloat16",
            block_size=64,
        )
        error = (weight - method.quantize_linear(weight, statistics, context).decode()).double()
        losses.append(float(((error @ hessian) * error).sum()))
    assert losses[1] < losses[0]
    assert context.facts["squared_error"] == pytest.approx(losses[1], rel=1e-4)


def test_groups_that_would_straddle_blocks_are_fitted_on_updated_weights():
    weight, statistics = problem(24, 192)
    decoded = [
        create_method("binary", compensation="column", group_size=96, block_size=size, scale_dtype="float32")
        .quantize_linear(weight, statistics)
        .decode()
        for size in (64, 192)
    ]
    torch.testing.assert_close(decoded[0], decoded[1], rtol=1e-4, atol=1e-6)


def test_needs_a_hessian_only_to_compensate():
    assert create_method("binary").needs == "nothing"
    method = create_method("binary", compensation="column")
    assert method.needs == "hessian"
    with pytest.raises(InputError, match="needs the layer's inputs"):
        method.quantize_linear(torch.randn(4, 32))


@pytest.mark.parametrize("compensation", ["none", "column"])
def test_partial_last_group_is_stored_and_read_back(tmp_path, compensation):
    weight, statistics = problem(6, 576)
    method = create_method("binary", group_size=128, mean_removal=True, compensation=compensation)
    packed = method.quantize_linear(weight, statistics)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    assert torch.equal(load_packed(tmp_path / "w.safetensors")["layer"].decode(), packed.decode())
    assert packed.nbytes() == 6 * 576 // 8 + 2 * 2 * 6 * 5
    assert method.nominal_bits(packed).weight == 1
    assert method.nominal_bits(packed).scale == 32 / 128


def test_zero_rows_decode_to_zero():
    weight = torch.zeros(3, 32)
    weight[1] = 1.0
    for mean_removal in (False, True):
        decoded = create_method("binary", mean_removal=mean_removal).quantize_linear(weight).decode()
        assert torch.equal(decoded, weight)


def test_arguments_are_left_alone_and_nan_is_refused():
    weight, statistics = problem(4, 32)
    before, hessian = weight.clone(), statistics.hessian.clone()
    method = create_method("binary", compensation="column")
    method.quantize_linear(weight, statistics)
    assert torch.equal(weight, before)
    assert torch.equal(statistics.hessian, hessian)
    weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        method.quantize_linear(weight, statistics)
