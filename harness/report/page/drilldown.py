"""What the page keeps of a record: all but the long lists, so that a page of many runs stays small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_LAYER = ("name", "shape", "relative_error", "proxy_loss", "payload_bits", "seconds")
_LONG = 24  # entries; per-window losses and per-example answers have hundreds


def slim(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record for the page's drill-down: layers as rows under one head, long lists of metrics left out."""
    kept = {key: value for key, value in record.items() if key not in ("layers", "weights", "metrics")}
    kept["metrics"] = [
        {key: value for key, value in entry.items() if not (isinstance(value, list) and len(value) > _LONG)}
        for entry in record.get("metrics", ())
    ]
    kept["layers"] = _layers(record)
    return kept


def _layers(record: Mapping[str, Any]) -> dict[str, Any]:
    """{"head": names of columns, "rows": one list a layer}; a third of the size of a list of objects."""
    layers = record.get("layers") or ()
    facts = list(dict.fromkeys(name for layer in layers for name in layer.get("facts", {})))
    plain = [name for name in _OF_LAYER if any(layer.get(name) is not None for layer in layers)]
    facts = [name for name in facts if any(_is_short(layer.get("facts", {}).get(name)) for layer in layers)]
    rows = [
        [*(layer.get(name) for name in plain), *(_short(layer.get("facts", {}).get(name)) for name in facts)]
        for layer in layers
    ]
    return {"head": [*plain, *facts], "rows": [[_rounded(value) for value in row] for row in rows]}


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))


def _short(value: Any) -> Any:
    return value if _is_short(value) else None


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
