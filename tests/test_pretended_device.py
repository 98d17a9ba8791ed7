"""The pretended device itself: what torch refuses on a real one is refused, what it allows is there or on the CPU."""

import copy

import numpy as np
import pytest
import torch
from pretended_device import DEVICE, NAME, on_device
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture(autouse=True)
def entered(pretended_cuda):
    with pretended_cuda:
        yield


@pytest.fixture
def here():
    return torch.arange(6.0).view(2, 3)


@pytest.fixture
def there(here):
    return here.to("cuda")


def test_a_tensor_says_where_it_is(here, there):
    assert (there.device, there.is_cuda, there.is_cpu, there.get_device()) == (DEVICE, True, False, 0)
    assert (here.device, here.is_cuda, here.is_cpu, here.get_device()) == (torch.device("cpu"), False, True, -1)
    assert there.device != torch.device("cuda")  # as with torch: only one of them has an index
    assert there.tolist() == here.tolist()


@pytest.mark.parametrize(
    "made",
    [
        lambda t: torch.zeros(2, device="cuda"),
        lambda t: torch.tensor([1, 2], device=DEVICE),
        lambda t: torch.full((2,), 1.0, device=0),
        lambda t: torch.as_tensor(np.ones(2), device="cuda:0"),
        lambda t: torch.zeros_like(t),
        lambda t: torch.zeros_like(t.cpu(), device="cuda"),
        lambda t: t.new_zeros(2),
        lambda t: t.cpu().cuda(),
        lambda t: t.cpu().to(t),
        lambda t: t.cpu().type_as(t),
        lambda t: t.cpu().to(torch.float16).to(device="cuda", dtype=torch.float64),
        lambda t: t.half(),
        lambda t: t + 1,
        lambda t: t * torch.tensor(2.0),  # a CPU tensor without dimensions is a number
        lambda t: t.T,
        lambda t: t[0, 1:],
        lambda t: t.split(1)[1],
        lambda t: t.max(dim=0).values,
        lambda t: t.add_(1),
        lambda t: t[torch.tensor([1])],
        lambda t: t[torch.tensor([True, False])],
        lambda t: torch.as_tensor(t),
        lambda t: nn.Parameter(t),
        lambda t: nn.Parameter(t).detach(),
        lambda t: copy.deepcopy(nn.Parameter(t)),
        lambda t: t.cpu().to("cuda").copy_(t.cpu()),
        lambda t: torch.where(t > 1, t, 0.0),
        lambda t: torch.linalg.cholesky_ex(t @ t.T + torch.eye(2, device=t.device))[0],
    ],
)  # fmt: skip
def test_what_is_made_on_the_device_is_there(made, there):
    assert made(there).device == DEVICE


@pytest.mark.parametrize(
    "made",
    [
        lambda t: torch.zeros(2),
        lambda t: torch.zeros_like(t, device="cpu"),
        lambda t: t.cpu(),
        lambda t: t.to("cpu", torch.float16),
        lambda t: t.to(torch.ones(1)),
        lambda t: t.new_zeros(2, device="cpu"),
        lambda t: torch.tensor([t[0, 0], t[0, 1]]),
        lambda t: torch.ones(3).copy_(t[0]),
        lambda t: nn.Parameter(t.cpu()),
    ],
)  # fmt: skip
def test_what_is_made_on_the_cpu_is_not(made, there):
    assert made(there).device == torch.device("cpu")


def test_a_copy_on_another_device_has_memory_of_its_own(here, there):
    there += 1
    assert here.sum() == 15
    assert there.cpu().sum() == 21
    assert there.to("cuda") is there
    assert here.to("cpu") is here
    assert torch.as_tensor(here, device="cuda").data_ptr() != here.data_ptr()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda h, t: h + t,
        lambda h, t: h @ t.T,
        lambda h, t: torch.cat([h, t]),
        lambda h, t: t.add_(h),
        lambda h, t: torch.equal(h, t),
        lambda h, t: torch.where(h > 0, t, t),
        lambda h, t: torch.add(h, h, out=t),
        lambda h, t: h[0] * t[0, 0],  # a number on the device is none for the CPU
        lambda h, t: h[0, 0].add_(t[0, 0]),
        lambda h, t: torch.stack([h[0, 0], t[0, 0]]),
        lambda h, t: t.index_select(0, torch.tensor([0])),
        lambda h, t: t.gather(0, torch.zeros(1, 3, dtype=torch.int64)),
        lambda h, t: h[torch.tensor([0], device="cuda")],
        lambda h, t: h.__setitem__(h > 1, t[0]),
        lambda h, t: t.__setitem__(torch.tensor([0]), h[:1]),
        lambda h, t: nn.functional.linear(t, nn.Parameter(h)),
        lambda h, t: nn.functional.cross_entropy(t, torch.tensor([0, 1])),
        lambda h, t: nn.Linear(3, 3)(t),
        lambda h, t: torch.randn(2, generator=torch.Generator(), device="cuda"),
        lambda h, t: torch.multinomial(t, 1, generator=torch.Generator()),
        lambda h, t: t.uniform_(generator=torch.Generator()),
        lambda h, t: h.to("cuda:1"),
    ],
)  # fmt: skip
def test_what_torch_refuses_is_refused(mixed, here, there):
    with pytest.raises(RuntimeError, match=r"same device|indices should be|for generator|device ordinal"):
        mixed(here, there)


def test_a_tensor_is_written_from_the_other_device_only_as_a_whole(here, there):
    there[0] = here[1]
    here[1, 1:] = there[0, 1:]
    there[there > 4] = torch.tensor(0.0)
    assert there.tolist() == [[3, 4, 0], [3, 4, 0]]


@pytest.mark.parametrize("read", [lambda t: t.numpy(), np.asarray, np.linalg.norm])
def test_numpy_reads_no_tensor_on_the_device(read, here, there):
    read(here)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        read(there)


def test_a_module_moves_with_its_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to("cuda")
    assert {tensor.device for tensor in model.state_dict().values()} == {DEVICE}
    assert model(torch.ones(2, 3, device="cuda")).is_cuda
    assert not any(map(on_device, model.cpu().state_dict().values()))


def test_gradients_are_where_their_tensors_are(there):
    seen = []
    parameter = nn.Parameter(there)
    product = parameter * 2
    product.register_hook(lambda gradient: seen.append(gradient + torch.ones(2, 3, device=gradient.device)))
    product.sum().backward()
    assert seen[0].is_cuda
    assert parameter.grad.is_cuda
    (again,) = torch.autograd.grad((parameter * parameter).sum(), parameter)
    assert again.is_cuda
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    assert parameter.is_cuda


def test_a_hook_cannot_mix_devices_either(there):
    product = nn.Parameter(there) * 2
    product.register_hook(lambda gradient: gradient + torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="same device"):
        product.sum().backward()


def test_files_are_written_from_any_device_and_read_to_the_cpu(there, tmp_path):
    save_file({"a": there}, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")["a"]
    assert not found.is_cuda
    assert torch.equal(found, there.cpu())


def test_torch_says_that_there_is_one_device():
    assert torch.cuda.is_available()
    assert torch.cuda.get_device_name(torch.device("cuda")) == NAME
    for refused in ("cpu", torch.device("cpu")):
        with pytest.raises(ValueError, match="Expected a cuda device"):
            torch.cuda.synchronize(refused)
