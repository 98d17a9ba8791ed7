"""Same spec, same machine, same threads: the same record, bit for bit.

Every random choice of this project has a seed of its own. The global generators are seeded as well, for methods that
draw from them, and kernels whose result depends on the order of atomic additions are avoided on a GPU.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU and GPUs)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prepare_products(device: str) -> None:
    """To be called before the first matrix product on a GPU in this process, or products will not be deterministic."""
    if torch.device(device).type == "cuda":
        # Read by cuBLAS when its first handle is made, and by torch when its first product is.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prefer_deterministic_kernels(device: str) -> None:
    """Ask torch for kernels that give the same bits every time; on the CPU they do anyway.

    An operation without such a kernel warns and runs.
    """
    if torch.device(device).type != "cuda":
        return
    prepare_products(device)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
