"""PackedLinear: the bits of a dense layer that holds the decoded weight, and buffers that keep what is stored."""

import pytest
import torch
import torch.nn.functional as F

from kernels.errors import InputError
from kernels.layouts import BinaryWeight, DenseWeight, MicroscalingWeight, UniformWeight
from kernels.linear import PackedLinear


def uniform(order=True):
    generator = torch.Generator().manual_seed(0)
    return UniformWeight.pack(
        torch.randint(0, 8, (6, 20), generator=generator),
        torch.rand(6, 3, generator=generator).half(),
        torch.randint(0, 8, (6, 3), generator=generator),
        bits=3,
        group_size=8,
        permutation=torch.randperm(20, generator=generator) if order else None,
    )


WEIGHTS = {
    "uniform": uniform(),
    "binary": BinaryWeight.pack(torch.eye(6, 20).bool(), torch.full((6, 1), 0.5), None, group_size=20),
    "dense": DenseWeight(torch.arange(120.0).view(6, 20).bfloat16()),
    "microscaling": MicroscalingWeight.pack(torch.sin(torch.arange(120.0)).view(6, 20), torch.arange(20), (12, 8, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
def test_outputs_are_those_of_the_decoded_weight(name, bias, dtype):
    packed = WEIGHTS[name]
    # More vectors than kernels answer for: they add up in another order.
    inputs, added = torch.randn(2, 10, 20).to(dtype), torch.randn(6).to(dtype) if bias else None
    layer = PackedLinear.from_packed(packed, added)
    assert torch.equal(layer(inputs), F.linear(packed.round_inputs(inputs), packed.decode(dtype), added))
    assert torch.equal(layer.to_linear(dtype)(inputs), layer(inputs))


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_state_dict_is_what_a_checkpoint_stores(name):
    packed = WEIGHTS[name]
    state = PackedLinear.from_packed(packed, torch.zeros(6)).state_dict()
    assert state.keys() == {*packed.tensors(), "bias"}
    assert all(torch.equal(state[key], tensor) for key, tensor in packed.tensors().items())


@pytest.mark.parametrize("change", ["half", "bfloat16", "float", "double"])
def test_changing_the_models_dtype_leaves_stored_constants_alone(change):
    layer = PackedLinear.from_packed(uniform(), torch.ones(6))
    getattr(layer, change)()
    assert torch.equal(layer.scales, uniform().scales())
    assert layer.scales.dtype == torch.float16
    assert layer.bias.dtype != torch.float32 or change == "float"
    assert torch.equal(layer.packed.decode(), uniform().decode())


def test_a_layer_made_on_the_meta_device_is_filled_later():
    packed = uniform()
    described = {name: tensor.to("meta") for name, tensor in packed.tensors().items()}
    layer = PackedLinear(packed.layout, packed.metadata(), described)
    layer.load_state_dict(PackedLinear.from_packed(packed).state_dict(), assign=True)
    assert torch.equal(layer.packed.decode(), packed.decode())


def test_replaced_buffers_are_checked_again():
    layer = PackedLinear.from_packed(uniform())
    assert layer.packed is layer.packed
    layer.permutation = torch.zeros(20, dtype=torch.int16)
    with pytest.raises(InputError, match="permutation"):
        layer(torch.randn(1, 20))


def test_a_format_of_activations_rounds_them_packed_and_dense():
    class Rounding(DenseWeight):
        layout = "rounding-for-a-test"
        rounds_inputs = True

        def round_inputs(self, x):
            return x.round()

    packed, inputs = Rounding(torch.randn(6, 20)), torch.randn(3, 20)
    expected = F.linear(inputs.round(), packed.decode())
    layer = PackedLinear.from_packed(packed)
    assert torch.equal(layer(inputs), expected)
    assert torch.equal(layer.to_linear(torch.float32)(inputs), expected)
