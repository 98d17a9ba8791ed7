"""Where downloads and converted files are kept: SAGEBENCH_CACHE, or ~/.cache/sagebench."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kernels.errors import InputError


def cache_folder(*parts: str) -> Path:
    """The folder `parts` below the cache; created if need be."""
    root = os.environ.get("SAGEBENCH_CACHE")
    folder = (Path(root).expanduser() if root else Path.home() / ".cache" / "sagebench").joinpath(*parts)
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
