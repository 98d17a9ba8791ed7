"""Engines carry out runs: in this process, in a pool of processes on this machine, or on a Ray cluster."""

from harness.engines.base import Engine, InProcess, Result, Task

__all__ = ["Engine", "InProcess", "Result", "Task"]
