"""Results of zero-shot tasks kept between runs, by what decides them: weights, tokenizer, task, versions, documents.

A sweep that adds a task, or another table with the same model, does not score again what was scored.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from harness.cache import cache_folder
from kernels.atomic import write_text

# Raise it when the entry of a record changes.
VERSION = 1


def result_key(weights: str, **facts: Any) -> str:
    """16 hex digits for a result. weights: the key of the quantized weights, which covers the model's content."""
    text = json.dumps({"version": VERSION, "weights": weights, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_sha256(tokenizer: Any) -> str:
    """A checksum over how `tokenizer` cuts text; over its vocabulary where it cannot tell more."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return hashlib.sha256(json.dumps([rules, tokenizer.all_special_tokens]).encode()).hexdigest()


def load_result(key: str) -> dict[str, Any] | None:
    """The kept entry, or None. A damaged one counts as absent."""
    try:
        content = json.loads((cache_folder("zeroshot") / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("metric") == "zeroshot" else None


def save_result(key: str, entry: dict[str, Any]) -> None:
    """Keep `entry` under `key`."""
    write_text(cache_folder("zeroshot") / f"{key}.json", json.dumps(entry, allow_nan=False))
