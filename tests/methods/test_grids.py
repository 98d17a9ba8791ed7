"""Uniform grids: the formula of the released GPTQ quantizer, and which group sizes fit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from kernels.errors import InputError, NumericalError
from methods.grids import Grid, fit_range, resolve_group_size, round_to_groups
from methods.rounding import store, store_scale

# Normal float32 numbers far from the limits: scales of such weights do not overflow.
weights = st_np.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def released(weight, bits):
    """The asymmetric quantizer of IST-DASLab/gptq, said row by row."""
    rows = []
    for w in weight:
        low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
        if low == high == 0:
            low, high = -1.0, 1.0
        top = 2**bits - 1
        scale = (torch.tensor(high) - torch.tensor(low)) / top
        zero = torch.round(-torch.tensor(low) / scale)
        code = torch.clamp(torch.round(w / scale) + zero, 0, top)
        rows.append(scale * (code - zero))
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_an_asymmetric_grid_is_the_released_one(bits):
    torch.manual_seed(bits)
    weight = torch.randn(20, 64)
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2] = 0
    grid = fit_range(weight, bits, symmetric=False, scale_dtype=torch.float32)
    assert torch.equal(grid.decode(grid.encode(weight)), released(weight, bits))


@given(weights, st.integers(1, 8), st.booleans(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
@settings(max_examples=200)
def test_codes_and_zero_points_fit_their_bits_and_errors_stay_within_the_grid(weight, bits, symmetric, dtype):
    weight = torch.from_numpy(weight)
    grid = fit_range(weight, bits, symmetric=symmetric, scale_dtype=dtype)
    codes = grid.encode(weight)
    assert grid.scale.dtype == dtype
    assert (grid.scale > 0).all()
    for values in (codes, grid.zero):
        assert torch.equal(values, values.round())
        assert values.min() >= 0
        assert values.max() <= 2**bits - 1
    # Half a step for rounding and half for the zero point's own rounding; a symmetric grid ends one step below its
    # largest magnitude, or half a step more by rounding. A scale rounded to its dtype stretches the whole range by eps.
    step = grid.scale.float()
    slack = torch.finfo(dtype).eps * weight.abs().amax(dim=1, keepdim=True) + 1e-6 * step
    error = (grid.decode(codes) - weight).abs()
    assert (error <= (1.5 if symmetric else 1.0) * step + slack).all()


def test_zero_is_on_every_grid():
    weight = torch.tensor([[3.0, 4.0], [-4.0, -3.0], [-1.0, 2.0]])
    for symmetric in (False, True):
        grid = fit_range(weight, 4, symmetric=symmetric, scale_dtype=torch.float16)
        assert not grid.decode(grid.encode(torch.zeros(3, 1))).any()


def test_rounding_is_half_to_even():
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 4)
    assert grid.encode(torch.tensor([[0.5, 1.5, 2.5, 3.5]])).tolist() == [[0, 2, 2, 4]]


def test_a_symmetric_grid_spans_the_largest_magnitude_with_zero_in_the_middle():
    grid = fit_range(torch.tensor([[-1.0, 3.0], [-3.0, 1.0]]), 4, symmetric=True, scale_dtype=torch.float32)
    assert grid.zero.tolist() == [[8.0], [8.0]]
    torch.testing.assert_close(grid.scale, torch.full((2, 1), 6 / 15))


def test_a_row_of_zeros_spans_minus_one_to_one_and_decodes_to_zero():
    grid = fit_range(torch.zeros(2, 8), 4, symmetric=False, scale_dtype=torch.float16)
    assert grid.scale.float().tolist() == [[pytest.approx(2 / 15, rel=1e-3)]] * 2
    assert not grid.decode(grid.encode(torch.zeros(2, 8))).any()


def test_the_scale_is_rounded_before_it_is_used():
    torch.manual_seed(0)
    weight = torch.randn(50, 64)
    grid = fit_range(weight, 8, symmetric=False, scale_dtype=torch.bfloat16)
    scale = grid.scale.float()
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(grid.encode(weight), (torch.round(weight / scale) + grid.zero).clamp(0, 255))
    assert torch.equal(grid.zero, torch.round(-weight.amin(dim=1, keepdim=True) / scale).clamp(0, 255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_is_never_rounded_to_zero(dtype):
    stored = store_scale(torch.tensor([0.0, 1e-12, 1e-30, 1.0]), dtype)
    assert (stored > 0).all()
    assert stored[-1] == 1
    grid = fit_range(torch.tensor([[1e-12, -1e-12]]), 4, symmetric=False, scale_dtype=dtype)
    assert torch.isfinite(grid.decode(grid.encode(torch.tensor([[1e-12, -1e-12]])))).all()


def test_a_constant_that_overflows_is_reported_with_a_way_out():
    with pytest.raises(NumericalError, match="100000 cannot be stored in float16; use scale_dtype='float32'"):
        store(torch.tensor([1.0, 1e5]), torch.float16)
    assert store(torch.tensor([1e5]), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (64, 16), (576, 128), (33, 32), (33, 33), (7, 1)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_by_groups_is_rounding_each_group_by_itself(columns, group_size, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(6, columns)
    options = {"symmetric": symmetric, "scale_dtype": torch.float16}
    rounded = round_to_groups(weight, 3, group_size, **options)
    for g, part in enumerate(weight.split(group_size, dim=1)):
        grid = fit_range(part, 3, **options)
        at = slice(g * group_size, (g + 1) * group_size)
        assert torch.equal(rounded.codes[:, at], grid.encode(part))
        assert torch.equal(rounded.scales[:, g : g + 1], grid.scale)
        assert torch.equal(rounded.zeros[:, g : g + 1], grid.zero)
        assert torch.equal(rounded.decode()[:, at], grid.decode(grid.encode(part)))


@pytest.mark.parametrize(
    ("group_size", "in_features", "columns"),
    [
        (-1, 576, 576),
        (-1, 7, 7),
        (128, 128, 128),
        (128, 576, 128),
        (64, 576, 64),
        (32, 33, 32),
        (96, 576, 96),
        (5, 35, 5),
        (1, 7, 1),
        (7, 7, 7),
        (128, 11008, 128),
    ],
)
def test_sizes_that_fit(group_size, in_features, columns):
    assert resolve_group_size(group_size, in_features) == columns


@pytest.mark.parametrize(("group_size", "in_features"), [(0, 64), (-2, 64), (128, 96), (100, 576), (33, 64), (65, 64)])
def test_sizes_that_do_not_fit_are_refused(group_size, in_features):
    with pytest.raises(InputError, match=f"group_size={group_size} does not fit in_features={in_features}; use -1"):
        resolve_group_size(group_size, in_features)


@given(st.integers(1, 700), st.integers(1, 300))
def test_every_size_that_the_refusal_suggests_fits(in_features, group_size):
    try:
        resolve_group_size(group_size, in_features)
    except InputError as refused:
        suggested = str(refused).split("divisor such as ")[1].split(", or")[0]
        for size in suggested.split(", "):
            assert resolve_group_size(int(size), in_features) == int(size)
