"""RTN: equal to the released code, and what its options change."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kernels.errors import InputError
from methods import LayerContext, create_method

CASES = sorted(path.stem for path in (Path(__file__).parents[1] / "golden").glob("rtn*.json"))


def rtn(weight, **options):
    return create_method("rtn", **options).quantize_linear(weight)


def test_there_are_golden_vectors():
    assert CASES == ["rtn4-g128-0", "rtn4-row-0"]


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_released_code(golden, case):
    name, _, layer = case.rpartition("-")
    vector = golden(name, int(layer))
    options = vector.options
    packed = rtn(
        vector.weight,
        bits=options["bits"],
        group_size=options["groupsize"],
        symmetric=options["sym"],
        scale_dtype="float32",
    )
    decoded = packed.decode()
    assert vector.mismatch(decoded) == 0
    error, hessian = (vector.weight - decoded).double(), vector.statistics.hessian.double()
    assert float(((error @ hessian) * error).sum()) == pytest.approx(vector.proxy_loss, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_point_of_the_grid_is_nearer_than_the_one_taken(bits, symmetric):
    torch.manual_seed(bits)
    weight = torch.randn(5, 32)
    packed = rtn(weight, bits=bits, group_size=16, symmetric=symmetric, scale_dtype="float32")
    scales, zeros = packed.scales().repeat_interleave(16, dim=1), packed.zeros().repeat_interleave(16, dim=1)
    points = scales.unsqueeze(-1) * (torch.arange(2**bits) - zeros.unsqueeze(-1).float())
    nearest = (weight.unsqueeze(-1) - points).abs().amin(dim=-1)
    torch.testing.assert_close((weight - packed.decode()).abs(), nearest, rtol=0, atol=1e-6)


def test_more_bits_and_smaller_groups_lose_less():
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    by_bits = [(rtn(weight, bits=bits).decode() - weight).norm() for bits in (2, 3, 4, 8)]
    by_group = [(rtn(weight, bits=3, group_size=size).decode() - weight).norm() for size in (-1, 128, 64, 32)]
    for losses in (by_bits, by_group):
        assert all(later < earlier for earlier, later in pairwise(losses))


def test_relative_error_of_gaussian_weights_is_the_known_one():
    # Relative squared error of min-max grids on Gaussian weights in groups of 128: 0.258 at 2 bits, 0.046 at 3.
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    for bits, known in ((2, 0.258), (3, 0.046)):
        error = float((rtn(weight, bits=bits).decode() - weight).square().sum() / weight.square().sum())
        assert error == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize(("group_size", "share"), [(-1, 0.99), (128, 0.985)])
def test_one_bit_between_minimum_and_maximum_is_a_strawman(group_size, share):
    # Rows of Gaussian weights: 99.9 % of them become 0. In groups of 128 the range is narrower: 99.0 %, give or take.
    torch.manual_seed(0)
    decoded = rtn(torch.randn(64, 4096), bits=1, group_size=group_size).decode()
    assert float((decoded == 0).float().mean()) >= share


def test_payload_is_codes_scales_and_zero_points():
    packed = rtn(torch.randn(64, 256), bits=4, group_size=128)
    assert packed.bytes_by_role() == {"code": 64 * 128, "scale": 64 * 2 * 2, "zero": 64}
    packed = rtn(torch.randn(64, 256), bits=4, group_size=128, symmetric=True)
    assert packed.bytes_by_role() == {"code": 64 * 128, "scale": 64 * 2 * 2}


def test_nominal_bits_count_16_bits_a_constant():
    packed = rtn(torch.randn(4, 256), bits=3, group_size=128)
    nominal = create_method("rtn", bits=3, group_size=128).nominal_bits(packed)
    assert (nominal.weight, nominal.scale) == (3.0, 0.25)
    nominal = create_method("rtn", bits=3, group_size=-1, symmetric=True).nominal_bits(packed)
    assert (nominal.weight, nominal.scale) == (3.0, 16 / 256)


def test_a_group_size_that_does_not_fit_is_refused_before_and_when_quantizing():
    method = create_method("rtn", group_size=100)
    with pytest.raises(InputError, match=r"group_size=100 does not fit in_features=576; use -1 .* 18, 24, 32, 36"):
        method.check_shape(64, 576)
    with pytest.raises(InputError, match="group_size=100"):
        method.quantize_linear(torch.randn(4, 576))


@pytest.mark.parametrize(
    "weight",
    [torch.randn(4), torch.randn(2, 3, 4), torch.ones(4, 4, dtype=torch.int32), torch.randn(0, 4), torch.randn(4, 0)],
    ids=["vector", "three dimensions", "integers", "no rows", "no columns"],
)
def test_what_is_not_a_float_matrix_is_refused_with_the_layer(weight):
    with pytest.raises(InputError, match=r"layers\.3\.q_proj: weight is .*must be a float matrix"):
        create_method("rtn").quantize_linear(weight, None, LayerContext("layers.3.q_proj"))


def test_a_parameter_can_be_quantized():
    weight = torch.nn.Parameter(torch.randn(4, 128))
    decoded = rtn(weight).decode()
    assert not decoded.requires_grad
    assert torch.equal(decoded, rtn(weight.detach()).decode())
