"""What a result depends on besides its spec: packages, code, hardware, threads."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = (
    "sagebench",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "lm_eval",
    "gguf",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "pydantic",
    "triton",
)
_ROOT = Path(__file__).resolve().parent.parent


def environment_record() -> dict[str, Any]:
    """Everything about this process and machine that a record keeps."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(_PACKAGES),
        "git": git_state(),
        "code": code_fingerprint(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu_driver": _gpu_driver(),
    }


def _gpu_driver() -> str | None:
    """Version of the NVIDIA driver, which is one for all GPUs; None without a GPU or without NVML's package."""
    if not torch.cuda.device_count():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # NVML has exceptions of its own, in a package that may be missing
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


@cache
def quantization_fingerprint() -> str:
    """sha256 (16 digits) over the source of the layouts, the methods and the quantization loop.

    Part of the key under which quantized weights are cached: an edited method never meets its old weights.
    """
    kinds = ("*.py", "*.cpp", "*.h", "*.safetensors")  # compiled code and codebooks decide results too
    files = [file for floor in ("kernels", "methods") for kind in kinds for file in (_ROOT / floor).rglob(kind)]
    names = ("calibration.py", "quantize.py", "layer_log.py", "determinism.py", "corpora.py")
    files += [_ROOT / "harness" / name for name in names]
    return _hash_files([*files, *(_ROOT / "harness" / "models").rglob("*.py")])


@cache
def code_fingerprint() -> str:
    """The same over everything that a measurement depends on: quantization, metrics, the ledger and the runner."""
    files = [
        _ROOT / "harness" / name for name in ("ledger.py", "runner.py", "evaluations.py", "reference.py", "stored.py")
    ]
    for folder in ("metrics", "zeroshot"):
        files += (_ROOT / "harness" / folder).rglob("*.py")
    return _hash_files(files, quantization_fingerprint())


@cache
def runtime_fingerprint() -> str:
    """The same over everything that decode and memory depend on: the runtime too, which no quality depends on."""
    return _hash_files([*(_ROOT / "harness" / "runtime").rglob("*.py")], code_fingerprint())


def _hash_files(files: list[Path], start: str = "") -> str:
    digest = hashlib.sha256(start.encode())
    for file in sorted(files):
        digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this code runs from; None outside a checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != _ROOT:
            return None  # installed below somebody else's checkout
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those of the packages `names` that are installed."""
    return {name: version for name in names if (version := _version(name)) is not None}


@cache  # what this process has imported does not change, and its metadata take milliseconds to parse
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" in found:
        return found["model name"]
    # ARM has numbers for names.
    numbers = [f"{name} {found[name]}" for name in ("CPU implementer", "CPU part") if name in found]
    return ", ".join([platform.machine(), *numbers])
