import pytest
import torch

from kernels.finite import all_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_one_odd_entry_is_found_anywhere(dtype, value, place):
    tensor = torch.randn(40, 100).to(dtype)
    assert all_finite(tensor)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_numbers(dtype):
    most = torch.finfo(dtype).max
    assert all_finite(torch.tensor([most, -most, 0.0], dtype=dtype))
    assert all_finite(torch.empty(0, 3, dtype=dtype))
    assert all_finite(torch.tensor(1.0, dtype=dtype))
