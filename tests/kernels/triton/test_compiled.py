"""The kernels compiled for real GPUs, without one: what the interpreter cannot see.

Each is compiled in a process of its own, since the interpreter replaces the compiler where it is asked for.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("target", [("90", "bf16"), ("80", "fp16")], ids=" without ".join)  # dtypes differ in little
def test_kernels_compile_without_spills(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, str(SCRIPT), *target], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 18
    for line in lines:
        name, spills, shared = line.split()
        assert int(spills) == 0, f"{name} spills {spills} bytes"
        assert int(shared) <= 99 * 1024, f"{name} takes {shared} bytes of shared memory"
