"""BiLLM: equality with the authors' code and with the slow reference, the compensation modes, and what is stored."""

import billm_reference as reference
import pytest
import torch
from safetensors.torch import load_file

from kernels.errors import InputError
from kernels.layouts import load_packed, save_packed
from methods import LayerContext, LayerStatistics, create_method
from methods.billm.block import Masks, fit_block
from methods.billm.search import choose_break_point, choose_salient_columns, linear_thresholds, quantile_thresholds
from methods.hessian import damped

MODES = ["block", "block-exact", "column"]


def problem(rows, columns, *, seed=0, dead=None):
    """A weight with a few outliers, and statistics of correlated inputs of uneven size."""
    torch.manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < 0.01] *= 8
    mixing = 0.6 * torch.eye(columns) + 0.8 * torch.randn(columns, columns) / columns**0.5
    inputs = (torch.randn(8, 2 * columns, columns) @ mixing) * torch.exp(0.5 * torch.randn(columns))
    if dead is not None:
        inputs[..., dead] = 0
    return weight, LayerStatistics.from_inputs(inputs)


def row_levels(weight, block_size):
    """The largest magnitude of each (row, block), spread over the matrix."""
    parts = [part.abs().amax(dim=1, keepdim=True).expand_as(part) for part in weight.split(block_size, dim=1)]
    return torch.cat(parts, dim=1)


GOLDEN = [("billm-hes", 0), ("billm-hes", 1), ("billm-hes", 2), ("billm-mag", 0)]


@pytest.mark.parametrize(("case", "layer"), GOLDEN)
def test_equals_the_authors_code(golden, case, layer):
    vector = golden(case, layer)
    method = create_method(
        "billm", metric=vector.options["metric"], block_size=vector.options["blocksize"], scale_dtype="float32"
    )
    packed = method.quantize_linear(vector.weight, vector.statistics)
    decoded = packed.decode()
    # A level is a sum of up to three signed constants. Where they nearly cancel, the rounding noise of the authors'
    # float32 Cholesky factor (1e-7 of a weight) is more than 1e-5 of the tiny sum; so the difference is measured
    # against the largest level of the row's block, and no entry may be off.
    difference = (decoded - vector.quantized).abs() / row_levels(vector.quantized, 128)
    assert difference.max() < 1e-5
    # Nor does any differ by more than the authors' own result does when their H moves by 1e-6 of itself.
    assert (decoded - vector.quantized).abs().max() <= vector.noise
    # Measured against each sum itself, only such levels differ: 2 in 1000 at most, nearly all in salient columns.
    assert vector.mismatch(decoded) < 2e-3
    # The first block sees no factor in its constants: there the noise is gone and only the merged mean is left.
    first = (decoded - vector.quantized).abs()[:, :128] > 1e-5 * vector.quantized.abs()[:, :128]
    assert first.float().mean() < 1e-3


def exact_transcription(vector):
    """The released algorithm, literally, in float64 but for H's damping and the thresholds tried: what the authors'
    float32 result approximates."""
    hessian, dead = damped(vector.statistics.hessian, 0.01)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    weight = vector.weight.masked_fill(dead, 0).double()
    return reference.quantize(weight, upper, metric=vector.options["metric"])


@pytest.mark.parametrize(("case", "layer"), GOLDEN)
def test_equals_the_released_algorithm_in_exact_arithmetic(golden, case, layer):
    vector = golden(case, layer)
    method = create_method("billm", metric=vector.options["metric"], scale_dtype="float32")
    packed = method.quantize_linear(vector.weight, vector.statistics)
    exact = exact_transcription(vector)
    salient, sparse = packed.salient_columns(), torch.zeros(packed.shape, dtype=torch.bool)
    sparse[:, ~salient] = packed.sparse()
    assert torch.equal(salient, exact.salient)
    assert torch.equal(sparse, exact.sparse)
    far = (packed.decode() - exact.quantized).abs() > 1e-5 * exact.quantized.abs() + 1e-9
    assert far.float().mean() < 1e-3
    # The authors' file is float32 too. It lies further from exact arithmetic: 77 of 55296 entries for billm-hes-1,
    # more than 1 in 1000, all of them sums that nearly cancel; so no code can come closer to it than that.
    assert vector.mismatch(packed.decode()) <= vector.mismatch(exact.quantized) + 3e-4


@pytest.mark.parametrize(("case", "layer"), GOLDEN)
def test_masks_equal_the_authors(golden, case, layer):
    vector = golden(case, layer)
    method = create_method("billm", metric=vector.options["metric"], scale_dtype="float32")
    packed = method.quantize_linear(vector.weight, vector.statistics)
    salient = packed.salient_columns()
    sparse = torch.zeros(packed.shape, dtype=torch.bool)
    sparse[:, ~salient] = packed.sparse()
    start = 0
    for block in vector.extra["blocks"]:
        part = slice(start, start + block["n_cols"])
        assert salient[part].nonzero().view(-1).tolist() == sorted(block["salient_cols"])
        # The file holds a float32 fraction: as a count it must be the same integer.
        assert int(sparse[:, part].sum()) == round(block["frac_high_group"] * sparse[:, part].numel())
        start = part.stop
    # Equal counts could hide different weights; the authors' values cannot: a row of a group takes two values.
    for mask in (sparse, ~sparse & ~salient):
        for begin in range(0, mask.shape[1], 128):
            part = slice(begin, begin + 128)
            for row, member in zip(vector.quantized[:, part], mask[:, part], strict=True):
                assert len(row[member].unique()) <= 2


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize(("rows", "columns", "seed"), [(40, 320, 1), (64, 200, 2), (17, 129, 3)])
def test_choices_and_weights_equal_the_slow_reference(metric, rows, columns, seed):
    weight, statistics = problem(rows, columns, seed=seed)
    slow = reference.quantize(weight, statistics.inverse_factor(0.01).upper, metric=metric)
    packed = create_method("billm", metric=metric, scale_dtype="float32").quantize_linear(weight, statistics)
    assert torch.equal(packed.salient_columns(), slow.salient)
    assert torch.equal(packed.sparse(), slow.sparse[:, ~slow.salient])
    difference = (packed.decode() - slow.quantized).abs() / row_levels(slow.quantized, 128)
    assert difference.max() < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_each_search_equals_its_slow_reference(seed):
    torch.manual_seed(seed)
    target = torch.randn(24, 96) ** (1 if seed % 2 else 2)
    scores = target.abs().sum(dim=0)
    salient = choose_salient_columns(target, scores, 1, 49)
    assert torch.equal(salient, reference.salient_columns(target, scores))
    thresholds = quantile_thresholds(target, salient)
    index = choose_break_point(target, salient, thresholds)
    assert float(thresholds[index]) == pytest.approx(reference.break_point(target, salient), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_weights_at_a_threshold_belong_to_the_sparse_group(seed):
    torch.manual_seed(seed)
    target = torch.randint(-4, 5, (1, 12)).float()
    salient = torch.zeros(12, dtype=torch.bool)
    for threshold in (1.0, 2.0, 3.0, 4.0):
        # Against a split between values, the only candidate with the same groups is the one just below the threshold.
        below = (target.abs() < threshold).expand_as(target)
        error = target - reference.residual(target, below, 1) - reference.residual(target, ~below, 1)
        candidates = torch.tensor([threshold, threshold - 0.5, threshold + 0.5])
        errors = []
        for candidate in candidates[1:]:
            inner = target.abs() < candidate
            split = target - reference.residual(target, inner, 1) - reference.residual(target, ~inner, 1)
            errors.append(float(split.square().sum()))
        assert errors[0] == pytest.approx(float(error.square().sum()), abs=1e-5)
        wins = errors[0] <= errors[1] + 1e-5
        assert choose_break_point(target, salient, candidates) == (0 if wins else 2)


def test_first_of_equal_candidates_wins():
    # Two values a row: every threshold between them gives the same split, and the same error, as the first does.
    target = torch.tensor([[1.0, -1.0, 8.0, -8.0]] * 3)
    salient = torch.zeros(4, dtype=torch.bool)
    assert choose_break_point(target, salient, torch.tensor([0.5, 2.0, 3.0, 7.0, 9.0])) == 1
    # One column: its binarization is exact for any count; the first count is the least.
    column = torch.randn(5, 8).abs()
    column[:, 1:] = 0
    assert int(choose_salient_columns(column, column.sum(dim=0), 1, 49).sum()) == 1


def test_search_copes_with_blocks_that_are_all_salient_or_all_zero():
    zeros = torch.zeros(4, 16)
    salient = choose_salient_columns(zeros, zeros.sum(dim=0), 1, 49)
    assert int(salient.sum()) == 1
    assert choose_break_point(zeros, salient, quantile_thresholds(zeros, salient)) == 0
    everything = torch.ones(1, dtype=torch.bool)
    column = torch.randn(4, 1)
    assert torch.equal(choose_salient_columns(column, column.abs().sum(dim=0), 1, 49), everything)
    assert choose_break_point(column, everything, quantile_thresholds(column, everything)) == 0


def test_masks_partition_the_block_and_empty_ones_store_zero():
    torch.manual_seed(0)
    weight = torch.randn(6, 20)
    salient = torch.zeros(20, dtype=torch.bool)
    block = fit_block(weight, Masks(salient, torch.zeros(6, 20, dtype=torch.bool)), torch.float32)
    assert (block.means[:, 1:] == 0).all()
    assert (block.scales[:, 1:] == 0).all()
    expected = weight.mean(dim=1, keepdim=True)
    expected = expected + (weight - expected).abs().mean(dim=1, keepdim=True) * (weight - expected).sign()
    torch.testing.assert_close(block.decode(), expected, rtol=1e-6, atol=1e-7)


def test_merged_salient_mean_changes_no_more_than_rounding():
    weight, _ = problem(64, 128)
    salient = torch.zeros(128, dtype=torch.bool)
    salient[::9] = True
    block = fit_block(weight, Masks(salient, torch.zeros(64, 128, dtype=torch.bool)), torch.float32)
    literal = reference.residual(weight, salient.expand_as(weight), 2)[:, salient]
    unit = torch.finfo(torch.float32).eps * literal.abs().max()
    assert (block.decode()[:, salient] - literal).abs().max() <= 4 * unit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_squared_error_is_the_true_trace_of_what_decodes(mode, scale_dtype):
    weight, statistics = problem(32, 320)
    context = LayerContext()
    method = create_method("billm", compensation=mode, scale_dtype=scale_dtype)
    error = (weight - method.quantize_linear(weight, statistics, context).decode()).double()
    trace = float(((error @ damped(statistics.hessian, 0.01)[0].double()) * error).sum())
    assert context.facts["squared_error"] == pytest.approx(trace, rel=1e-4)


def test_exact_and_column_compensation_lower_the_loss():
    weight, statistics = problem(64, 512)
    losses = []
    for mode in MODES:
        context = LayerContext()
        create_method("billm", compensation=mode).quantize_linear(weight, statistics, context)
        losses.append(context.facts["squared_error"])
    assert losses[0] > losses[1] > losses[2]


def test_column_compensation_keeps_the_masks_and_constants_of_the_block_start():
    weight, statistics = problem(32, 128)
    block = create_method("billm", compensation="block").quantize_linear(weight, statistics)
    column = create_method("billm", compensation="column").quantize_linear(weight, statistics)
    for name in ("means", "scales", "groups", "salient_columns"):
        assert torch.equal(block.tensors()[name], column.tensors()[name])
    assert not torch.equal(block.tensors()["signs"], column.tensors()["signs"])


def test_search_on_weights_splits_by_weight_and_search_on_saliency_by_saliency():
    weight, statistics = problem(32, 128)
    pivots = statistics.inverse_factor(0.01).diagonal()
    for search_on, target in (("weight", weight.abs()), ("saliency", weight**2 / pivots**2)):
        packed = create_method("billm", search_on=search_on).quantize_linear(weight, statistics)
        values, sparse = target[:, ~packed.salient_columns()], packed.sparse()
        assert sparse.any()
        assert values[sparse].min() > values[~sparse].max()


def test_paper_ranges_replace_those_of_the_code():
    weight, statistics = problem(48, 256)
    released = create_method("billm").quantize_linear(weight, statistics, context := LayerContext())
    fewest, most = context.facts["salient_columns_per_block"]
    assert 1 <= fewest <= most <= 49
    paper = create_method("billm", faithful=False).quantize_linear(weight, statistics, context := LayerContext())
    fewest, most = context.facts["salient_columns_per_block"]
    assert 3 <= fewest <= most <= 30
    assert not torch.equal(released.decode(), paper.decode())


def test_linear_thresholds_are_shares_of_the_largest_weight_that_is_not_salient():
    target = torch.tensor([[1.0, -2.0, 50.0]])
    thresholds = linear_thresholds(target, torch.tensor([False, False, True]))
    assert thresholds[0] == pytest.approx(0.2)
    assert thresholds[-1] == pytest.approx(1.8)
    assert len(thresholds) == 81


@pytest.mark.parametrize("mode", MODES)
def test_partial_last_block_is_stored_and_read_back_and_counted(tmp_path, mode):
    rows, columns = 16, 576
    weight, statistics = problem(rows, columns, dead=5)
    method = create_method("billm", compensation=mode)
    packed = method.quantize_linear(weight, statistics)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    assert torch.equal(load_packed(tmp_path / "w.safetensors")["layer"].decode(), packed.decode())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "w.safetensors").values())
    salient = int(packed.salient_columns().sum())
    signs, groups = rows * (columns + salient), rows * (columns - salient)
    assert 8 * stored == 8 * packed.nbytes() == signs + groups + columns + 7 * 16 * rows * 5
    # Signs, residual signs and group bits are two bits a weight whatever the salient share is.
    assert signs + groups == 2 * rows * columns
    r = salient / columns
    assert packed.payload_bits() == pytest.approx((1 + r) + (1 - r) + 7 * 16 * 5 / columns + 1 / rows, rel=1e-12)
    assert method.nominal_bits(packed).weight == pytest.approx(2 * r + (1 - r))
    assert method.nominal_bits(packed).scale == 0


def test_payload_approaches_2_875_bits_in_tall_matrices():
    weight, statistics = problem(4096, 128)
    packed = create_method("billm").quantize_linear(weight, statistics)
    assert packed.payload_bits() == 2.875 + 1 / 4096


@pytest.mark.parametrize(("columns", "block_size"), [(1, 128), (7, 3), (64, 128), (40, 1)])
def test_narrow_matrices_and_blocks(columns, block_size):
    weight, statistics = problem(8, columns)
    for mode in MODES:
        for is_faithful in (True, False):
            method = create_method("billm", block_size=block_size, compensation=mode, faithful=is_faithful)
            decoded = method.quantize_linear(weight, statistics).decode()
            assert decoded.shape == weight.shape
            assert torch.isfinite(decoded).all()


def test_arguments_are_left_as_they_were():
    weight, statistics = problem(8, 160, dead=3)
    before, hessian = weight.clone(), statistics.hessian.clone()
    for mode in MODES:
        create_method("billm", compensation=mode).quantize_linear(weight, statistics)
        assert torch.equal(weight, before)
        assert torch.equal(statistics.hessian, hessian)


def test_nan_weights_and_missing_statistics_are_refused():
    weight, statistics = problem(8, 64)
    with pytest.raises(InputError, match="needs the layer's inputs"):
        create_method("billm").quantize_linear(weight)
    weight[2, 3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        create_method("billm").quantize_linear(weight, statistics)
