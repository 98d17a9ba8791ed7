"""Runs that need not be carried out: a finished run has measured the same weights on as many windows or more.

Windows are measured in order from the start of the text, each alone, and a record keeps the loss of every one. So the
perplexity of the first 12 is known once 148 have been measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from harness.metrics.perplexity import shorten
from harness.records import RecordStore
from harness.runner import anchor_warnings, compare
from harness.spec import STORED, PerplexitySpec, QualitySpec, RunSpec


def answered(runs: Sequence[RunSpec], references: Mapping[str, str], store: RecordStore) -> dict[str, dict[str, Any]]:
    """Records, by key, of those of `runs` that are not finished and that longer runs in `store` answer.

    references: run key -> key of the unquantized run it is compared with, which stands before it in `runs`. Nothing is
    written. `taken_from` names the longer run in each record; environment, weights and phases are that run's.
    """
    wanted = [spec for spec in runs if _can_be_shorter(spec) and store.load(spec.key) is None]
    if not wanted:
        return {}
    finished = _by_weights(store.load_all().values())
    found: dict[str, dict[str, Any]] = {}
    for spec in wanted:
        key = references.get(spec.key, spec.key)
        reference = None if key == spec.key else found.get(key) or store.load(key)
        if key != spec.key and reference is None:
            continue  # a quantized number does not count without
        for longer, record in finished.get(spec.quantization_key(), ()):
            chosen = [_choose(wish, longer, record) for wish in spec.evaluations]
            if None not in chosen:
                # Others are compared with it by its key.
                found[spec.key] = {**_shortened(spec, longer, record, chosen, reference), "key": spec.key}
                break
    return found


def _can_be_shorter(spec: RunSpec) -> bool:
    """Stored models are compared with nothing and measured elsewhere; speed and memory are no sum over windows."""
    return spec.method.name != STORED and len(spec.quality) == len(spec.evaluations)


def _by_weights(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[RunSpec, dict[str, Any]]]]:
    """Finished runs by what decides their weights."""
    found: dict[str, list[tuple[RunSpec, dict[str, Any]]]] = {}
    for record in records:
        try:
            spec = RunSpec.model_validate_json(json.dumps(record["spec"]))
        except ValidationError:  # of a build that had other fields
            continue
        parts = len(record["metrics"]), len(record.get("data", {}).get("evaluations", ()))
        if _can_be_shorter(spec) and parts == (len(spec.evaluations),) * 2:
            found.setdefault(spec.quantization_key(), []).append((spec, record))
    return found


def _choose(wish: Any, longer: RunSpec, record: dict[str, Any]) -> int | None:
    """Which evaluation of a finished run answers `wish`: the same one, or perplexity on more of the same text."""
    for index, (made, metric) in enumerate(zip(longer.quality, record["metrics"], strict=True)):
        if made == wish or _covers(made, metric, wish):
            return index
    return None


def _covers(made: QualitySpec, metric: dict[str, Any], wish: QualitySpec) -> bool:
    if not (isinstance(made, PerplexitySpec) and isinstance(wish, PerplexitySpec)):
        return False
    available = metric["windows_available"]
    asked = available if wish.windows is None else min(wish.windows, available)
    return made.model_copy(update={"windows": wish.windows}) == wish and asked <= metric["windows"]


def _shortened(
    spec: RunSpec,
    longer: RunSpec,
    record: dict[str, Any],
    chosen: Sequence[int | None],
    reference: dict[str, Any] | None,
) -> dict[str, Any]:
    metrics, data = [], []
    for wish, index in zip(spec.evaluations, chosen, strict=True):
        assert index is not None
        metric = record["metrics"][index]
        metrics.append(shorten(metric, wish.windows) if isinstance(wish, PerplexitySpec) else metric)
        data.append(record["data"]["evaluations"][index])
    # Whether the whole text gives the published figure is no question of a part of it.
    of_the_whole = anchor_warnings(longer, record["metrics"])
    return {
        **{name: part for name, part in record.items() if name != "created"},
        "spec": spec.model_dump(mode="json"),
        "data": {**record["data"], "evaluations": data},
        "metrics": metrics,
        "reference": compare(spec, metrics, reference),
        "warnings": [
            *(line for line in record["warnings"] if line not in of_the_whole), *anchor_warnings(spec, metrics),
        ],
        "taken_from": {"key": record["key"], "created": record["created"]},
    }  # fmt: skip
