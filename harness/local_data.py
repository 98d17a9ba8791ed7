"""The user's own data: the folder that SAGEBENCH_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from kernels.errors import InputError


def data_folder() -> Path | None:
    """The folder, or None if SAGEBENCH_DATA is not set. Raises InputError if it is no folder."""
    folder = os.environ.get("SAGEBENCH_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise InputError(f"SAGEBENCH_DATA={folder} is not a folder")
    return Path(folder)
