import pytest
import torch

from harness.devices import chosen_device
from kernels.errors import InputError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [(None, "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")],
)
def test_a_device_that_is_there_is_chosen(two_gpus, given, chosen):
    assert chosen_device(given) == chosen


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("cuda:2", "this machine has 2 CUDA devices, from cuda:0"),
        ("cuda:01", "is unknown; use cpu, cuda or cuda:N"),
        ("gpu", "is unknown; use cpu, cuda or cuda:N"),
    ],
)
def test_a_gpu_that_is_not_there_and_an_unknown_name_are_refused(two_gpus, given, problem):
    with pytest.raises(InputError, match=f"device '{given}'.* {problem}"):
        chosen_device(given)


def test_without_a_gpu_the_cpu_is_chosen_and_a_gpu_is_refused(no_gpu):
    assert chosen_device(None) == "cpu"
    with pytest.raises(InputError, match="device 'cuda:1': this machine has no CUDA device; use --device cpu"):
        chosen_device("cuda:1")


@pytest.mark.parametrize("given", ["cuda", "cuda:7", "cpu"])
def test_a_device_elsewhere_is_taken_at_its_word(no_gpu, given):
    assert chosen_device(given, elsewhere=True) == given
    with pytest.raises(InputError, match="is unknown"):
        chosen_device("cuda:x", elsewhere=True)
