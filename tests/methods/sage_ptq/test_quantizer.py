"""Mode 1 against algorithm 2 written out row by row."""

from itertools import pairwise

import numpy as np
import pytest

from methods.sage_ptq.quantizer import SalientSet


def example(rows=12, columns=40, share=0.2, seed=0):
    """A weight with a salient set of its largest entries; the last row has none, the one before it just one."""
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    mask = np.abs(weight) > np.quantile(np.abs(weight), 1 - share)
    mask[-2:] = False
    mask[-2, 7] = True
    return weight, mask


def algorithm_2(row, iterations):
    """a after `iterations` steps: B = sign(W); a = sum W B / sum B^2, B = clip(W / a, -1, 1)."""
    relaxed, scale = np.sign(row), 0.0
    for _ in range(iterations):
        scale = (row * relaxed).sum() / np.square(relaxed).sum()
        relaxed = np.clip(row / scale, -1, 1)
    return scale


def test_the_set_is_in_row_major_order():
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    mask = np.zeros((3, 4), dtype=bool)
    mask[0, 3] = mask[2, 0] = mask[2, 2] = True
    salient = SalientSet.of(weight, mask)
    assert salient.rows.tolist() == [0, 2, 2]
    assert salient.values.tolist() == [3, 8, 10]
    assert salient.count == 3


@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 20])
def test_truncated_scales_are_those_of_algorithm_2(iterations):
    weight, mask = example()
    scales = SalientSet.of(weight, mask).row_scales(iterations)
    written = [algorithm_2(row[chosen].astype(np.float64), iterations) if chosen.any() else 0.0
               for row, chosen in zip(weight, mask, strict=True)]  # fmt: skip
    assert scales == pytest.approx(np.array(written), rel=1e-12)


def test_each_step_raises_the_scales_and_they_converge_to_the_row_maximum():
    weight, mask = example()
    salient = SalientSet.of(weight, mask)
    maximum = np.where(mask, np.abs(weight), 0).max(axis=1)
    steps = np.stack([salient.row_scales(iterations) for iterations in range(1, 60)])
    assert (np.diff(steps, axis=0) >= -1e-12).all()
    assert (steps <= maximum + 1e-12).all()
    assert salient.row_scales(5000) == pytest.approx(maximum, rel=1e-6)
    assert salient.row_scales(None) == pytest.approx(maximum, rel=1e-12)
    # It is a slow convergence where a row has many salient weights: a truncated run does matter.
    assert (steps[9] < 0.99 * maximum)[:-2].any()


def test_the_row_maximum_is_a_fixed_point():
    weight, mask = example()
    scales = SalientSet.of(weight, mask).row_scales(None)
    for row, chosen, scale in zip(weight, mask, scales, strict=True):
        values = row[chosen].astype(np.float64)
        if values.size:
            relaxed = np.clip(values / scale, -1, 1)
            assert (values * relaxed).sum() / np.square(relaxed).sum() == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("iterations", [None, 1, 20])
def test_a_row_without_salient_weights_has_scale_zero(iterations):
    scales = SalientSet.of(*example()).row_scales(iterations)
    assert scales[-1] == 0
    assert (scales[:-1] > 0).all()


@pytest.mark.parametrize("iterations", [None, 1, 20])
def test_no_salient_weight_at_all_gives_zero_scales(iterations):
    weight, mask = example()
    assert SalientSet.of(weight, np.zeros_like(mask)).row_scales(iterations).tolist() == [0.0] * 12


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("iterations", [None, 1])
def test_codes_are_the_nearest_midpoints(bits, iterations):
    weight, mask = example()
    salient = SalientSet.of(weight, mask)
    scales = salient.row_scales(iterations)
    codes = salient.codes(scales, bits)
    assert codes.dtype == np.uint8
    assert codes.max() < 2 ** (bits - 1)
    levels = np.linspace(-1, 1, 2**bits + 1)
    midpoints = (levels[:-1] + levels[1:]) / 2
    relaxed = np.clip(salient.values / scales[salient.rows], -1, 1)
    nearest = np.abs(relaxed[:, None] - midpoints).min(axis=1)
    chosen = np.sign(salient.values) * (2.0 * codes + 1) / 2**bits
    assert set(chosen) <= set(midpoints)
    assert np.abs(relaxed - chosen) == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize("iterations", [None, 1, 5])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_errors_are_those_of_the_weights(iterations, bits):
    weight, mask = example()
    salient = SalientSet.of(weight, mask)
    scales = salient.row_scales(iterations)
    relaxed = discrete = 0.0
    for value, row, code in zip(salient.values, salient.rows, salient.codes(scales, bits), strict=True):
        scale = scales[row]
        relaxed += (value - scale * np.clip(value / scale, -1, 1)) ** 2
        discrete += (value - np.sign(value) * scale * (2 * int(code) + 1) / 2**bits) ** 2
    assert salient.relaxed_error(scales) == pytest.approx(relaxed, rel=1e-9, abs=1e-12)
    assert salient.discrete_error(scales, bits) == pytest.approx(discrete, rel=1e-9)


def test_at_the_fixed_point_the_relaxed_error_is_zero():
    salient = SalientSet.of(*example())
    assert salient.relaxed_error(salient.row_scales(None)) == 0
    assert salient.relaxed_error(salient.row_scales(3)) > 0


def test_more_bits_lose_less():
    salient = SalientSet.of(*example())
    scales = salient.row_scales(None)
    errors = [salient.discrete_error(scales, bits) for bits in range(1, 9)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    # Each weight lies within half a cell, a / 2**bits, of its midpoint.
    for bits, error in enumerate(errors, start=1):
        assert error <= np.square(scales[salient.rows] / 2**bits).sum() * (1 + 1e-9)
