"""Typed access to a run record that may lack parts.

A record of an older version, or of a run that measured less, must still give its row: each property answers None or
an empty text for what is not there, and never raises.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.report.facts import fact

# Accuracies of a zero-shot task by the metric's name in tables and claims, and in lm-evaluation-harness.
_SCORES = {"accuracy": "acc", "accuracy_norm": "acc_norm"}


@dataclass(frozen=True)
class Measurement:
    """One entry of a record's metrics."""

    metric: str
    dataset: str
    value: float
    stderr: float | None  # in the unit of `value`
    windows: int | None  # of a task: its examples
    windows_available: int | None
    protocol: str  # "12 of 148 windows of wikitext2, context 2048, float32"
    unit: str = "window"  # what is counted: "window" or "example"
    context: int | None = None  # tokens of a window

    @property
    def is_subset(self) -> bool:
        """True if only some of the dataset's windows or examples were used."""
        return None not in (self.windows, self.windows_available) and self.windows != self.windows_available


def nominal_total(weight: float | None, scale: float | None) -> float | None:
    """The bits per weight that a method's paper counts; None where nobody does, as for models of other tools."""
    return None if weight is None or scale is None else weight + scale


@dataclass(frozen=True)
class Ledger:
    """A record's bit counts; bits are per weight of the quantized linears."""

    nominal_weight_bits: float | None = None
    nominal_scale_bits: float | None = None
    payload_bits: float | None = None
    total_bytes: int | None = None

    @property
    def nominal_bits(self) -> float | None:
        """`nominal_total` of both parts."""
        return nominal_total(self.nominal_weight_bits, self.nominal_scale_bits)


class RecordView:
    """A run record (the JSON object of one run), read with care."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record

    @property
    def ledger(self) -> Ledger:
        """The bit counts, each None if the record lacks it."""
        part = _mapping(self._record, "ledger")
        return Ledger(
            nominal_weight_bits=_number(part, "nominal_weight_bits"),
            nominal_scale_bits=_number(part, "nominal_scale_bits"),
            payload_bits=_number(part, "payload_bits"),
            total_bytes=_count(part, "total_bytes"),
        )

    def measurements(self, metric: str) -> dict[str, Measurement]:
        """What was measured by dataset. Of several entries for one dataset the first counts."""
        known = fact(self._record, metric)
        if known is not None:
            return {"": Measurement(metric, "", known, None, None, None, "")}
        found: dict[str, Measurement] = {}
        entries = self._record.get("metrics")
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, Mapping):
                continue
            if entry.get("metric") == "zeroshot" and metric in _SCORES:
                score = self._score(entry, metric)
                if score is not None and score.dataset not in found:
                    found[score.dataset] = score
                continue
            if entry.get("metric") != metric:
                continue
            value = _number(entry, "value")
            dataset = _text(entry, "dataset") or _text(entry, "corpus")
            if value is not None and dataset not in found:
                found[dataset] = self._measurement(entry, metric, dataset, value)
        return found

    def _measurement(self, entry: Mapping[str, Any], metric: str, dataset: str, value: float) -> Measurement:
        if metric == "perplexity":
            # Perplexity is exp(nll), so an error of nll moves it by ppl times as much (first order).
            of_nll = _number(entry, "nll_stderr")
            stderr = None if of_nll is None else value * of_nll
        else:
            stderr = _number(entry, "stderr")
        return Measurement(
            metric=metric,
            dataset=dataset,
            value=value,
            stderr=stderr,
            windows=_count(entry, "windows"),
            windows_available=_count(entry, "windows_available"),
            protocol=self._protocol(entry, dataset),
            context=_count(entry, "context"),
        )

    def _score(self, entry: Mapping[str, Any], metric: str) -> Measurement | None:
        """One accuracy of a zero-shot task, in percent; None if the task has no such metric."""
        score = _mapping(entry, "scores", _SCORES[metric])
        value = _number(score, "value")
        if value is None:
            return None
        examples, available = _count(entry, "examples"), _count(entry, "examples_available")
        part = "" if examples == available else f"first {examples} of "
        version, harness = _text(entry, "task_version"), _text(entry, "lm_eval")
        return Measurement(
            metric=metric,
            dataset=_text(entry, "dataset"),
            value=value,
            stderr=_number(score, "stderr"),
            windows=examples,
            windows_available=available,
            protocol=_join(
                "0-shot",
                f"lm_eval {harness}" if harness else "",
                _text(entry, "dtype"),
                "reparameterized weights" if self.reparameterized else "",
                f"{part}{available} examples of {_text(entry, 'dataset')}" + (f" v{version}" if version else ""),
            ),
            unit="example",
        )

    def _protocol(self, entry: Mapping[str, Any], dataset: str) -> str:
        windows, available, context = (_count(entry, key) for key in ("windows", "windows_available", "context"))
        dtype = _text(_mapping(self._record, "spec", "model"), "dtype") or _text(entry, "dtype")
        of_available = "" if available is None else f" of {available}"
        return _join(
            dataset if windows is None else f"{windows}{of_available} windows of {dataset}",
            "" if context is None else f"context {context}",
            dtype,
            "reparameterized weights" if self.reparameterized else "",
        )

    @property
    def calibration(self) -> str:
        """What the method was calibrated on, "16 x 2048 of c4-sample"; "" if it needed nothing."""
        part = _mapping(self._record, "spec", "calibration")
        samples, context = _count(part, "samples"), _count(part, "context")
        if samples is None:
            return ""
        crops = f"{samples}" if context is None else f"{samples} x {context}"
        corpus = _text(part, "corpus")
        return f"{crops} of {corpus}" if corpus else crops

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its calibration text and of the method's own draws, where it has them; one number if they are equal."""
        parts = _mapping(self._record, "spec", "calibration"), _mapping(self._record, "method", "options")
        found = [seed for part in parts if (seed := _count(part, "seed")) is not None]
        return tuple(dict.fromkeys(found)) or (0,)

    @property
    def but_for_seeds(self) -> str:
        """The run's spec as text, without these seeds: equal for runs that differ in nothing else."""
        spec = dict(_given(_mapping(self._record, "spec")))
        spec["calibration"] = {**_mapping(spec, "calibration"), "seed": None}
        method = _mapping(spec, "method")
        spec["method"] = {**method, "options": {**_mapping(method, "options"), "seed": None}}
        return json.dumps(spec, sort_keys=True)

    @property
    def hardware(self) -> str:
        """What the run was carried out on: "AMD EPYC, 2 threads", or the GPU."""
        part = _mapping(self._record, "environment")
        gpus = part.get("gpus")
        if _text(_mapping(self._record, "spec", "model"), "device").startswith("cuda") and isinstance(gpus, list):
            return ", ".join(dict.fromkeys(str(gpu) for gpu in gpus))
        threads = _count(part, "threads")
        return _join(_text(part, "cpu"), "" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}")

    @property
    def decoding(self) -> str:
        """How decode throughput was measured, "float16, batch 1, prompt 1984, 64 tokens"; "" if it was not."""
        entries = self._record.get("metrics")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping) and entry.get("metric") == "decode":
                synthetic = "random weights of the model's shapes" if entry.get("synthetic") is True else ""
                return _join(_text(entry, "dtype"), _text(entry, "dataset"), synthetic)
        return ""

    @property
    def reparameterized(self) -> bool:
        """True if the weights were taken off their grid before quantization."""
        return _mapping(self._record, "spec", "model").get("reparameterize") is True

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of any number of this run must know."""
        found = []
        provenance = _mapping(self._record, "method", "provenance")
        if provenance.get("reconstruction") is True:
            parity = _text(provenance, "parity") or "not tested"
            basis = _text(provenance, "basis") or "the paper's text"
            found.append(f"reconstruction from {basis}; parity with the authors' code: {parity}")
        remark = _text(provenance, "remark")
        if remark:
            found.append(remark)
        precision = _mapping(self._record, "model", "source_precision")
        as_stored = _mapping(self._record, "spec", "method").get("name") == "stored"  # no method saw these weights
        if precision.get("quantized") is True and not self.reparameterized and not as_stored:
            found.append(_quantized_source_note(precision))
        warnings = self._record.get("warnings")
        if isinstance(warnings, list) and warnings:
            count = len(warnings)
            found.append(f"the run gave {count} warning{'s' if count > 1 else ''}; see its record")
        return tuple(found)


def _quantized_source_note(precision: Mapping[str, Any]) -> str:
    """The footnote for weights that were on a grid before the method saw them."""
    layout, bits = _text(precision, "format"), _number(precision, "bits")
    what = _join(layout, "" if bits is None else f"{bits:.1f} bits a weight")
    # Q4_1: 4-bit codes, one scale and minimum for 32 weights; its 5.0 bits count those too.
    code = re.match(r"I?Q(\d)", layout)
    width = int(code.group(1)) if code else _count(precision, "bits")
    grid = _text(precision, "grid")
    if layout in ("Q4_0", "Q4_1"):
        grid = "a 4-bit group-32 grid"
    elif not grid:
        grid = "the grid they were on"
    flattered = "results near that many bits" if width is None else f"results at {width} bits or more"
    return (
        f"weights come from an already quantized file{f' ({what})' if what else ''}; {grid} reproduces them exactly, "
        f"so {flattered} are flattered; use --reparameterize"
    )


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _mapping(data: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for name in path:
        part = data.get(name)
        if not isinstance(part, Mapping):
            return {}
        data = part
    return data


def _given(value: Any) -> Any:
    """A spec without what is None in it: records of earlier versions lack such fields."""
    if not isinstance(value, Mapping):
        return value
    return {key: _given(part) for key, part in value.items() if part is not None}


def _number(data: Mapping[str, Any], name: str) -> float | None:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value


def _count(data: Mapping[str, Any], name: str) -> int | None:
    value = _number(data, name)
    return None if value is None or not math.isfinite(value) else int(value)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    return value if isinstance(value, str) else ""


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts that are not empty, each once, in order of first appearance."""
    return tuple(dict.fromkeys(text for text in texts if text))
