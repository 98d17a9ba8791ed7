"""A pool on this machine: every run has a process, a GPU or a group of cores, and its own peak of memory.

A run whose process dies (the system kills what takes too much memory) is begun again, from its last finished block;
the others do not notice.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from harness.engines.base import Progress, Result, Task
from harness.engines.messages import result_from_text, task_to_text
from harness.engines.processes import package_on_path, process_context
from harness.engines.worker import work

_LAST_WORDS = 5  # seconds a worker has to end by itself


@dataclass
class _Worker:
    task: Task
    slot: int
    process: BaseProcess
    channel: Connection
    attempts: int
    result: Result | None = None


class ProcessPool:
    """Up to `workers` runs at a time. threads: of each; None shares the cores. retries: of a run whose process died."""

    def __init__(self, workers: int, threads: int | None = None, retries: int = 1) -> None:
        self.slots = workers
        self._threads = threads
        self._retries = retries
        self._workers: list[_Worker] = []

    def start(self, task: Task) -> None:
        taken = {worker.slot for worker in self._workers}
        self._launch(task, min(slot for slot in range(self.slots) if slot not in taken), attempts=1)

    def wait(self, progress: Progress) -> Result:
        while True:
            speaking = wait([worker.channel for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.channel in speaking]:
                line = _line(worker.channel)
                if line is not None:
                    self._hear(worker, line, progress)
                    continue
                worker.channel.close()
                self._workers.remove(worker)
                worker.process.join()
                if worker.result is not None:
                    return worker.result
                if worker.attempts <= self._retries:
                    self._launch(worker.task, worker.slot, worker.attempts + 1)
                    continue
                cause = _cause(worker.process.exitcode)
                return Result(worker.task.spec, None, f"WorkerDied: {cause}, {worker.attempts} times")

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_LAST_WORDS)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.channel.close()
        self._workers.clear()

    def _launch(self, task: Task, slot: int, attempts: int) -> None:
        cores = core_group(slot, self.slots)
        threads = self._threads or max(1, len(cores))
        device = task.spec.model.device
        context = process_context(device)
        here, there = context.Pipe(duplex=False)
        with package_on_path():
            variables = dict(os.environ)
            if device == "cuda" and torch.cuda.device_count():
                variables["CUDA_VISIBLE_DEVICES"] = _gpu(slot % torch.cuda.device_count())
            text = task_to_text(task, threads=threads, cores=cores)
            process = context.Process(target=work, args=(there, text, variables))  # type: ignore[attr-defined]
            process.start()
        there.close()  # the worker's end is its own: when it is gone, `here` comes to its end
        self._workers.append(_Worker(task, slot, process, here, attempts))

    def _hear(self, worker: _Worker, line: bytes, progress: Progress) -> None:
        said = json.loads(line)
        if "result" in said:
            worker.result = result_from_text(worker.task.spec, said["result"])
        else:
            progress(worker.task.spec, *said["progress"])


def _line(channel: Connection) -> bytes | None:
    """The next line, or None where the other end is gone, perhaps in the middle of a word."""
    try:
        return channel.recv_bytes()
    except (EOFError, OSError):
        return None


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


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
