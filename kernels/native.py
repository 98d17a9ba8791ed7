"""C++ compiled on demand by the system's compiler and loaded with ctypes; None where there is no compiler.

A library is kept in SAGEBENCH_CACHE (or ~/.cache/sagebench) under the hash of its source, the flags, the compiler and
the processor it was tuned for: an edited source is compiled anew, and a cache on a shared disk serves unlike machines.
Whoever loads a library has a plain torch path for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path

from kernels.atomic import atomic_path
from kernels.cache import cache_root

# Results must not depend on the compiler's taste for fused multiply-adds: they are compared with torch bit for bit.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi")
_COMPILERS = ("g++", "clang++")
_SECONDS = 600


@cache
def native_library(source: Path) -> ctypes.CDLL | None:
    """The library compiled from the C++ file `source`, or None: no compiler, or SAGEBENCH_NATIVE=0 says so.

    A compiler that fails is a warning, not an error: the caller's torch path gives the same result, only later.
    """
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None or os.environ.get("SAGEBENCH_NATIVE") == "0":
        return None
    target = cache_root() / "native" / f"{source.stem}-{_key(source, compiler)}.so"
    try:
        if not target.is_file():
            with atomic_path(target) as part:
                command = [compiler, *_FLAGS, str(source), "-o", str(part)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"{source.name} was not compiled ({reason.strip().splitlines()[-1]}); slower path", stacklevel=2)
        return None


def _key(source: Path, compiler: str) -> str:
    digest = hashlib.sha256(source.read_bytes())
    for part in (*_FLAGS, compiler, _version(compiler), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout


def _processor() -> str:
    """What -march=native looks at: the processor's name and its feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
