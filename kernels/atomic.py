"""Files and folders that are whole or absent: write beside the target, flush to disk, then rename."""

from __future__ import annotations

import glob
import os
import shutil
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
        _publish(part, 0o666)
        part.replace(target)
        _sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to write files to; on leaving without an error all is synced and the folder takes the name `target`.

    A crash at any moment leaves no `target` or a whole one, and what it left half-written is removed an hour later.
    Raises OSError if `target` is there and not empty: another process may have been faster.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(target.parent, name=glob.escape(target.name))
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield scratch
        for path in scratch.rglob("*"):
            _publish(path, 0o777 if path.is_dir() else 0o666)
        _publish(scratch, 0o777)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_stale_parts(folder: Path, older_than: float = 3600.0, name: str = "*") -> None:
    """Remove what killed processes left half-written in `folder`: files of `atomic_path`, and folders of that form.

    Only those older than so many seconds, for a younger one may be another process's, at work now. name: of the target,
    where others may have files of that form in the folder.
    """
    for part in folder.glob(f".{name}.*.part"):
        with suppress(OSError):  # another process may be cleaning up too
            if time.time() - part.stat().st_mtime > older_than:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def _publish(path: Path, mode: int) -> None:
    """Sync `path`, made private by `tempfile`, and give it the permissions that it would have had otherwise."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` as UTF-8, whole or not at all."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8")
