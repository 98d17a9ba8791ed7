"""Processes of their own for runs, and for the regression gate.

On Linux, one process imports what every run needs and is then forked for each of them: torch and transformers take
some seconds of a core to import, more than a small run takes. It computes nothing itself, so no pool of threads is
open when it is forked. Runs on a GPU, and other systems, start anew: a library may open the GPU while it is imported,
and macOS does not allow forks of what has loaded its frameworks.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

import threadpoolctl
import torch

_ROOT = Path(__file__).resolve().parents[2]
# What is imported before the fork. The decoder of one family imports what those of all families share.
_SHARED = ["harness.engines.base", "harness.regression", "transformers.models.llama.modeling_llama"]


def process_context(device: str) -> BaseContext:
    """How a process is begun that will compute on `device`. Start it within `package_on_path()`."""
    if sys.platform != "linux" or torch.device(device).type != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SHARED)
    return context


@contextmanager
def package_on_path() -> Iterator[None]:
    """The package may lie in the current folder without being installed, or beside another one that is: Python
    processes begun now import this one."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def take_environment(variables: Mapping[str, str]) -> None:
    """Make `variables` the environment of this process: a forked one has that of an earlier moment."""
    os.environ.clear()
    os.environ.update(variables)


def use_threads(count: int) -> None:
    """Let torch, and every library for linear algebra that is or will be loaded, use `count` threads."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    threadpoolctl.threadpool_limits(count)
    torch.set_num_threads(count)
