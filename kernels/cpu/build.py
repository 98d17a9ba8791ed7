"""Compile a C++ file once for an instruction set, and keep the library under a hash of all that decides its content.

`SAGEBENCH_CPU` chooses the instruction set (avx512bf16, avx512, avx2, plain), or `torch` for no library at all;
without it the best that this CPU has is taken. `CXX` names another compiler than c++.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import torch

from kernels.atomic import atomic_path
from kernels.cache import cache_root
from kernels.errors import InputError, did_you_mean

_SOURCE = Path(__file__).with_name("packed.cpp")
_COMMON = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
# Best first. Flags beyond the common ones.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512bf16": ("-DSAGE_AVX512", "-DSAGE_AVX512BF16", "-mavx512bf16", *_AVX512),
    "avx512": ("-DSAGE_AVX512", *_AVX512),
    "avx2": ("-DSAGE_AVX2", "-mavx2", "-mfma", "-mf16c"),
    "plain": ("-O2",),  # -O3 takes four times as long to compile
}
NONE = "torch"


def supported() -> tuple[str, ...]:
    """The instruction sets of this CPU, best first; always at least "plain"."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = ["plain"]
    if capability in ("AVX2", "AVX512"):
        found.insert(0, "avx2")
    if capability == "AVX512":
        found.insert(0, "avx512")
        if torch.cpu._is_avx512_bf16_supported():
            found.insert(0, "avx512bf16")
    return tuple(found)


def chosen() -> str:
    """What SAGEBENCH_CPU asks for, or the best of this CPU. Raises InputError for a name that is unknown here."""
    known = supported()
    asked = os.environ.get("SAGEBENCH_CPU", known[0])
    if asked not in (*known, NONE):
        raise InputError(f"SAGEBENCH_CPU={asked!r} cannot be used on this CPU" + did_you_mean(asked, (*known, NONE)))
    return asked


@cache
def library_path(instruction_set: str, source: Path = _SOURCE) -> Path | None:
    """The library compiled from `source`, built now if need be; None if it cannot be (said once as a warning)."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        warnings.warn("no C++ compiler: packed layers decode and multiply with torch, which is slow", stacklevel=2)
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    flags = [*_COMMON, *INSTRUCTION_SETS[instruction_set]]
    # Apple's compiler has no OpenMP of its own; one thread is right, if not fast.
    if sys.platform != "darwin":
        flags.append("-fopenmp")
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    digest = hashlib.sha256("\0".join([*texts, version, *flags]).encode()).hexdigest()
    path = cache_root() / "kernels" / f"{source.stem}-{instruction_set}-{digest[:16]}.so"
    if path.is_file():
        return path
    try:
        with atomic_path(path) as part:  # two processes may build at once: each renames a whole file into place
            command = [compiler, *flags, str(source), "-o", str(part)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", "") or str(error)
        reason = said.strip().splitlines()[0]
        warnings.warn(f"{compiler} cannot build the CPU kernels ({reason}); packed layers use torch", stacklevel=2)
        return None
    return path
