"""Tensors in a safetensors file that is whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kernels.atomic import atomic_path


def save_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `target`, whole or not at all. Raises OSError with its errno if the disk is full."""
    held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(target) as part:
        try:
            save_file(held, part, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # hides the system's error in its text
            for number in (errno.ENOSPC, errno.EDQUOT):
                if f"code: {number}," in str(error) or f"os error {number})" in str(error):
                    raise OSError(number, os.strerror(number), str(target)) from error
            raise
