"""Runs in child processes that can be killed. Children are forked from a server that has everything imported, so that a
kill hits the work and not the start of Python."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Seconds that a child may take at most: it takes two, but many times that on a busy machine.
PATIENCE = 900
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["harness.reproduce", "transformers.models.llama.modeling_llama", "killing"])


def start(arguments: list[str], environment: dict[str, str], die_at: int | None = None) -> BaseProcess:
    """Begin `reproduce.py` with `arguments`; it kills itself at the write with number `die_at`, if given."""
    process = _context.Process(target=_run, args=(arguments, environment, die_at))
    process.start()
    return process


def _run(arguments: list[str], environment: dict[str, str], die_at: int | None) -> None:
    os.environ.update(environment)
    os.environ.pop("SAGEBENCH_DATA", None)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import torch

    from harness.cli import reproduce

    torch.set_num_threads(1)
    if die_at is not None:
        _die_at_write(die_at)
    os._exit(reproduce(arguments))


def _die_at_write(number: int) -> None:
    """Kill this process when a file is about to take its name for the time `number`, counted from 1."""
    replace, count = Path.replace, [0]

    def counted(path: Path, target: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = counted  # type: ignore[method-assign]
