"""Everything that takes a GPU, in one command of under ten minutes: python scripts/measure_gpu.py --out results

Checks the compiled kernels, times them, and writes the records of decode and memory. Each stage is a process of its own
with a time limit, in order of value: one that fails, hangs or breaks its CUDA context takes no other with it. Run
again, it goes on with the stages that were not done. Beside the records stand what figures depend on: the GPU's clocks,
power and temperature before and after (gpu.json), and the launches that were found to be the fastest (tuned/).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
_SAGEBENCH = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]
_7B = ["--synthetic", "llama-2-7b", "--methods"]
_70B = ["--synthetic", "llama-2-70b", "--methods", "SAGE-PTQ n_lut 3"]
# Of a stage that is asked to stop, to write what it has.
_LAST_SECONDS = 8.0
# What nvidia-smi is asked, of each GPU: MHz, watts, degrees Celsius.
_STATE = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """seconds: the most that it may take."""

    name: str
    seconds: float
    command: list[str]


def stages(out: Path) -> list[Stage]:
    """All stages, the most valuable first."""
    to = ["--device", "cuda", "--out", str(out)]
    # Most of this one is compiling, which every core can do.
    spread = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    kernels = [f"tests/kernels/triton/test_{name}.py" for name in ("triton_products", "trellis_kernels")]
    figures = f"--benchmark-json={out / 'kernels.json'}"
    # Fewer than by default: the budget is for all stages.
    rounds = ["--rounds", "4"]
    short = ["--tokens", "32", *rounds]
    # A token of the banded runtime takes as long as the copy of all weights.
    banded = ["--runtime", "banded", "--band", "4", "--tokens", "4", "--rounds", "1"]

    def decode(method: str, *options: str) -> list[str]:
        return [*_SAGEBENCH, "decode", *_7B, method, *options, *to]

    return [
        Stage("kernels are right", 130, [*_PYTEST, *spread, *kernels, "tests/harness/runtime/test_cuda.py"]),
        Stage("decode 7B SAGE-PTQ n_lut 4", 100, decode("SAGE-PTQ n_lut 4", *rounds)),
        Stage(
            "kernel speed", 90, [*_PYTEST, "-s", "--benchmark-enable", figures, "tests/benchmarks/test_kernel_speed.py"]
        ),
        Stage("decode 70B", 90, [*_SAGEBENCH, "decode", *_70B, *short, *to]),
        Stage("memory 7B", 45, [*_SAGEBENCH, "memory", *_7B, "SAGE-PTQ n_lut 4", *to]),
        Stage("memory 70B", 60, [*_SAGEBENCH, "memory", *_70B, *to]),
        Stage("decode 7B GPTQ 4 bit", 80, decode("GPTQ 4 bit g128", *short)),
        Stage("decode 7B SAGE-PTQ n_lut 3", 80, decode("SAGE-PTQ n_lut 3", *short)),
        Stage("decode 7B BiLLM", 80, decode("BiLLM block 128", *short)),
        Stage("banded 70B", 100, [*_SAGEBENCH, "decode", *_70B, *banded, *to]),
        Stage("memory 7B FP16", 45, [*_SAGEBENCH, "memory", *_7B, "FP16", *to]),
    ]


def run_stages(planned: Sequence[Stage], seconds: float, done: Path) -> list[str]:
    """Run the stages that have no file in the folder `done`, in `seconds` at most; returns what failed."""
    end = time.monotonic() + seconds
    failed = []
    done.mkdir(parents=True, exist_ok=True)
    for stage in planned:
        mark = done / stage.name.replace(" ", "-")
        if mark.exists():
            print(f"--- {stage.name}: done before", flush=True)
            continue
        left = end - time.monotonic() - _LAST_SECONDS
        if left <= 0:
            failed.append(f"{stage.name} (no time left)")
            continue
        print(f"--- {stage.name}", flush=True)
        start = time.monotonic()
        reason = _run(stage.command, min(stage.seconds, left))
        print(f"--- {stage.name}: {reason or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
        if reason is None:
            mark.touch()
        else:
            failed.append(f"{stage.name} ({reason})")
    return failed


def note_state(moment: str, file: Path) -> None:
    """Add to `file`, a JSON list, what the GPUs are like at `moment`; their figures are null where nvidia-smi is
    missing."""
    notes = []
    with contextlib.suppress(OSError, ValueError):
        notes = json.loads(file.read_text(encoding="utf-8"))
    notes.append({"moment": moment, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "gpus": _gpu_state()})
    file.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _gpu_state() -> list[dict[str, str]] | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [dict(zip(_STATE, line.split(", "), strict=False)) for line in said.splitlines()]


def keep_launches(folder: Path) -> None:
    """Copy to `folder` the launches that were chosen by measurement, which lie in the cache."""
    sys.path.insert(0, str(_ROOT))  # the package may lie there without being installed
    from kernels.cache import cache_root

    for file in (cache_root() / "tuned").glob("*.json"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)


def _hear_interrupts() -> None:
    """A shell starts what it puts into the background deaf to them, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(command: list[str], seconds: float) -> str | None:
    """None, or why it failed. Nothing that the command started is left behind."""
    process = subprocess.Popen(command, cwd=_ROOT, start_new_session=True, preexec_fn=_hear_interrupts)
    try:
        code = process.wait(timeout=seconds)
        return f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then still writes the figures that it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_LAST_SECONDS)
        return f"more than {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what takes a GPU.")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (570)")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    note_state("start", out / "gpu.json")
    try:
        failed = run_stages(stages(out), arguments.budget, out / "measured")
    finally:
        note_state("end", out / "gpu.json")
        keep_launches(out / "tuned")
    print(f"failed: {'; '.join(failed)}" if failed else "all stages done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
