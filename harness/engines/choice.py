"""The engine that the command line asks for."""

from __future__ import annotations

import argparse

import torch

from harness.engines.base import Engine, InProcess
from harness.engines.pool import ProcessPool
from kernels.errors import InputError


def choose_engine(arguments: argparse.Namespace) -> Engine:
    """Raises InputError for options that do not go together, or numbers out of range."""
    for name, least in (("workers", 1), ("threads", 1), ("retries", 0), ("gpus_per_run", 0), ("memory_per_run", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    if arguments.engine == "ray":
        return _ray(arguments)
    for name in ("address", "gpus_per_run", "memory_per_run"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with --engine ray")
    if arguments.workers == 1:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        return InProcess()
    return ProcessPool(arguments.workers, arguments.threads, 1 if arguments.retries is None else arguments.retries)


def _ray(arguments: argparse.Namespace) -> Engine:
    from harness.engines.ray_cluster import RayCluster

    if arguments.workers != 1:
        raise InputError("--workers is for this machine; Ray runs as many as its nodes have room for")
    if arguments.address is None:
        raise InputError("--engine ray needs --address: auto, host:port or ray://host:port")
    return RayCluster(
        arguments.address,
        threads=arguments.threads or 1,
        gpus=arguments.gpus_per_run,
        memory_bytes=None if arguments.memory_per_run is None else int(arguments.memory_per_run * 1e9),
        retries=3 if arguments.retries is None else arguments.retries,
    )
