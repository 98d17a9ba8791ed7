"""Runs that need not be carried out: a finished run has measured the same weights on as many windows or more.

Windows are measured in order from the start of the text, each alone, and a record keeps the loss of every one. So the
perplexity of the first 12 is known once 148 have been measured. What else a run asks for must have been measured as it
is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from harness.environment import code_fingerprint
from harness.metrics.perplexity import shorten
from harness.records import RecordStore
from harness.runner import NoOpError, anchor_warnings, compare
from harness.spec import STORED, EvaluationSpec, PerplexitySpec, RunSpec


def answered(runs: Sequence[RunSpec], references: Mapping[str, str], store: RecordStore) -> dict[str, dict[str, Any]]:
    """Records, by key, of those of `runs` that are not finished and that finished runs in `store` answer.

    references: run key -> key of the unquantized run it is compared with, which stands before it in `runs`. Nothing is
    written. `taken_from` names the other run in each record; environment, weights and phases are that run's. Of several
    runs one by today's code is taken, and the newest.
    """
    wanted = [spec for spec in runs if _measures_quality(spec) and store.load(spec.key) is None]
    finished = _by_weights(store.load_all().values()) if wanted else {}
    found: dict[str, dict[str, Any]] = {}
    for spec in wanted:
        key = references.get(spec.key, spec.key)
        reference = None if key == spec.key else found.get(key) or store.load(key)
        if key != spec.key and reference is None:
            continue  # a quantized number does not count without
        for other, record in finished.get(spec.quantization_key(), ()):
            parts = _parts(spec, other, record)
            if parts is not None:
                with suppress(NoOpError):  # carried out, it fails and is recorded as any other
                    found[spec.key] = _answer(spec, other, record, parts, reference)
                break
    return found


def _measures_quality(spec: RunSpec) -> bool:
    """Speed and memory are no sum over windows, and models that were stored before are measured elsewhere."""
    return spec.method.name != STORED and len(spec.quality) == len(spec.evaluations)


def _by_weights(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[RunSpec, dict[str, Any]]]]:
    """Finished runs by what decides their weights, the best first."""
    found: dict[str, list[tuple[RunSpec, dict[str, Any]]]] = {}
    for record in sorted(records, key=_by_today_and_newest, reverse=True):
        try:
            spec = RunSpec.model_validate_json(json.dumps(record["spec"]))
        except ValidationError:  # of a build that had other fields
            continue
        # A key of other rules (SPEC_VERSION) says that the record answers nothing any more.
        if spec.key == record["key"] and _measures_quality(spec) and _is_whole(spec, record):
            found.setdefault(spec.quantization_key(), []).append((spec, record))
    return found


def _by_today_and_newest(record: dict[str, Any]) -> tuple[bool, str]:
    return record["environment"].get("code") == code_fingerprint(), record.get("created", "")


def _is_whole(spec: RunSpec, record: dict[str, Any]) -> bool:
    """Whether a record has all that another one is made from; those of early builds lack some of it."""
    parts = record["metrics"], (record.get("data") or {}).get("evaluations", ())
    return {"warnings", "created"} <= record.keys() and all(len(part) == len(spec.evaluations) for part in parts)


def _parts(spec: RunSpec, other: RunSpec, record: dict[str, Any]) -> list[int] | None:
    """For each evaluation of `spec` which one of a finished run answers it; None if one has no answer."""
    made = list(zip(other.evaluations, record["metrics"], strict=True))
    found = [
        next((index for index, (done, metric) in enumerate(made) if done == wish or _covers(done, metric, wish)), None)
        for wish in spec.evaluations
    ]
    parts = [index for index in found if index is not None]
    return parts if len(parts) == len(found) else None


def _covers(done: EvaluationSpec, metric: dict[str, Any], wish: EvaluationSpec) -> bool:
    """Whether perplexity was measured on the windows of `wish`, or on more, and the loss of each is known."""
    if not (isinstance(done, PerplexitySpec) and isinstance(wish, PerplexitySpec)):
        return False
    available, losses = metric.get("windows_available"), metric.get("window_nll")
    if available is None or losses is None or done.model_copy(update={"windows": wish.windows}) != wish:
        return False
    return (available if wish.windows is None else min(wish.windows, available)) <= len(losses)


def _answer(
    spec: RunSpec, other: RunSpec, record: dict[str, Any], parts: list[int], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """The record of `spec`, from that of another run of the same weights."""
    metrics = [
        shorten(record["metrics"][index], wish.windows)
        if isinstance(wish, PerplexitySpec) and wish != other.evaluations[index]
        else record["metrics"][index]
        for wish, index in zip(spec.evaluations, parts, strict=True)
    ]
    # Whether the whole text gives the published figure is no question of a part of it.
    of_the_whole = anchor_warnings(other, record["metrics"])
    warnings = [line for line in record["warnings"] if line not in of_the_whole]
    return {
        **{name: part for name, part in record.items() if name != "created"},
        "key": spec.key,
        "spec": spec.model_dump(mode="json"),
        "data": {**record["data"], "evaluations": [record["data"]["evaluations"][index] for index in parts]},
        "metrics": metrics,
        "reference": compare(spec, metrics, reference),
        "warnings": [*warnings, *anchor_warnings(spec, metrics)],
        "taken_from": record.get("taken_from") or {"key": record["key"], "created": record["created"]},
    }
