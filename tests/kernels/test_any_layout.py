"""Any layout in any shape: what is stored is what is decoded, and all of it is counted."""

import examples
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.layouts import load_packed, save_packed


@given(
    name=st.sampled_from(sorted(examples.LAYOUTS)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300) | st.sampled_from([576, 1536]),
    seed=st.integers(0, 5),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_layout_of_any_shape_comes_back_to_the_bit_and_is_counted_to_the_byte(tmp_path, name, rows, columns, seed):
    weight = examples.make(name, (rows, columns), seed)
    save_packed(tmp_path / "w.safetensors", {"w": weight})
    loaded = load_packed(tmp_path / "w.safetensors")["w"]
    assert type(loaded) is type(weight)
    assert loaded.shape == (rows, columns)
    tensors = weight.tensors()
    assert loaded.tensors().keys() == tensors.keys()
    for key, tensor in loaded.tensors().items():
        assert tensor.dtype == tensors[key].dtype
        assert torch.equal(tensor, tensors[key])
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(loaded.decode(dtype), weight.decode(dtype))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sum(weight.bytes_by_role().values()) == weight.nbytes() == size
    assert weight.payload_bits() == 8 * size / (rows * columns)
