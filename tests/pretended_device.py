"""A CUDA device that is only pretended: tensors stay on the CPU and bear a mark, and torch's rules on devices are kept.

Shows on any machine what otherwise shows on a GPU alone: a tensor that was made on the CPU and meets one on the
device, `.numpy()` without `.cpu()`, a CPU generator that draws on the device, "cuda" compared with "cuda:0". It is a
mode: every call of a torch function passes through it, is checked, runs on the CPU, and has its result marked. Outside
the mode a marked tensor is one on the CPU.

What it does not know: operations, dtypes and sizes that CUDA lacks, other rounding, the order of atomic additions,
streams, what is asynchronous, and what code that is not torch does with an address. Inside a Python function of torch
itself (`F.cross_entropy`) nothing is checked but what goes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
NAME = "Pretended GPU"
MEMORY = 8 << 30
_MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
_NO_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
)
# A CPU tensor without dimensions counts as a number and may meet any tensor, but for these.
_NO_NUMBERS = {torch.stack, torch.equal, Tensor.equal, torch.searchsorted, torch.gather, Tensor.gather}
# Where they name no device, their result is on the CPU even if they are handed a list of tensors on another.
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
_Call = Callable[..., Any]


def on_device(tensor: Tensor) -> bool:
    """Whether `tensor` bears the mark."""
    return getattr(tensor, "_pretended", False)


class PretendedCuda(TorchFunctionMode):
    """While it is entered, `device="cuda"`, `.to("cuda")` and the like give marked tensors that behave as CUDA's do."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        # Within this method the mode is off: `tensor.device` is where a tensor really is.
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        return _ordinary(func, args, kwargs) if special is None else special(self, func, args, kwargs)


def _ordinary(func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A function without a rule of its own: all tensors on one device, and there goes the result."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # the rest would say the same, slowly
        return _mark(func(args[0])) if on_device(args[0]) else func(args[0])
    asked = _asked_for(kwargs.get("device"))
    if asked is None:
        there = _meet(func, args, kwargs)
    else:
        there = asked
        kwargs["device"] = "cpu" if there else kwargs["device"]
    if func in _FROM_DATA:
        there = there if asked is not None else isinstance(args[0], Tensor) and on_device(args[0])
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    result = func(*args, **kwargs)
    if there and asked and func in _FROM_DATA:
        result = result.clone()  # may share the memory of its data, which a device cannot
    return _mark(result) if there else result


def _meet(func: _Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if the tensors of a call are on the device, False if on the CPU. Raises RuntimeError if on both."""
    there = here = False
    for tensor in [*_tensors(args), *_tensors(kwargs.values())]:
        if on_device(tensor):
            there = True
        elif tensor.device.type == "cpu" and (tensor.dim() or func in _NO_NUMBERS):
            here = True
    if there and (here or _writes_to_cpu(func, args)):
        raise RuntimeError(_MIXED)
    return there


def _writes_to_cpu(func: _Call, args: Sequence[Any]) -> bool:
    """Whether `func` changes its first argument, and that is on the CPU."""
    name = getattr(func, "__name__", "")
    in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
    return in_place and bool(args) and isinstance(args[0], Tensor) and not on_device(args[0])


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among `values`, and in lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _mark(result: Any, there: bool = True) -> Any:
    for tensor in _tensors([result]):
        tensor._pretended = there
    return result


def _asked_for(device: Any) -> bool | None:
    """Whether `device`, as a caller names it, is the pretended one; None if it names none."""
    if device is None:
        return None
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index not in (None, DEVICE.index):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device.type == "cuda"


# Functions with rules of their own: (the mode, function, arguments, arguments by name) -> result.


def _to(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`tensor.to(...)`, `.cuda()`, `.cpu()`: a copy, unless the tensor is there already."""
    tensor, *rest = args
    if func is Tensor.cuda:
        func, rest = Tensor.to, [DEVICE]
    there = _asked_for("cpu") if func is Tensor.cpu else _asked_for(kwargs.get("device"))
    other = kwargs.get("other", rest[0] if rest else None)
    if isinstance(other, Tensor):
        there = on_device(other)
    elif isinstance(other, (str, int, torch.device)):
        there = _asked_for(other)
        rest[0] = "cpu" if there else other
    if there and "device" in kwargs:
        kwargs["device"] = "cpu"
    there = on_device(tensor) if there is None else there
    result = func(tensor, *rest, **kwargs)
    if result is tensor and there != on_device(tensor):
        result = tensor.clone()
    return _mark(result, there) if result.device.type == "cpu" else result


def _anywhere(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`tensor.copy_(other)` and the like: from any device to any other."""
    return func(*args, **kwargs)


def _read(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`tensor[index]`: an index may be on the CPU, or where the tensor is."""
    _check_index(args[0], args[1])
    result = func(*args, **kwargs)
    return _mark(result) if on_device(args[0]) else result


def _write(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`tensor[index] = value`: a copy, from anywhere, unless a tensor is the index: then from the tensor's device."""
    tensor, index, value = args[:3]
    indices = [index for index in _tensors([index]) if index.dim() or index.dtype == torch.bool]
    _check_index(tensor, index)
    if isinstance(value, Tensor) and value.dim() and indices and on_device(value) != on_device(tensor):
        raise RuntimeError(_MIXED)
    return func(*args, **kwargs)


def _check_index(tensor: Tensor, index: Any) -> None:
    if not on_device(tensor) and any(on_device(part) and part.dim() for part in _tensors([index])):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


def _numpy(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if on_device(args[0]):
        raise TypeError(_NO_NUMPY)
    return func(*args, **kwargs)


def _set_data(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`parameter.data = value`: how modules are moved."""
    func(*args, **kwargs)
    _mark(args[0], on_device(args[1]))


def _hook(mode: PretendedCuda, func: _Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`tensor.register_hook(hook)`: hooks run inside `backward`, where the mode is off, on gradients without a mark."""
    tensor, hook = args

    def run(gradient: Tensor) -> Any:
        with mode:
            return hook(_mark(gradient, on_device(tensor)))

    return func(tensor, run)


def _answer(of_device: Any) -> _Call:
    """A question that a marked tensor answers by `of_device`."""
    return lambda mode, func, args, kwargs: of_device if on_device(args[0]) else func(*args, **kwargs)


_SPECIAL: dict[Any, _Call] = {
    Tensor.device.__get__: _answer(DEVICE),  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _answer(True),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _answer(False),  # type: ignore[attr-defined]
    Tensor.get_device: _answer(DEVICE.index),
    Tensor.to: _to,
    Tensor.cuda: _to,
    Tensor.cpu: _to,
    Tensor.type_as: _to,
    Tensor.copy_: _anywhere,
    torch._has_compatible_shallow_copy_type: _anywhere,  # asked by `module.to`
    Tensor.__getitem__: _read,
    Tensor.__setitem__: _write,
    Tensor.index_put_: _write,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.register_hook: _hook,
}


def _check_cuda(device: Any = None) -> None:
    if device is not None and not _asked_for(device):
        raise ValueError(f"Expected a cuda device, but got: {device}")


def _told(answer: Any) -> _Call:
    def stand_in(device: Any = None) -> Any:
        _check_cuda(device)
        return answer

    return stand_in


_PROPERTIES = SimpleNamespace(name=NAME, total_memory=MEMORY, multi_processor_count=1, major=8, minor=0)
# What of `torch.cuda` a program asks.
_CUDA: dict[str, _Call] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "empty_cache": lambda: None,
    **{name: _told(None) for name in ("synchronize", "reset_peak_memory_stats")},
    **{name: _told(MEMORY // 8) for name in ("memory_allocated", "max_memory_allocated")},
    **{name: _told(MEMORY // 4) for name in ("memory_reserved", "max_memory_reserved", "device_memory_used")},
    "mem_get_info": _told((MEMORY // 2, MEMORY)),
    "get_device_name": _told(NAME),
    "get_device_capability": _told((8, 0)),
    "get_device_properties": _told(_PROPERTIES),
}


def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    """The mode, to be entered; until `monkeypatch` is undone `torch.cuda` says that there is a device."""
    for name, stand_in in _CUDA.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    make = torch.nn.Parameter.__new__

    def parameter(kind: Any, data: Any = None, *arguments: Any, **named: Any) -> Any:
        made = make(kind, data, *arguments, **named)
        return _mark(made) if isinstance(data, Tensor) and on_device(data) else made

    monkeypatch.setattr(torch.nn.Parameter, "__new__", parameter)  # passes by the mode
    return PretendedCuda()
