"""Where downloads and converted files are kept: SAGEBENCH_CACHE, or ~/.cache/sagebench."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kernels.cache import cache_root
from kernels.errors import InputError


def cache_folder(*parts: str) -> Path:
    """The folder `parts` below the cache; created if need be."""
    folder = cache_root().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache folder {folder} cannot be made ({error.strerror}); set SAGEBENCH_CACHE") from error
    return folder


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise InputError if the disk below `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"no disk space for {purpose}: {needed / 1e6:.0f} MB needed below {folder}, {free / 1e6:.0f} MB free; "
            "free some, or set SAGEBENCH_CACHE or --out to another disk"
        )


def cache_limit(default_gb: float) -> float:
    """Bytes that one kind of cached entry may take: SAGEBENCH_CACHE_GB, or `default_gb`, in 1e9 bytes."""
    asked = os.environ.get("SAGEBENCH_CACHE_GB", str(default_gb))
    try:
        limit = float(asked) * 1e9
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise InputError(f"SAGEBENCH_CACHE_GB={asked!r}; it must be a number of gigabytes, 0 or more")
    return limit


# An unfinished entry that changed within so many seconds may be in another process's hands.
_IN_THE_MAKING = 86400.0


def prune(keep: Sequence[Path], marker: str, limit: float) -> None:
    """Remove folders beside those in `keep` until all of them take `limit` bytes at most, or none is left to remove.

    Those that were used longest ago go first; one that another process may be making stays. marker: the file that a
    finished entry has, whose time of change is that of its last use.
    """
    others = [folder for folder in keep[0].parent.iterdir() if folder not in keep and folder.is_dir()]
    making = [folder for folder in others if _in_the_making(folder / marker)]
    used = sum(folder_bytes(folder) for folder in (*keep, *making))
    for folder in sorted(set(others) - set(making), key=lambda folder: _last_used(folder / marker), reverse=True):
        used += folder_bytes(folder)
        if used > limit:
            shutil.rmtree(folder, ignore_errors=True)


def _in_the_making(marker: Path) -> bool:
    # One that is whole still has the name of a scratch folder (`atomic_folder`) until it is synced.
    unfinished = not marker.is_file() or marker.parent.suffix == ".part"
    return unfinished and time.time() - _last_used(marker) < _IN_THE_MAKING


def _last_used(marker: Path) -> float:
    """Time of last use, or of the last file of an entry that is not finished yet; 0 if it has just been removed."""
    for path in (marker, marker.parent):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def folder_bytes(folder: Path) -> int:
    """Of the files in `folder`, as long as they are there."""
    total = 0
    for file in folder.glob("*"):
        with suppress(OSError):  # another process may be pruning too
            total += file.stat().st_size
    return total
