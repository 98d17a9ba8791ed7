"""The runs of a sweep as tasks of a Ray cluster (extra `sagebench[ray]`).

Records come back to the process that asked and are written there: the store is one folder, wherever the runs were. A
run whose worker or node dies is begun again by Ray; on the same node, or with a shared SAGEBENCH_CACHE, from its last
finished block.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from harness.engines.base import Progress, Result, Task, attempt
from harness.engines.messages import result_from_text, result_to_text, task_from_text, task_to_text
from harness.engines.throttle import Throttle
from harness.spec import RunSpec
from kernels.errors import InputError

# Variables that decide where a run finds its models, texts and caches; the nodes get those of the asking process.
_PASSED_ON = ("SAGEBENCH_", "HF_", "PYTHONPATH", "TOKENIZERS_PARALLELISM")
_EVERY = 1.0  # seconds between two looks at the progress
_MANY = 10_000  # Ray queues what does not fit


class RayCluster:
    """Runs on the cluster at `address` ("auto", "host:port", "ray://host:port"), each with its own share of a node.

    threads: CPU cores of a run, and its threads. gpus: GPUs of a run, None for one where the model is to be on one.
    memory_bytes: what Ray reserves for a run, None for no reservation. retries: of a run whose worker died.
    """

    slots = _MANY

    def __init__(
        self,
        address: str,
        threads: int = 1,
        gpus: float | None = None,
        memory_bytes: int | None = None,
        retries: int = 3,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("--engine ray needs Ray: pip install 'sagebench[ray]'") from error
        self._ray: Any = ray
        _check_address(address)
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        variables["OMP_NUM_THREADS"] = str(threads)
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level=logging.ERROR,
                ignore_reinit_error=True,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"--address {address!r}: no Ray cluster answers there ({reason})") from error
        self._threads = threads
        self._gpus = gpus
        self._options: dict[str, Any] = {"num_cpus": threads, "max_retries": retries}
        if memory_bytes is not None:
            self._options["memory"] = memory_bytes
        self._board: Any = ray.remote(_Board).options(num_cpus=0).remote()
        self._running: dict[Any, RunSpec] = {}

    def start(self, task: Task) -> None:
        wanted = (1.0 if task.spec.model.device.startswith("cuda") else 0.0) if self._gpus is None else self._gpus
        remote = self._ray.remote(_execute).options(**self._options, num_gpus=wanted, name=task.spec.describe())
        self._running[remote.remote(task_to_text(task, threads=self._threads), self._board)] = task.spec

    def wait(self, progress: Progress) -> Result:
        while True:
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_EVERY)
            specs = {spec.key: spec for spec in self._running.values()}
            for key, step in self._ray.get(self._board.take.remote()).items():
                if key in specs:
                    progress(specs[key], *step)
            if done:
                spec = self._running.pop(done[0])
                try:
                    return result_from_text(spec, self._ray.get(done[0]))
                except self._ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:300]
                    return Result(spec, None, f"{type(error).__name__}: {reason}", str(error))

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _check_address(address: str) -> None:
    """Raise InputError if nobody listens there: Ray itself would try for minutes, and then end the process."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if not port.isdecimal():
            raise OSError("must be auto, host:port or ray://host:port")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address!r}: no Ray cluster answers there ({error})") from error


class _Board:
    """An actor that holds the last step of every run."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[int, int, str]] = {}

    def put(self, key: str, step: tuple[int, int, str]) -> None:
        self._steps[key] = step

    def take(self) -> dict[str, tuple[int, int, str]]:
        """The steps since the last call."""
        steps, self._steps = self._steps, {}
        return steps


def _execute(text: str, board: Any) -> str:
    """One run, on a node of the cluster."""
    import torch

    task, settings = task_from_text(text)
    torch.set_num_threads(settings["threads"])
    key = task.spec.key
    progress = Throttle(_EVERY, lambda done, total, what: board.put.remote(key, (done, total, what)))
    return result_to_text(attempt(task, progress))
