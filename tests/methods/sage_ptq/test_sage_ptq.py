"""SAGE-PTQ as a whole: what is stored follows from the equations, and every option does what it says."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kernels.errors import InputError
from kernels.layouts import CodebookWeight, load_packed, save_packed
from methods import LayerContext, LayerStatistics, create_method
from methods.sage_ptq import SagePtqConfig


def weights(rows=60, columns=100, seed=0):
    """Weights with a tail heavier than a Gaussian's, as real ones have."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy((0.02 * generator.standard_t(6, (rows, columns)) + 0.0002).astype(np.float32))


def sage(weight, context=None, statistics=None, **options):
    return create_method("sage-ptq", **options).quantize_linear(weight, statistics, context)


def relative_error(packed, weight):
    return float((packed.decode() - weight).square().sum() / weight.square().sum())


# What is stored


@pytest.mark.parametrize("options", [{}, {"quantiles": "empirical"}, {"group_count": 3, "max_salient": 0.1}], ids=str)
def test_unsalient_weights_become_the_mean_magnitude_of_their_group(options):
    weight = weights()
    context = LayerContext()
    packed = sage(weight, context, scale_dtype="float32", **options)
    index, decoded = packed.index(), packed.decode()
    assert torch.equal(packed.negative(), weight < 0)
    groups = context.facts["groups"]
    assert packed.tensors()["levels"].shape == (groups,)
    tops = [-1.0]
    for group in range(1, groups + 1):
        members = weight[index == group].abs()
        if members.numel():
            assert decoded[index == group].abs().unique().numel() == 1
            assert float(decoded[index == group].abs()[0]) == pytest.approx(float(members.double().mean()), rel=1e-6)
            assert float(members.min()) > tops[-1]  # groups follow each other in magnitude
            tops.append(float(members.max()))
    assert float(weight[index == 0].abs().min()) > tops[-1]


def test_group_edges_are_equation_4_and_the_salient_set_equation_2():
    weight = weights()
    context = LayerContext()
    packed = sage(weight, context, group_count=9, threshold="fixed", max_salient=0.02)
    mean, deviation = float(weight.double().mean()), float(weight.double().std(correction=0))
    magnitudes, index = weight.abs().double(), packed.index()
    edges = [mean + deviation * norm.ppf((1 + k * 0.98 / 9) / 2) for k in range(1, 10)]
    assert torch.equal(index == 0, magnitudes > edges[-1])
    assert edges[-1] == pytest.approx(mean + deviation * norm.ppf(1 - 0.02 / 2))
    expected = 1 + sum((magnitudes > edge).int() for edge in edges[:-1])
    expected[magnitudes > edges[-1]] = 0
    assert torch.equal(index.int(), expected)
    assert context.facts["zeta"] == 0.02
    assert context.facts["salient_fraction"] == pytest.approx(float((index == 0).float().mean()))


def test_the_scale_of_a_row_is_its_largest_magnitude():
    weight = weights()
    packed = sage(weight, scale_dtype="float32", max_salient=0.05)
    salient = packed.index() == 0
    maximum = torch.where(salient, weight.abs(), 0).amax(dim=1)
    assert torch.equal(packed.tensors()["row_scales"], maximum)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_a_salient_weight_is_within_half_a_cell(bits, scale_dtype):
    weight = weights()
    packed = sage(weight, salient_bits=bits, max_salient=0.05, scale_dtype=scale_dtype)
    salient = packed.index() == 0
    scales = packed.tensors()["row_scales"].float().view(-1, 1).expand_as(weight)
    error = (packed.decode() - weight).abs()
    # A cell is 2a / 2**bits wide. A scale that is rounded down leaves the row's largest weight beyond the last cell.
    beyond = (weight.abs() - scales).clamp(min=0)
    assert salient.sum() > 100
    assert (error[salient] <= (scales / 2**bits + beyond + 1e-7)[salient]).all()
    assert (beyond <= scales * torch.finfo(getattr(torch, scale_dtype)).eps)[salient].all()


def test_an_unsalient_weight_is_within_its_group():
    weight = weights()
    packed = sage(weight, scale_dtype="float32")
    index = packed.index()
    error = (packed.decode() - weight).abs()
    for group in range(1, int(index.max()) + 1):
        members = weight[index == group].abs()
        assert float(error[index == group].max()) <= float(members.max() - members.min()) * (1 + 1e-5)


def test_equal_counts_in_empirical_groups():
    packed = sage(weights(), quantiles="empirical", saliency="none")
    counts = torch.bincount(packed.index().view(-1).long())[1:]
    assert counts.sum() == 6000
    assert counts.max() - counts.min() <= 1


def test_equation_4_to_the_letter_makes_one_group_of_nearly_all():
    weight = weights()
    packed = sage(weight, quantiles="printed", threshold="fixed")
    counts = torch.bincount(packed.index().view(-1).long())
    mean, deviation = float(weight.double().mean()), float(weight.double().std(correction=0))
    assert counts[0] == (weight.abs().double() > mean + deviation * norm.ppf(1 - 0.01 / 2)).sum()
    assert counts[1] == weight.numel() - counts[0]
    assert relative_error(packed, weight) > 3 * relative_error(sage(weight), weight)


@pytest.mark.parametrize("quantiles", ["gaussian", "empirical", "printed"])
def test_equation_2_to_the_letter_makes_every_weight_salient(quantiles):
    weight = weights()
    packed = sage(weight, saliency="printed", quantiles=quantiles, scale_dtype="float32")
    assert packed.salient == weight.numel()
    # Nothing but Mode 1 is left: 4 bits a weight, the midpoints of 16 cells below the row's largest magnitude.
    scales = weight.abs().amax(dim=1, keepdim=True)
    cells = (weight.abs() / scales * 8).floor().clamp(max=7)
    assert torch.allclose(packed.decode(), weight.sign() * scales * (2 * cells + 1) / 16)
    assert create_method("sage-ptq").nominal_bits(packed).weight == 4.0


def test_each_hessian_score_chooses_weights_of_its_own():
    weight = weights()
    torch.manual_seed(0)
    mix = torch.randn(100, 100) / 10 + torch.eye(100)
    statistics = LayerStatistics.from_inputs(torch.randn(2, 200, 100) @ mix * torch.linspace(0.1, 3, 100))
    masks = [
        sage(weight, None, statistics, saliency="hessian", hessian_score=score, threshold="fixed").index() == 0
        for score in ("factor", "inverse", "inverse-squared")
    ]
    assert all(mask.sum() == 60 for mask in masks)
    assert all(not torch.equal(one, other) for one, other in pairwise(masks))


def test_the_payload_is_about_five_bits():
    weight = weights(512, 512)
    packed = sage(weight)
    roles = packed.bytes_by_role()
    assert roles["sign"] == 512 * 512 // 8
    assert roles["index"] == 512 * 512 // 2
    assert roles["scale"] == 512 * 2
    assert roles["code"] == -(-3 * packed.salient // 8)
    assert 5.0 < packed.payload_bits() < 5.15


def test_without_saliency_no_row_scales_are_stored():
    packed = sage(weights(), saliency="none")
    assert packed.salient == 0
    assert set(packed.tensors()) == {"signs", "index", "levels"}
    assert (packed.index() > 0).all()
    nominal = create_method("sage-ptq").nominal_bits(packed)
    assert (nominal.weight, nominal.scale) == (1.0, 0.0)


def test_no_salient_fraction_is_no_saliency():
    weight = weights()
    none, zero = sage(weight, saliency="none"), sage(weight, max_salient=0.0)
    assert all(torch.equal(tensor, zero.tensors()[name]) for name, tensor in none.tensors().items())


def test_nominal_bits_are_the_papers_count():
    weight = weights(100, 400)
    for salient_bits in (2, 4):
        method = create_method("sage-ptq", salient_bits=salient_bits, group_count=9)
        packed = method.quantize_linear(weight)
        zeta = packed.salient / 40_000
        nominal = method.nominal_bits(packed)
        assert nominal.weight == pytest.approx(1 - zeta + salient_bits * zeta)
        assert nominal.scale == 16 / 400
    assert 1.03 <= nominal.weight < 1.08  # heavy tails let a little more than 1 % through


@pytest.mark.parametrize(
    ("options", "index_bits"),
    [({"n_lut": n, "max_nodes": 80}, n) for n in range(2, 7)]
    + [({"group_count": n}, bits) for n, bits in [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (63, 6)]],
    ids=str,
)
def test_the_index_has_the_bits_that_the_groups_and_the_salient_mark_need(options, index_bits):
    context = LayerContext()
    packed = sage(weights(), context, **options)
    assert packed.index_bits == index_bits
    assert int(np.ceil(np.log2(context.facts["groups"] + 1))) == index_bits
    assert packed.bytes_by_role()["index"] == 6000 * index_bits // 8


# Options


OPTIONS = [
    {},
    *({"n_lut": n} for n in (2, 3, 5)),
    {"n_lut": 6, "max_nodes": 80},
    *({"salient_bits": bits} for bits in (1, 2, 3, 8)),
    {"first_layer_salient_bits": 8},
    {"max_salient": 0.0},
    {"max_salient": 0.5},
    {"neighbors": 10},
    {"neighbors": 1000},
    {"subsample": 0.5, "max_nodes": 64},
    {"node": "magnitude"},
    {"silhouette_on": "embedding"},
    {"quantiles": "empirical"},
    {"quantiles": "empirical", "max_salient": 0.1, "iterations": 3},
    {"saliency": "hessian"},
    {"saliency": "hessian", "quantiles": "empirical"},
    {"saliency": "hessian", "threshold": "fixed", "damping": 0.1},
    {"saliency": "hessian", "objective": "discrete", "max_salient": 0.1},
    {"saliency": "none"},
    {"saliency": "none", "quantiles": "empirical"},
    {"threshold": "fixed"},
    {"objective": "discrete"},
    {"group_count": 1},
    {"group_count": 63},
    {"iterations": 1},
    {"iterations": 20},
    {"preset": "opt"},
    {"preset": "llama"},
    {"preset": "qwen"},
    {"scale_dtype": "bfloat16"},
    {"seed": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_and_survives_saving_bit_for_bit(tmp_path, options):
    weight = weights()
    before = weight.clone()
    statistics = None
    if options.get("saliency") == "hessian":
        torch.manual_seed(0)
        statistics = LayerStatistics.from_inputs(torch.randn(2, 100, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = sage(weight, statistics=statistics, **options)
    assert isinstance(packed, CodebookWeight)
    assert torch.equal(weight, before)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    assert torch.equal(load_packed(tmp_path / "w.safetensors")["layer"].decode(), packed.decode())
    assert 0 < relative_error(packed, weight) < 0.4  # one level for all: 1 - 2/pi on a Gaussian


def test_more_groups_more_bits_and_more_salient_weights_lose_less():
    weight = weights()
    by_groups = [relative_error(sage(weight, group_count=count), weight) for count in (1, 3, 7, 15, 63)]
    by_bits = [relative_error(sage(weight, salient_bits=bits, group_count=7), weight) for bits in (1, 2, 4)]
    by_salient = [relative_error(sage(weight, max_salient=zeta, group_count=7), weight) for zeta in (0.0, 0.01, 0.05)]
    for errors in (by_groups, by_bits, by_salient):
        assert all(later < earlier for earlier, later in pairwise(errors))


def test_a_truncated_mode_1_clips_the_outliers():
    weight = weights()
    truncated, converged = (sage(weight, iterations=steps, max_salient=0.1, threshold="fixed") for steps in (1, None))
    rows = converged.tensors()["row_scales"]
    assert (truncated.tensors()["row_scales"] <= rows).all()
    assert (truncated.tensors()["row_scales"] < rows).any()


def test_the_first_block_may_have_salient_bits_of_its_own():
    weight = weights()
    for block, bits in ((0, 8), (1, 2), (7, 2)):
        context = LayerContext(block=block)
        packed = sage(weight, context, salient_bits=2, first_layer_salient_bits=8, group_count=9)
        assert packed.salient_bits == bits
        assert context.facts["salient_bits"] == bits
    assert sage(weight, LayerContext(block=0), salient_bits=2, group_count=9).salient_bits == 2


def test_hessian_saliency_needs_statistics_and_nothing_else_does():
    assert create_method("sage-ptq").needs == "nothing"
    assert create_method("sage-ptq", saliency="none").needs == "nothing"
    assert create_method("sage-ptq", saliency="hessian").needs == "hessian"
    with pytest.raises(InputError, match="q_proj: method 'sage-ptq' needs the layer's inputs"):
        sage(weights(), LayerContext("q_proj"), saliency="hessian")


def test_hessian_saliency_looks_at_the_inputs():
    weight = weights()
    torch.manual_seed(0)
    statistics = LayerStatistics.from_inputs(torch.randn(2, 300, 100) * torch.linspace(0.1, 3, 100))
    packed = sage(weight, statistics=statistics, saliency="hessian", threshold="fixed", max_salient=0.05)
    salient = packed.index() == 0
    assert salient.sum() == 300
    assert salient[:, 75:].sum() > 4 * salient[:, :25].sum()


def test_only_the_graph_depends_on_the_seed():
    weight = weights()
    first, second = (sage(weight, seed=seed, group_count=11) for seed in (0, 1))
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


# Presets


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("opt", {"salient_bits": 2, "first_layer_salient_bits": 4, "max_salient": 0.1, "neighbors": 10}),
        ("llama", {"salient_bits": 4, "first_layer_salient_bits": None, "max_salient": 0.01, "neighbors": 5}),
        ("qwen", {"salient_bits": 2, "first_layer_salient_bits": None, "max_salient": 0.1, "neighbors": 5}),
    ],
)
def test_a_preset_is_the_papers_settings_and_nothing_else(preset, settings):
    config = create_method("sage-ptq", preset=preset).config
    # The config holds what the preset stands for, not its name.
    assert config.model_dump() == {**SagePtqConfig().model_dump(), **settings}


def test_options_beside_a_preset_win():
    config = create_method("sage-ptq", preset="opt", salient_bits=3, neighbors=7, n_lut=3).config
    assert (config.salient_bits, config.neighbors, config.n_lut, config.max_salient) == (3, 7, 3, 0.1)
    # An option given at its default value was given all the same.
    assert create_method("sage-ptq", preset="opt", max_salient=0.01).config.max_salient == 0.01
    config = create_method("sage-ptq", preset="opt", first_layer_salient_bits=None).config
    assert config.first_layer_salient_bits is None


@pytest.mark.parametrize("options", [{}, {"neighbors": 7}, {"max_salient": 0.01, "salient_bits": 4}], ids=str)
@pytest.mark.parametrize("preset", ["opt", "llama", "qwen"])
def test_a_config_written_out_and_read_again_is_the_same(preset, options):
    config = create_method("sage-ptq", preset=preset, **options).config
    for written in (config.model_dump(), config.model_dump(exclude_defaults=True)):
        assert create_method("sage-ptq", **written).config == config


# Odd weights


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (1, 15)])
def test_a_matrix_too_small_for_the_graph_is_refused_with_a_way_out(shape):
    with pytest.raises(InputError, match=r"unsalient weights are too few .*; set group_count, or lower n_lut"):
        sage(weights(*shape))
    assert sage(weights(*shape), group_count=2).shape == shape


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("quantiles", ["gaussian", "empirical"])
def test_a_constant_matrix_is_decoded_to_its_value(value, quantiles):
    weight = torch.full((40, 50), value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = sage(weight, quantiles=quantiles, scale_dtype="float32", group_count=9).decode()
    torch.testing.assert_close(decoded, weight, rtol=1e-6, atol=0)


def test_zeros_among_the_weights_belong_to_the_first_group():
    weight = weights()
    weight[:, ::2] = 0
    packed = sage(weight)
    assert (packed.index()[weight == 0] == 1).all()


def test_tied_magnitudes_share_a_group():
    weight = torch.sign(weights()) * torch.randint(1, 6, (60, 100), generator=torch.Generator().manual_seed(0)) / 50
    for quantiles in ("gaussian", "empirical"):
        packed = sage(weight, quantiles=quantiles, group_count=9)
        for magnitude in weight.abs().unique():
            assert packed.index()[weight.abs() == magnitude].unique().numel() == 1


def test_levels_of_empty_groups_are_zero_and_named_by_no_weight():
    weight = torch.sign(weights(20, 30)) * 0.5
    weight[:, ::2] /= 5  # two magnitudes for nine groups
    packed = sage(weight, group_count=9, saliency="none", scale_dtype="float32")
    used = packed.index().unique().tolist()
    levels = packed.tensors()["levels"].tolist()
    assert len(used) == 2
    assert [level for k, level in enumerate(levels, start=1) if k not in used] == [0.0] * 7
    torch.testing.assert_close(packed.decode(), weight)
