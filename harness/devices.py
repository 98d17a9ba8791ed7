"""Names of devices, as users give them."""

from __future__ import annotations

import re

import torch

from kernels.errors import InputError


def chosen_device(device: str | None, elsewhere: bool = False) -> str:
    """`device` if it is one: cpu, cuda or cuda:N. Without it, cuda where there is one.

    cuda is any GPU: runs side by side are spread over all there are. cuda:0 is the first one alone.

    elsewhere: it is another machine's, which cannot be looked at from here. Raises InputError for an unknown name and
    for a device that this machine does not have.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if not re.fullmatch(r"cuda(:(0|[1-9]\d*))?", device):
        raise InputError(f"device {device!r} is unknown; use cpu, cuda or cuda:N")
    if elsewhere:
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device {device!r}: this machine has no CUDA device; use --device cpu")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise InputError(f"device {device!r}: this machine has {count} CUDA devices, from cuda:0")
    return device
