"""PB-LLM: equality with the authors' code, the switched defects, and what is stored."""

import math

import pytest
import torch
from safetensors.torch import load_file

from kernels.errors import InputError
from kernels.layouts import load_packed, save_packed
from methods import LayerContext, LayerStatistics, create_method
from methods.hessian import damped


def problem(rows, columns, *, seed=0, dead=None):
    """A Gaussian weight, and statistics of correlated inputs of which column `dead` never fires."""
    torch.manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns)
    inputs = torch.randn(8, 2 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    if dead is not None:
        inputs[..., dead] = 0
    return weight, LayerStatistics.from_inputs(inputs)


GOLDEN = [("pb-hes-g128", 0), ("pb-hes-row", 0), ("pb-hes-row", 1), ("pb-mag-row", 0)]


def faithful(options):
    """The method with the options of a golden vector."""
    return create_method(
        "pb-llm",
        salient_fraction=1 - options["low_frac"],
        salient_bits=options["high_bit"],
        metric=options["metric"],
        group_size=options["groupsize"],
        block_size=options["blocksize"],
        damping=options["percdamp"],
        faithful=True,
        scale_dtype="float32",
    )


@pytest.mark.parametrize(("case", "layer"), GOLDEN)
def test_faithful_equals_the_authors_code(golden, case, layer):
    vector = golden(case, layer)
    packed = faithful(vector.options).quantize_linear(vector.weight, vector.statistics)
    # An 8-bit code on a rounding tie moves its row's later columns too: the vector's own sensitivity says how many.
    assert vector.mismatch(packed.decode()) <= max(1e-3, vector.sensitivity)


@pytest.mark.parametrize(("case", "layer"), GOLDEN)
def test_faithful_mask_and_constants_equal_the_authors(golden, case, layer):
    vector = golden(case, layer)
    packed = faithful(vector.options).quantize_linear(vector.weight, vector.statistics)
    binarized = ~packed.mask()
    parts = binarized.split(packed.group_size, dim=1)
    counted = [[int(part.sum()), part.numel()] for part in parts]
    assert counted == [list(pair) for pair in vector.extra["low_count_of_numel_per_group"]]
    tensors = packed.tensors()
    for group, (scales, means) in enumerate(
        zip(vector.extra["low_scale_head"], vector.extra["low_mean_head"], strict=True)
    ):
        torch.testing.assert_close(tensors["scales"][: len(scales), group], torch.tensor(scales), rtol=1e-5, atol=0)
        torch.testing.assert_close(tensors["means"][: len(means), group], torch.tensor(means), rtol=1e-5, atol=1e-9)
    # A binarized weight of the authors' result is one of two values of its row and group; a salient one is on a grid.
    mean = tensors["means"].repeat_interleave(packed.group_size, 1)[:, : packed.shape[1]]
    scale = tensors["scales"].repeat_interleave(packed.group_size, 1)[:, : packed.shape[1]]
    distance = ((vector.quantized - mean).abs() - scale).abs()
    assert distance[binarized].max() < 1e-6
    assert (distance[~binarized] < 1e-6).float().mean() < 0.01


def test_binary_scale_is_shrunk_by_the_low_fraction_in_the_authors_code_alone():
    # White inputs and long rows: what the zeros at salient positions add to the mean deviation, |mean|, is then small.
    torch.manual_seed(0)
    weight, statistics = 0.05 * torch.randn(16, 2048), LayerStatistics.from_hessian(torch.eye(2048))
    for fraction in (0.05, 0.1, 0.2, 0.5):
        ratios = {}
        for is_faithful in (True, False):
            method = create_method("pb-llm", salient_fraction=fraction, faithful=is_faithful, scale_dtype="float32")
            packed = method.quantize_linear(weight, statistics)
            binarized = ~packed.mask()
            count = binarized.sum(dim=1, keepdim=True)
            mean = (weight * binarized).sum(dim=1, keepdim=True) / count
            optimum = ((weight - mean).abs() * binarized).sum(dim=1, keepdim=True) / count
            ratios[is_faithful] = float((packed.tensors()["scales"] / optimum).mean())
        assert ratios[True] == pytest.approx(1 - fraction, abs=0.01)
        assert ratios[False] == pytest.approx(1, abs=1e-5)


def test_corrected_scale_lowers_the_error_of_half_binarized_weights():
    weight, statistics = problem(64, 256)
    errors = {}
    for is_faithful in (True, False):
        method = create_method("pb-llm", salient_fraction=0.5, faithful=is_faithful)
        errors[is_faithful] = float((weight - method.quantize_linear(weight, statistics).decode()).square().mean())
    assert errors[False] < errors[True]


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_salient_weights_are_those_above_the_group_threshold(metric, group_size):
    weight, statistics = problem(16, 320)
    packed = create_method("pb-llm", metric=metric, group_size=group_size).quantize_linear(weight, statistics)
    pivots = statistics.inverse_factor(0.01).diagonal()
    importance = weight.abs() if metric == "magnitude" else weight**2 / pivots**2
    size = 320 if group_size == -1 else group_size
    for start in range(0, 320, size):
        values = importance[:, start : start + size]
        threshold = values.flatten().sort().values[math.floor(values.numel() * 0.9)]
        assert torch.equal(packed.mask()[:, start : start + size], values > threshold)


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("dead", [None, 5])
def test_ties_at_the_threshold_do_not_change_the_salient_share_unless_faithful(metric, dead):
    weight, statistics = problem(16, 320, dead=dead)
    weight = weight.mul(40).round() / 40  # so few values that every threshold is met by several
    shares = {}
    for is_faithful in (False, True):
        method = create_method("pb-llm", metric=metric, group_size=64, faithful=is_faithful)
        mask = method.quantize_linear(weight, statistics).mask()
        shares[is_faithful] = [int(part.sum()) for part in mask.split(64, dim=1)]
    # Above rank floor(0.9 * 1024), as without ties; a dead input's 16 weights are not ranked.
    with_dead = 1024 - 16 - math.floor(0.9 * (1024 - 16)) - 1
    assert shares[False] == [102 if dead is None else with_dead, 102, 102, 102, 102]
    assert 0 < sum(shares[True]) < sum(shares[False])


def test_squared_error_is_the_true_trace_with_the_damped_hessian():
    weight, statistics = problem(24, 160)
    context = LayerContext()
    quantized = create_method("pb-llm").quantize_linear(weight, statistics, context).decode()
    error = (weight - quantized).double()
    trace = float(((error @ damped(statistics.hessian, 0.01)[0].double()) * error).sum())
    assert context.facts["squared_error"] == pytest.approx(trace, rel=1e-4)


def test_compensation_sees_the_constants_as_stored():
    # In bfloat16 a scale moves by up to 2**-9: if the loop fed back the error of unrounded constants, the identity
    # between its own error and the trace of what decodes would break by about as much.
    weight, statistics = problem(24, 160)
    context = LayerContext()
    method = create_method("pb-llm", scale_dtype="bfloat16", group_size=32)
    error = (weight - method.quantize_linear(weight, statistics, context).decode()).double()
    trace = float(((error @ damped(statistics.hessian, 0.01)[0].double()) * error).sum())
    assert context.facts["squared_error"] == pytest.approx(trace, rel=1e-4)


def test_dead_columns_are_left_out_of_ranking_and_fits_unless_faithful():
    weight, statistics = problem(32, 96, dead=5)
    weight[:, 5] = 10.0  # were it counted, it would own the ranking and every mean
    context = LayerContext()
    packed = create_method("pb-llm", scale_dtype="float32").quantize_linear(weight, statistics, context)
    assert context.facts["dead_columns"] == 1
    assert not packed.mask()[:, 5].any()
    alive = torch.arange(96) != 5
    binarized = ~packed.mask() & alive
    means = (weight * binarized).sum(dim=1) / binarized.sum(dim=1)
    torch.testing.assert_close(packed.tensors()["means"][:, 0], means, rtol=1e-5, atol=1e-7)
    assert int(packed.mask().sum()) == 32 * 95 - (math.floor(32 * 95 * 0.9) + 1)
    # The released code zeroes the column, and binarizes the zeros along with the rest.
    released = create_method("pb-llm", faithful=True).quantize_linear(weight, statistics)
    assert not released.mask()[:, 5].any()
    assert int(released.mask().sum()) == 32 * 96 - (math.floor(32 * 96 * 0.9) + 1)


@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("is_faithful", [False, True])
def test_partial_last_block_is_stored_and_read_back(tmp_path, group_size, is_faithful):
    weight, statistics = problem(12, 576, dead=575)
    method = create_method("pb-llm", group_size=group_size, faithful=is_faithful)
    packed = method.quantize_linear(weight, statistics)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    assert torch.equal(load_packed(tmp_path / "w.safetensors")["layer"].decode(), packed.decode())
    stored = load_file(tmp_path / "w.safetensors").values()
    count, salient, groups = 12 * 576, int(packed.mask().sum()), 1 if group_size == -1 else 5
    by_hand = count // 8 + -(-(count - salient) // 8) + salient + 2 * 2 * 12 * groups + 12 * (2 + 1)
    assert packed.nbytes() == by_hand == sum(tensor.numel() * tensor.element_size() for tensor in stored)


def test_nominal_bits_are_the_headline_of_later_papers():
    weight, statistics = problem(64, 512)
    method = create_method("pb-llm", salient_fraction=0.1)
    packed = method.quantize_linear(weight, statistics)
    nominal = method.nominal_bits(packed)
    assert nominal.weight == pytest.approx(1.7, abs=1e-3)
    assert nominal.scale == 0
    assert packed.payload_bits() > nominal.weight + 1


@pytest.mark.parametrize("fraction", [0.0, 0.999])
def test_extreme_fractions_leave_no_hole(fraction):
    weight, statistics = problem(4, 32)
    packed = create_method("pb-llm", salient_fraction=fraction).quantize_linear(weight, statistics)
    assert torch.isfinite(packed.decode()).all()
    assert packed.salient == (0 if fraction == 0 else 4 * 32 - 1)


def test_arguments_are_left_as_they_were():
    weight, statistics = problem(8, 64, dead=3)
    before, hessian = weight.clone(), statistics.hessian.clone()
    create_method("pb-llm", faithful=True).quantize_linear(weight, statistics)
    assert torch.equal(weight, before)
    assert torch.equal(statistics.hessian, hessian)


def test_nan_weights_and_missing_statistics_are_refused():
    weight, statistics = problem(8, 64)
    with pytest.raises(InputError, match="needs the layer's inputs"):
        create_method("pb-llm").quantize_linear(weight)
    weight[2, 3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        create_method("pb-llm").quantize_linear(weight, statistics)
