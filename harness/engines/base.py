"""What a sweep asks of an engine, and the simplest one: every run in this process, one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from harness.runner import run
from harness.runtime.runner import run_runtime
from harness.spec import RunSpec
from kernels.errors import InputError, is_disk_full

# Called with (run, steps done, steps in all, what is being done).
Progress = Callable[[RunSpec, int, int, str], None]


@dataclass(frozen=True)
class Task:
    """A run to carry out. reference: the record of the unquantized run. fresh: quantize and measure even if cached."""

    spec: RunSpec
    reference: dict[str, Any] | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a run. record: None if it failed; then `error` says why in one line, `details` in many.

    bad_input: the user can put it right; the sweep stops and nothing is recorded.
    """

    spec: RunSpec
    record: dict[str, Any] | None
    error: str = ""
    details: str = ""
    bad_input: bool = False


class Engine(Protocol):
    """Takes up to `slots` runs at a time."""

    slots: int

    def start(self, task: Task) -> None:
        """Begin a run."""

    def wait(self, progress: Progress) -> Result:
        """Wait until one of the runs begun is over."""

    def close(self) -> None:
        """End whatever still runs."""


def execute(spec: RunSpec, **more: Any) -> dict[str, Any]:
    """Carry out a run by the runner of what it measures: a model's outputs, or how it runs."""
    return (run if spec.quality else run_runtime)(spec, **more)


class InProcess:
    """Runs in this process."""

    slots = 1

    def __init__(self, execute: Callable[..., dict[str, Any]] = execute) -> None:
        self._execute = execute
        self._task: Task | None = None

    def start(self, task: Task) -> None:
        self._task = task

    def wait(self, progress: Progress) -> Result:
        task, self._task = self._task, None
        assert task is not None
        return attempt(task, lambda done, total, what: progress(task.spec, done, total, what), self._execute)

    def close(self) -> None: ...


def attempt(
    task: Task, progress: Callable[[int, int, str], None], execute: Callable[..., dict[str, Any]] = execute
) -> Result:
    """Carry out a run; whatever it raises, but for an interrupt, becomes its result."""
    try:
        record = execute(task.spec, reference=task.reference, fresh=task.fresh, progress=progress)
    except InputError as error:
        return Result(task.spec, None, str(error), bad_input=True)
    except OSError as error:
        if not is_disk_full(error):
            return failed(task.spec, error)
        where = error.filename or "unknown file"
        return Result(task.spec, None, f"no disk space left ({where}); finished runs are kept", bad_input=True)
    except Exception as error:  # one failed run must not lose the others
        return failed(task.spec, error)
    return Result(task.spec, record)


def failed(spec: RunSpec, error: Exception) -> Result:
    """The result of a run that raised `error`."""
    return Result(spec, None, f"{type(error).__name__}: {' '.join(str(error).split())}", traceback.format_exc())
