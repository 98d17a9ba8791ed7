"""A pool on this machine: every run has a process, a GPU or a group of cores, and its own peak of memory.

A run whose process dies (the system kills what takes too much memory) is begun again, from its last finished block;
the others do not notice.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.engines.base import Progress, Result, Task
from harness.engines.messages import result_from_text, task_to_text

_ROOT = Path(__file__).resolve().parents[2]
# The package may lie there without being installed, and the current folder may be another checkout, which Python would
# look into first.
_PROGRAM = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from harness.engines.worker import main; main()"
_LAST_WORDS = 5  # seconds a worker has to end by itself


@dataclass
class _Worker:
    task: Task
    slot: int
    process: subprocess.Popen[str]
    attempts: int
    result: Result | None = None


class ProcessPool:
    """Up to `workers` runs at a time. threads: of each; None shares the cores. retries: of a run whose process died."""

    def __init__(self, workers: int, threads: int | None = None, retries: int = 1) -> None:
        self.slots = workers
        self._threads = threads
        self._retries = retries
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def start(self, task: Task) -> None:
        taken = {worker.slot for worker in self._workers}
        self._launch(task, min(slot for slot in range(self.slots) if slot not in taken), attempts=1)

    def wait(self, progress: Progress) -> Result:
        while True:
            for key, _ in self._selector.select():
                worker: _Worker = key.data
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    self._hear(worker, line, progress)
                    continue
                self._selector.unregister(key.fileobj)
                self._workers.remove(worker)
                code = worker.process.wait()
                if worker.result is not None:
                    return worker.result
                if worker.attempts <= self._retries:
                    self._launch(worker.task, worker.slot, worker.attempts + 1)
                    continue
                return Result(worker.task.spec, None, f"WorkerDied: {_cause(code)}, {worker.attempts} times")

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            try:
                worker.process.wait(_LAST_WORDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers.clear()
        self._selector.close()

    def _launch(self, task: Task, slot: int, attempts: int) -> None:
        cores = core_group(slot, self.slots)
        threads = self._threads or max(1, len(cores))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if task.spec.model.device == "cuda" and torch.cuda.device_count():
            environment["CUDA_VISIBLE_DEVICES"] = _gpu(slot % torch.cuda.device_count())
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        worker = _Worker(task, slot, process, attempts)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        try:
            process.stdin.write(task_to_text(task, threads=threads, cores=cores) + "\n")
            process.stdin.close()
        except BrokenPipeError:  # it died at once: `wait` finds out
            pass

    def _hear(self, worker: _Worker, line: str, progress: Progress) -> None:
        if not line.endswith("\n"):  # it died in the middle of a word, and the end of its output comes next
            return
        said = json.loads(line)
        if "result" in said:
            worker.result = result_from_text(worker.task.spec, said["result"])
        else:
            progress(worker.task.spec, *said["progress"])


def core_group(slot: int, slots: int) -> list[int]:
    """The cores of group `slot` of `slots`: a fair share, one at least; empty where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // slots
    return cores[slot * share : (slot + 1) * share] if share else [cores[slot % len(cores)]]


def _gpu(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls GPU `index`: where some are hidden already, the one that stands there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def _cause(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
