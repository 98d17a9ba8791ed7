"""How a product is launched: into how many slabs of columns it is split, and how many loads are in flight.

The choice is measured once for a GPU (`tune`) and kept; until then, and in the interpreter, a rule of thumb is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from kernels.atomic import write_text
from kernels.cache import cache_root

# Part of every key: raise it when a kernel changes enough for an old choice to be wrong.
_VERSION = 2
_ROWS = 64


@dataclass(frozen=True)
class Launch:
    """splits: slabs of columns. stages: of the software pipeline."""

    splits: int
    stages: int

    def fitted(self, tiles: int) -> Launch:
        """The same for a matrix of so many tiles of columns, without slabs that would be empty."""
        each = -(-tiles // self.splits)
        return Launch(-(-tiles // each), self.stages)


_STAGES = (2, 1, 3)
_MOST_SPLITS = 64

_measured: dict[str, Launch] = {}


def chosen_launch(
    layout: str, width: int, rows: int, tiles: int, vectors: int, dtype: torch.dtype, device: torch.device
) -> Launch:
    """The launch of a product of [rows, 256 * tiles] codes of `width` bits with so many vectors."""
    key = launch_key(layout, width, rows, tiles, vectors, dtype)
    return _stored(device).get(key) or _measured.get(key) or _rule_of_thumb(rows, tiles, device)


def launch_key(layout: str, width: int, rows: int, tiles: int, vectors: int, dtype: torch.dtype) -> str:
    bucket = 1 if vectors == 1 else 8 if vectors <= 8 else 16
    return f"v{_VERSION} {layout} {width} {rows}x{tiles} m{bucket} {str(dtype).removeprefix('torch.')}"


def tune(
    key: str, tiles: int, milliseconds: Callable[[], float], device: torch.device, *, staged: bool = True
) -> Launch:
    """Find the fastest splits and then, if staged, the fastest pipeline for them, and keep the choice.

    milliseconds: times the product as it is now chosen. A candidate that needs more than the device has, or that this
    version of the compiler fails on, is no choice; the last one's error is raised if none is left. Errors of the device
    itself are raised at once: after one of them every later time may be wrong.
    """
    known = _stored(device)
    if key in known:
        return known[key]
    times: dict[Launch, float] = {}
    refused: Exception | None = None

    def measure(candidate: Launch) -> None:
        nonlocal refused
        _measured[key] = candidate
        try:
            times[candidate] = milliseconds()
        except (OutOfResources, PTXASError, CompilationError) as error:
            refused = error
        except RuntimeError as error:
            if _is_of_the_device(error):
                del _measured[key]
                raise
            refused = error

    for splits in split_candidates(tiles):
        measure(Launch(splits, _STAGES[0]))
    for stages in _STAGES[1:] if staged else ():
        splits = min(times, key=lambda launch: times[launch]).splits if times else split_candidates(tiles)[-1]
        measure(Launch(splits, stages))
    if not times:
        del _measured[key]
        assert refused is not None
        raise refused
    best = min(times, key=lambda launch: times[launch])
    _measured[key] = known[key] = best
    content = {name: asdict(launch) for name, launch in sorted(known.items())}
    write_text(_file(device), json.dumps(content, indent=1) + "\n")
    return best


def _is_of_the_device(error: RuntimeError) -> bool:
    """Whether CUDA raised it, by torch ("CUDA error: ...", "CUDA out of memory") or by triton ("Triton Error [CUDA]");
    the passes of triton's compiler raise RuntimeError as well, with no class of its own."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA" in str(error)


def split_candidates(tiles: int) -> list[int]:
    """Powers of two, and one tile a split."""
    most = min(tiles, _MOST_SPLITS)
    return sorted({1 << bit for bit in range(most.bit_length())} | {most})


def _rule_of_thumb(rows: int, tiles: int, device: torch.device) -> Launch:
    """Programs of one warp: sixteen for each multiprocessor, or as many as there are tiles."""
    if device.type != "cuda":
        return Launch(2, 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = -(-rows // _ROWS)
    return Launch(max(1, min(tiles, 16 * processors // blocks)), 2)


@cache
def _stored(device: torch.device) -> dict[str, Launch]:
    """What was measured earlier on this GPU; changed by `tune`."""
    try:
        content = json.loads(_file(device).read_text(encoding="utf-8"))
        return {key: Launch(**launch) for key, launch in content.items()}
    except (OSError, ValueError, TypeError):
        return {}


def _file(device: torch.device) -> Path:
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).replace(" ", "-")
    return cache_root() / "tuned" / f"{name}-triton{triton.__version__}.json"
