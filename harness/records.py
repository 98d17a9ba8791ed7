"""Run records: one JSON file a run, written whole or not at all, named by the run's key.

A finished run is `<key>.json`, a failed one `<key>.failed.json` until it succeeds. A file that cannot be read is moved
aside as `<name>.corrupt` and counts as absent. This module does not need torch: reports read records only.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kernels.atomic import write_text
from kernels.errors import InputError

FORMAT = 1
# Speed and memory are measured on no text.
_OF_THE_RUNTIME = ("decode", "memory")
# Keys name files: nothing that could leave the folder.
_KEY = re.compile(r"[0-9A-Za-z_-]+")


class RecordStore:
    """The records below one folder. warnings: what was found wrong with its files, for the user to see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []

    def path(self, key: str) -> Path:
        """The file of a record. Raises InputError for a key that could name a file elsewhere."""
        return self.folder / f"{_checked(key)}.json"

    def failure_path(self, key: str) -> Path:
        return self.folder / f"{_checked(key)}.failed.json"

    def load(self, key: str) -> dict[str, Any] | None:
        """The finished record of `key`, or None. A damaged file is moved aside and reported in `warnings`."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            problem = _problem(record, key)
        except (ValueError, OSError) as error:
            problem = str(error)
        if problem:
            aside = path.with_suffix(".json.corrupt")
            with suppress(FileNotFoundError):  # another task was faster
                path.replace(aside)
            self.warnings.append(f"record {path} is corrupt ({problem}); moved to {aside.name}, the run is repeated")
            return None
        return record

    def save(self, key: str, record: dict[str, Any]) -> Path:
        """Store a finished record; a failure of the same run is forgotten."""
        content = {"format": FORMAT, "key": key, "created": _now(), **record}
        write_text(self.path(key), json.dumps(content, indent=1, allow_nan=False) + "\n")
        self.failure_path(key).unlink(missing_ok=True)
        return self.path(key)

    def save_failure(self, key: str, spec: dict[str, Any], error: str, details: str) -> Path:
        """Keep what went wrong; the run is tried again next time."""
        content = {"format": FORMAT, "key": key, "created": _now(), "spec": spec, "error": error, "details": details}
        write_text(self.failure_path(key), json.dumps(content, indent=1) + "\n")
        return self.failure_path(key)

    def load_all(self) -> dict[str, dict[str, Any]]:
        """Every finished record by key."""
        keys = sorted(path.stem for path in self.folder.glob("*.json") if _KEY.fullmatch(path.stem))
        return {key: record for key in keys if (record := self.load(key)) is not None}


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InputError(f"key {key!r} of a run: must be letters, digits, _ and -, such as 0123456789abcdef")
    return key


def outcome(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says, without when and how fast it came about: equal for runs that must be equal.

    Left out: dates, times, memory, whether weights came from the cache, where blocks lay while they were computed, and
    which longer run has measured them.
    """
    rest = {key: value for key, value in record.items() if key not in ("created", "phases", "taken_from")}
    rest["quantization"] = {"key": record["quantization"]["key"], "file_bytes": record["quantization"]["file_bytes"]}
    rest["model"] = {key: value for key, value in record["model"].items() if key != "placement"}
    rest["layers"] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in record["layers"]]
    return rest


def _problem(record: Any, key: str) -> str | None:
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("format") != FORMAT:
        return f"format {record.get('format')!r}, this build writes {FORMAT}"
    if record.get("key") != key:
        return f"holds key {record.get('key')!r}"
    missing = [part for part in ("spec", "metrics", "ledger", "environment") if part not in record]
    if missing:
        return f"no {missing[0]!r}"
    odd = [part for part in ("spec", "ledger", "environment") if not isinstance(record[part], dict)]
    if odd:
        return f"{odd[0]!r} is no JSON object"
    metrics = record["metrics"]
    if not (
        isinstance(metrics, list) and all(isinstance(m, dict) and {"metric", "value"} <= m.keys() for m in metrics)
    ):
        return "metrics without their values"
    if any("dataset" not in m for m in metrics if m["metric"] not in _OF_THE_RUNTIME):
        return "metrics without their dataset"
    return None if "payload_bits" in record["ledger"] else "a ledger without its bits"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
