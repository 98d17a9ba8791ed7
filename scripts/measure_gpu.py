"""Everything that takes a GPU, in one command of under ten minutes: python scripts/measure_gpu.py --out results

Checks the compiled kernels, times them, and writes the records of decode and memory. Each stage is a process with a
time limit, in order of value; a stage that fails or runs out of time does not stop the next ones. Run again, it goes on
from the records that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
_SAGEBENCH = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]
_7B = ["--synthetic", "llama-2-7b"]
_70B = ["--synthetic", "llama-2-70b", "--methods", "SAGE-PTQ n_lut 3"]


def stages(out: Path) -> list[tuple[str, int, list[str]]]:
    """(name, the most seconds it may take, command)."""
    to = ["--device", "cuda", "--out", str(out)]
    few = ["--methods", "fp16", "sage-ptq", "GPTQ 4 bit g128", "billm"]
    json = f"--benchmark-json={out / 'kernels.json'}"
    return [
        ("kernels are right", 120, [*_PYTEST, "tests/kernels/triton/test_triton_products.py", "tests/harness/runtime"]),
        ("decode 7B", 150, [*_SAGEBENCH, "decode", *_7B, *few, *to]),
        ("kernel speed", 90, [*_PYTEST, "-s", "--benchmark-enable", json, "tests/benchmarks/test_kernel_speed.py"]),
        ("decode 70B", 70, [*_SAGEBENCH, "decode", *_70B, "--rounds", "5", *to]),
        ("memory 7B", 40, [*_SAGEBENCH, "memory", *_7B, "--methods", "fp16", "sage-ptq", *to]),
        ("memory 70B", 40, [*_SAGEBENCH, "memory", *_70B, *to]),
        (
            "banded 70B", 60,
            [*_SAGEBENCH, "decode", *_70B, "--runtime", "banded", "--band", "4", "--tokens", "8", "--rounds", "1", *to],
        ),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what takes a GPU.")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--budget", type=int, default=560, help="seconds for everything (560)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.budget
    failed = []
    for name, limit, command in stages(out):
        left = end - time.monotonic()
        if left < 10:
            failed.append(f"{name} (no time left)")
            continue
        print(f"--- {name}", flush=True)
        try:
            if subprocess.run(command, cwd=_ROOT, timeout=min(limit, left), check=False).returncode:
                failed.append(name)
        except subprocess.TimeoutExpired:
            failed.append(f"{name} (more than {min(limit, left):.0f} s)")
    print(f"failed: {', '.join(failed)}" if failed else "all stages done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
