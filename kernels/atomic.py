"""Files that are whole or absent: write beside the target, flush to disk, then rename."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A path to write to; on leaving without an error the file is synced and takes the name `target`.

    A crash at any moment leaves either the old file or the new one. On an error nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; give the finished file the permissions that open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def remove_stale_parts(folder: Path, older_than: float = 3600.0) -> None:
    """Remove what killed processes left half-written in `folder`: files of `atomic_path` older than so many seconds.

    A younger one may be another process's, at work now.
    """
    for part in folder.glob(".*.part"):
        with suppress(OSError):  # another process may be cleaning up too
            if time.time() - part.stat().st_mtime > older_than:
                part.unlink()


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` as UTF-8, whole or not at all."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8")
