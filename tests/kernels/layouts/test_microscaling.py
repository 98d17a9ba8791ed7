import pytest
import torch

from kernels.errors import InputError
from kernels.layouts import MicroscalingWeight
from kernels.layouts.microscaling import FORMATS, FP4, FP6, FP8, round_blocks, shared_exponents

formats = pytest.mark.parametrize("kind", FORMATS, ids=["fp4", "fp6", "fp8"])


def all_values(kind):
    """Every value of a format, from its definition: sign, exponent and mantissa fields."""
    values = set()
    for exponent in range(1 << kind.exponent_bits):
        for mantissa in range(1 << kind.mantissa_bits):
            fraction = mantissa / (1 << kind.mantissa_bits)
            bias = (1 << (kind.exponent_bits - 1)) - 1
            value = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
            values.add(value)
    return sorted(v for v in values if v <= kind.largest)


def test_the_formats_are_those_of_the_standard():
    assert all_values(FP4) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert all_values(FP6)[-1] == 28 and len(all_values(FP6)) == 32
    assert all_values(FP8)[-1] == 448 and len(all_values(FP8)) == 127
    assert [kind.largest_exponent for kind in FORMATS] == [2, 4, 8]


@formats
def test_rounding_goes_to_the_nearest_value_half_to_even_and_saturates(kind):
    table = torch.tensor(all_values(kind))
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) * kind.largest / 2, table, -table])
    nearest = table[(x.abs()[:, None] - table).abs().argmin(dim=1)]
    middle = (table[1:] + table[:-1]) / 2
    assert torch.equal(kind.round(x).abs(), nearest)
    # Exactly between two values: the one whose last mantissa bit is 0, which is every second one.
    assert torch.equal(kind.round(middle), torch.where(torch.arange(len(middle)) % 2 == 0, table[:-1], table[1:]))
    assert kind.round(torch.tensor([1e9, -1e9])).tolist() == [kind.largest, -kind.largest]


@formats
def test_every_value_survives_its_code(kind):
    table = torch.tensor(all_values(kind))
    values = torch.cat([table, -table])
    codes = kind.encode(values)
    assert int(codes.min()) >= 0 and int(codes.max()) < 1 << kind.bits
    assert torch.equal(kind.decode(codes), values)


@formats
def test_fp8_equals_torch_and_scales_are_powers_of_two(kind):
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    if kind is FP8:
        assert torch.equal(kind.round(x), x.to(torch.float8_e4m3fn).float())
    exponent = shared_exponents(x, kind)
    largest = x.abs().view(8, 3, 32).amax(dim=2)
    assert torch.equal(exponent, torch.floor(torch.log2(largest)).int() - kind.largest_exponent)


def weight_of(segments=(64, 32, 9), rows=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = sum(segments)
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    return weight, torch.randperm(columns, generator=generator), segments


@pytest.mark.parametrize("segments", [(64, 32, 9), (105, 0, 0), (0, 0, 40), (0, 33, 7)])
def test_decode_is_the_rounding_of_each_segment_in_its_format(segments):
    weight, order, segments = weight_of(segments)
    decoded = MicroscalingWeight.pack(weight, order, segments).decode()
    stored, start = weight[:, order], 0
    for kind, width in zip(FORMATS, segments, strict=True):
        if width:
            part = stored[:, start : start + width]
            assert torch.equal(decoded[:, order][:, start : start + width], round_blocks(part, kind))
        start += width


def test_a_shared_exponent_costs_8_bits_a_block():
    weight, order, segments = weight_of((64, 32, 32), rows=16)
    roles = MicroscalingWeight.pack(weight, order, segments).bytes_by_role()
    assert roles == {"code": 16 * (64 * 4 + 32 * 6 + 32 * 8) // 8, "scale": 16 * 4, "permutation": 2 * 128}


def test_inputs_are_rounded_like_weights():
    weight, order, segments = weight_of()
    packed = MicroscalingWeight.pack(weight, order, segments)
    x = torch.randn(2, 3, 105, generator=torch.Generator().manual_seed(2))
    rounded = packed.round_inputs(x)
    assert rounded.shape == x.shape
    assert not torch.equal(rounded, x)
    assert torch.equal(rounded.view(6, 105), MicroscalingWeight.pack(x.view(6, 105), order, segments).decode())
    assert torch.equal(packed.round_inputs(rounded), rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_keep_their_dtype(dtype):
    packed = MicroscalingWeight.pack(*weight_of())
    x = torch.randn(2, 105, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(packed.round_inputs(x), packed.round_inputs(x.float()).to(dtype))


def test_damaged_weights_are_refused():
    packed = MicroscalingWeight.pack(*weight_of())
    tensors, metadata = packed.tensors(), packed.metadata()
    for name in tensors:
        with pytest.raises(InputError):
            MicroscalingWeight.from_tensors({k: v for k, v in tensors.items() if k != name}, metadata)
    for segments in (None, [105], [64, 32, 10], [64, 41, -0.0], [-1, 97, 9]):
        with pytest.raises(InputError, match="segments"):
            MicroscalingWeight.from_tensors(tensors, {**metadata, "segments": segments})
    twice = {**tensors, "permutation": torch.zeros_like(tensors["permutation"])}
    with pytest.raises(InputError, match="each column exactly once"):
        MicroscalingWeight.from_tensors(twice, metadata)


@pytest.mark.parametrize(("name", "value"), [("exponents", 255), ("codes_b8", 127), ("codes_b8", 255)])
def test_what_the_standard_keeps_for_nan_is_no_weight(name, value):
    packed = MicroscalingWeight.pack(*weight_of())
    packed.check_content()
    tensors = {key: tensor.clone() for key, tensor in packed.tensors().items()}
    tensors[name].view(-1)[3] = value
    with pytest.raises(InputError, match="means NaN"):
        MicroscalingWeight.from_tensors(tensors, packed.metadata()).check_content()
