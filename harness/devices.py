"""Names of devices, as users give them and as specs hold them."""

from __future__ import annotations

import re

import torch

from kernels.errors import InputError


def is_cuda(device: str) -> bool:
    return re.fullmatch(r"cuda(:\d+)?", device) is not None


def chosen_device(device: str | None, elsewhere: bool = False) -> str:
    """cpu, cuda or cuda:N; without `device`, cuda where there is one. cuda:0 is cuda: one GPU has one name, so that
    a run has one key.

    elsewhere: it is another machine's, which cannot be looked at from here. Raises InputError for an unknown name and
    for a device that this machine does not have.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if not is_cuda(device):
        raise InputError(f"device {device!r} is unknown; use cpu, cuda or cuda:N")
    index = int(device.partition(":")[2] or 0)
    if not elsewhere:
        if not torch.cuda.is_available():
            raise InputError(f"device {device!r}: this machine has no CUDA device; use --device cpu")
        count = torch.cuda.device_count()
        if index >= count:
            raise InputError(f"device {device!r}: this machine has {count} CUDA devices, from cuda:0")
    return f"cuda:{index}" if index else "cuda"
