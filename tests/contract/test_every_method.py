"""What every registered method promises, on the same weights. A new method joins by being registered."""

import functools
import json

import pytest
import torch

from kernels.errors import InputError
from kernels.layouts import load_packed, save_packed
from kernels.layouts.base import ROLES, SCALE_DTYPES
from methods import LayerContext, LayerStatistics, create_method, method_class
from methods.registry import method_names

# Shapes with the group size that suits them, for methods that have one: groups that divide the row, one group a row,
# groups of 128 with a half one at the end.
SHAPES = {(64, 96): 32, (33, 80): -1, (96, 576): 128}

every_method = pytest.mark.parametrize("name", method_names())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


@functools.cache
def layer(shape):
    """A weight with a few large entries, and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(shape[1])
    weight = 0.02 * torch.randn(shape, generator=generator)
    weight[::7, ::11] *= 6
    mix = torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5
    return weight, LayerStatistics.from_inputs(torch.randn(4, 256, shape[1], generator=generator) @ mix)


def where_it_has_them(name, **options):
    """Those of `options` that the method has."""
    known = method_class(name).Config.model_fields
    return {key: value for key, value in options.items() if key in known}


def method_for(name, shape, **options):
    # Short training will do: what is promised does not depend on it.
    given = where_it_has_them(name, group_size=SHAPES[shape], steps=20)
    return create_method(name, **{**given, **options})


def quantized(name, shape, context=None, **options):
    method = method_for(name, shape, **options)
    weight, statistics = layer(shape)
    return method.quantize_linear(weight, None if method.needs == "nothing" else statistics, context)


once = functools.cache(quantized)  # for tests that only look at the result


def same_bytes(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


@every_shape
@every_method
def test_the_decoded_weight_has_the_shape_of_the_weight_and_is_finite(name, shape):
    packed = once(name, shape)
    decoded = packed.decode()
    assert packed.shape == shape
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()


@every_shape
@every_method
def test_the_decoded_weight_is_near_the_weight_but_not_equal_unless_unquantized(name, shape):
    weight, _ = layer(shape)
    error = float((once(name, shape).decode() - weight).norm() / weight.norm())
    if name == "fp16":
        assert error < 2**-11
    else:
        assert 2**-11 < error < 1


@every_shape
@every_method
def test_weight_and_statistics_are_not_changed(name, shape):
    weight, statistics = layer(shape)
    before = weight.clone(), statistics.hessian.clone(), statistics.inputs.clone()
    quantized(name, shape)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.hessian, before[1])
    assert torch.equal(statistics.inputs, before[2])


@every_shape
@every_method
def test_two_calls_give_equal_bytes(name, shape):
    first, second = once(name, shape), quantized(name, shape)
    assert first.metadata() == second.metadata()
    assert same_bytes(first.tensors(), second.tensors())


@every_method
def test_the_packed_weight_does_not_depend_on_the_weight_afterwards(name):
    shape = (64, 96)
    weight, statistics = layer(shape)
    mine = weight.half()  # the dtype in which the unquantized row is stored
    packed = method_for(name, shape).quantize_linear(mine, statistics)
    decoded = packed.decode()
    mine.zero_()
    assert torch.equal(packed.decode(), decoded)


@every_shape
@every_method
def test_saved_and_loaded_weight_decodes_to_the_same_bits(name, shape, tmp_path):
    packed = once(name, shape)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    loaded = load_packed(tmp_path / "w.safetensors")["layer"]
    assert type(loaded) is type(packed)
    assert same_bytes(loaded.tensors(), packed.tensors())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(loaded.decode(dtype), packed.decode(dtype))


@every_shape
@every_method
def test_payload_bytes_equal_saved_tensor_bytes(name, shape, tmp_path):
    packed = once(name, shape)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    content = (tmp_path / "w.safetensors").read_bytes()
    assert packed.nbytes() == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert packed.payload_bits() == 8 * packed.nbytes() / (shape[0] * shape[1])
    roles = packed.bytes_by_role()
    assert set(roles) <= set(ROLES)
    assert sum(roles.values()) == packed.nbytes()


@every_shape
@every_method
def test_nominal_bits_are_positive_and_not_more_than_the_unquantized_ones(name, shape):
    nominal = method_for(name, shape).nominal_bits(once(name, shape))
    assert 0 < nominal.weight <= 16
    assert 0 <= nominal.scale <= 16


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_the_name_of_its_layer(name, bad):
    weight, statistics = layer((64, 96))
    weight = weight.clone()
    weight[3, 4] = weight[5, 6] = bad
    with pytest.raises(InputError, match=r"model\.layers\.7\.q_proj: 2 of 6144 weights are NaN or infinite"):
        method_for(name, (64, 96)).quantize_linear(weight, statistics, LayerContext("model.layers.7.q_proj"))


@every_method
def test_what_is_not_a_matrix_is_refused_with_the_name_of_its_layer(name):
    _, statistics = layer((64, 96))
    for weight in (torch.randn(96), torch.randn(2, 3, 96), torch.ones(64, 96, dtype=torch.int32)):
        with pytest.raises(InputError, match=r"q_proj: weight is .*must be a float matrix"):
            method_for(name, (64, 96)).quantize_linear(weight, statistics, LayerContext("q_proj"))


@every_method
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_constants_are_stored_in_the_scale_dtype(name, scale_dtype):
    packed = once(name, (64, 96), scale_dtype=scale_dtype)
    floats = {tensor.dtype for tensor in packed.tensors().values() if tensor.is_floating_point()}
    if name == "fp16":
        assert floats == {torch.float16}  # no constants: the weight itself
    elif name == "micromix":
        assert not floats  # its constants are powers of two, stored as exponents in 8 bits
    else:
        assert floats == {SCALE_DTYPES[scale_dtype]}


@every_method
def test_constants_are_stored_in_float16_by_default(name):
    packed = once(name, (64, 96))
    assert same_bytes(packed.tensors(), once(name, (64, 96), scale_dtype="float16").tensors())


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_weight_of_any_float_dtype_is_accepted(name, dtype):
    weight, statistics = layer((64, 96))
    weight = torch.round(weight * 512) / 512  # at most 8 bits: exact in all of them
    assert torch.equal(weight.bfloat16().float(), weight)
    method = method_for(name, (64, 96))
    packed = method.quantize_linear(weight.to(dtype), statistics)
    assert torch.equal(packed.decode(), method.quantize_linear(weight.float(), statistics).decode())


@every_method
def test_inputs_are_left_alone_unless_the_format_rounds_them(name):
    packed = once(name, (64, 96))
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1))
    rounded = packed.round_inputs(x)
    assert torch.equal(rounded, x) != packed.rounds_inputs
    assert torch.equal(packed.round_inputs(rounded), rounded)


@every_method
def test_a_matrix_of_zeros_stays_zero(name):
    _, statistics = layer((64, 96))
    decoded = method_for(name, (64, 96)).quantize_linear(torch.zeros(64, 96), statistics).decode()
    assert not decoded.any()


@every_method
def test_inputs_that_never_fired_are_no_trouble(name):
    weight = layer((64, 96))[0].clone()
    before = weight.clone()
    x = torch.randn(4, 200, 96, generator=torch.Generator().manual_seed(0))
    x[:, :, 10:13] = 0
    decoded = method_for(name, (64, 96)).quantize_linear(weight, LayerStatistics.from_inputs(x)).decode()
    assert torch.isfinite(decoded).all()
    assert torch.equal(weight, before)  # methods zero the weights of such inputs in a copy
    live = [j for j in range(96) if j not in (10, 11, 12)]
    assert float((decoded - weight)[:, live].norm() / weight[:, live].norm()) < 1


@every_method
def test_missing_or_misfit_statistics_are_refused_with_the_name_of_the_layer(name):
    weight, _ = layer((64, 96))
    method = method_for(name, (64, 96))
    context = LayerContext("q_proj")
    if method.needs == "nothing":
        assert same_bytes(method.quantize_linear(weight, None, context).tensors(), once(name, (64, 96)).tensors())
        return
    with pytest.raises(InputError, match=f"q_proj: method '{name}' needs the layer's inputs"):
        method.quantize_linear(weight, None, context)
    with pytest.raises(InputError, match="q_proj: statistics of 80 input features, weight has in_features=96"):
        method.quantize_linear(weight, layer((33, 80))[1], context)


@every_method
def test_facts_for_the_log_are_plain_values(name):
    context = LayerContext("q_proj", block=3, blocks=12)
    quantized(name, (64, 96), context)
    assert json.loads(json.dumps(context.facts, allow_nan=False)) == context.facts


@every_method
def test_a_shape_is_refused_before_the_run_exactly_when_it_is_refused_in_it(name):
    for columns in (7, 96, 100, 576):
        method = create_method(name, **where_it_has_them(name, steps=20))
        weight = 0.02 * torch.randn(8, columns, generator=torch.Generator().manual_seed(columns))
        statistics = LayerStatistics.from_inputs(torch.eye(columns).unsqueeze(0))
        try:
            method.check_shape(8, columns)
        except InputError as refused:
            with pytest.raises(InputError) as again:
                method.quantize_linear(weight, statistics)
            assert str(again.value) == str(refused)
        else:
            assert method.quantize_linear(weight, statistics).shape == (8, columns)
