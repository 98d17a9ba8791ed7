"""Where this program keeps files between runs: SAGEBENCH_CACHE, or ~/.cache/sagebench."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder, which may not be there yet."""
    root = os.environ.get("SAGEBENCH_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "sagebench"
