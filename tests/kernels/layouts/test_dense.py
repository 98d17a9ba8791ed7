"""Dense: the weight itself, every bit of it."""

import pytest
import torch

from kernels.errors import InputError
from kernels.layouts import DenseWeight, layout_class, load_packed, save_packed

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 576)])
def test_saved_and_loaded_weight_is_the_same_bit_for_bit(tmp_path, dtype, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    save_packed(tmp_path / "w.safetensors", {"layer": DenseWeight(weight)})
    loaded = load_packed(tmp_path / "w.safetensors")["layer"]
    assert isinstance(loaded, DenseWeight)
    assert loaded.weight.dtype == dtype
    assert torch.equal(loaded.decode(dtype), weight)
    assert torch.equal(loaded.decode(), weight.float())


def test_parts_of_one_storage_and_transposed_weights_are_saved_as_they_read(tmp_path):
    fused = torch.randn(9, 5)
    weights = {"q": DenseWeight(fused[:4]), "k": DenseWeight(fused[4:]), "t": DenseWeight(torch.randn(3, 6).T)}
    save_packed(tmp_path / "w.safetensors", weights)
    loaded = load_packed(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name].decode(), weight.decode()) for name, weight in weights.items())


def test_a_16_bit_weight_is_16_bits():
    packed = DenseWeight(torch.randn(5, 7).half())
    assert packed.nbytes() == 70
    assert packed.payload_bits() == 16
    assert packed.bytes_by_role() == {"code": 70}


def test_decode_gives_a_copy():
    packed = DenseWeight(torch.ones(2, 3))
    packed.decode().zero_()
    assert int(packed.decode().sum()) == 6


def test_moving_to_a_device_keeps_the_weight():
    packed = DenseWeight(torch.randn(2, 3))
    assert torch.equal(packed.to("cpu").decode(), packed.decode())


@pytest.mark.parametrize(
    ("tensors", "shape", "said"),
    [
        ({}, [2, 3], "'weight' .* missing"),
        ({"weight": torch.zeros(3, 2)}, [2, 3], r"'weight' .*\[3, 2\]; .*\[2, 3\]"),
        ({"weight": torch.zeros(2, 3, dtype=torch.float64)}, [2, 3], "'weight' .*float64.*float16 or"),
        ({"weight": torch.zeros(2, 3, dtype=torch.int32)}, [2, 3], "'weight' .*int32"),
        ({"weight": torch.zeros(2, 3), "mask": torch.zeros(1)}, [2, 3], "does not know.*'mask'"),
        ({"weight": torch.zeros(2, 3)}, None, "shape=None"),
        ({"weight": torch.zeros(2, 3)}, [2], r"shape=\[2\]"),
        ({"weight": torch.zeros(2, 3)}, [2, 0], r"shape=\[2, 0\]"),
        ({"weight": torch.zeros(2, 3)}, [2.0, 3], r"shape=\[2.0, 3\]"),
        ({"weight": torch.zeros(1, 3)}, [True, 3], r"shape=\[True, 3\]"),
        ({"weight": torch.zeros(2, 3)}, "23", "shape='23'"),
    ],
)
def test_what_does_not_fit_together_is_refused(tensors, shape, said):
    metadata = {} if shape is None else {"shape": shape}
    with pytest.raises(InputError, match=said):
        DenseWeight.from_tensors(tensors, metadata)


def test_an_unknown_layout_is_refused_with_a_suggestion():
    assert layout_class("dense") is DenseWeight
    with pytest.raises(InputError, match="unknown layout 'unifrom'; did you mean 'uniform'"):
        layout_class("unifrom")


def test_a_layout_name_cannot_be_taken_twice():
    with pytest.raises(TypeError, match="'dense' is already DenseWeight"):
        type("OtherWeight", (DenseWeight,), {"layout": "dense"})
