"""Tidy rows: one for each (method, setting, model, metric, dataset) of a table.

A row holds the paper's number, the measured one, or both; what is absent is None and `notes` say why. Numbers of
different datasets never share a row: text that stands in for a corpus has its own dataset name, and so its own row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from harness.claims import BIT_METRICS, Claim, find
from harness.plan import PlannedRow, TablePlan
from harness.report.facts import FACTS, SPEED
from harness.report.records_view import Ledger, Measurement, RecordView, distinct, nominal_total

COLUMNS = (
    "item", "method", "setting", "model", "metric", "dataset", "paper", "measured", "stderr", "difference",
    "nominal_weight_bits", "nominal_scale_bits", "payload_bits", "total_bytes", "run_key", "note",
)  # fmt: skip
# acc_norm of a zero-shot task; KL from the unquantized model.
FURTHER_METRICS = ("accuracy_norm", "divergence")
# Tokens of a window in all of the paper's tables of perplexity.
PAPER_CONTEXT = 2048
Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TidyRow:
    """One number, claimed or measured. Bits are per weight of the quantized linears; stderr has the metric's unit."""

    item: str
    method: str
    setting: str
    model: str
    metric: str
    dataset: str  # "" where the metric has none
    paper: float | None
    measured: float | None
    stderr: float | None
    nominal_weight_bits: float | None
    nominal_scale_bits: float | None
    payload_bits: float | None
    total_bytes: int | None
    run_key: str  # "" if no run was planned
    notes: tuple[str, ...]
    protocol: str = ""  # how it was measured: windows, context, dtype
    calibration: str = ""

    @property
    def nominal_bits(self) -> float | None:
        """`nominal_total` of both parts."""
        return nominal_total(self.nominal_weight_bits, self.nominal_scale_bits)

    @property
    def difference(self) -> float | None:
        """measured - paper, where both are finite numbers."""
        if self.paper is None or self.measured is None or not isfinite(self.measured):
            return None
        return self.measured - self.paper

    @property
    def note(self) -> str:
        """All that a reader of this one row must know, in one text."""
        calibration = f"calibration {self.calibration}" if self.calibration else ""
        return "; ".join(distinct((*self.notes, self.protocol, calibration)))


def build_rows(plan: TablePlan, records: Records, claims: Iterable[Claim]) -> tuple[TidyRow, ...]:
    """The rows of a table, in the plan's order; `records` are run records by run key."""
    of_item = find(claims, item=plan.item)
    rows: list[TidyRow] = []
    for planned in plan.rows:
        record = None if planned.run_key is None else records.get(planned.run_key)
        view = None if record is None else RecordView(record)
        if plan.metric != SPEED:
            rows += _metric_rows(plan, planned, view, of_item)
        rows += _further_rows(plan, planned, view)
        rows += _fact_rows(plan, planned, view, of_item)
        rows += _bit_rows(plan, planned, view, of_item)
    return tuple(rows)


def _metric_rows(
    plan: TablePlan, planned: PlannedRow, view: RecordView | None, claims: tuple[Claim, ...]
) -> list[TidyRow]:
    """A row for each dataset asked for, measured or not, then one for each other dataset that the run has."""
    # A table of facts has them in rows of their own; what its runs evaluated is perplexity.
    metric = "perplexity" if plan.metric in FACTS else plan.metric
    measurements = {} if view is None else view.measurements(metric)
    known = {*plan.datasets, *(claim.dataset for claim in find(claims, metric=metric))}
    rows = []
    for dataset in distinct((*plan.datasets, *measurements)):
        claim = _claim(claims, planned, planned.model, metric, dataset)
        measured = measurements.get(dataset)
        notes = [*_run_notes(planned, view)]
        if view is not None and measured is None:
            others = ", ".join(measurements)
            notes.append(f"not measured on {dataset}" + (f", but on {others}" if others else ""))
        if measured is not None and dataset not in known:
            notes.append(f"{dataset} is not the paper's {' or '.join(plan.datasets)}; the two cannot be compared")
        if claim is not None and measured is not None and measured.is_subset:
            notes.append(f"the paper used every {measured.unit}, this run a part; the difference is indicative only")
        if claim is not None and measured is not None and measured.context not in (None, PAPER_CONTEXT):
            notes.append(
                f"the paper's windows have {PAPER_CONTEXT} tokens, this run's {measured.context}; the difference is not"
                " one of methods"
            )
        rows.append(_row(plan, planned, view, metric, dataset, claim, measured, notes))
    return rows


def _fact_rows(
    plan: TablePlan, planned: PlannedRow, view: RecordView | None, claims: tuple[Claim, ...]
) -> list[TidyRow]:
    """Time, memory, occupancy: the facts of which this table is made."""
    rows = []
    for fact in FACTS.get(plan.metric, ()):
        if fact.metric == "perplexity" or fact.metric in BIT_METRICS:
            continue
        claim = _claim(claims, planned, planned.model, fact.metric, "")
        measured = None if view is None else view.measurements(fact.metric).get("")
        if claim is not None or measured is not None:
            rows.append(_row(plan, planned, view, fact.metric, "", claim, measured, _run_notes(planned, view)))
    return rows


def _further_rows(plan: TablePlan, planned: PlannedRow, view: RecordView | None) -> list[TidyRow]:
    """What was measured beside the table's own metric, for which the paper has no number."""
    return [
        _row(plan, planned, view, metric, dataset, None, measured, _run_notes(planned, view))
        for metric in FURTHER_METRICS
        if view is not None and metric != plan.metric
        for dataset, measured in view.measurements(metric).items()
    ]


def _bit_rows(
    plan: TablePlan, planned: PlannedRow, view: RecordView | None, claims: tuple[Claim, ...]
) -> list[TidyRow]:
    """weight_bits and scale_bits as the paper counts them, where the paper prints them or the run has them."""
    ledger = Ledger() if view is None else view.ledger
    rows = []
    for metric, value in zip(BIT_METRICS, (ledger.nominal_weight_bits, ledger.nominal_scale_bits), strict=True):
        claim = _claim(claims, planned, planned.model, metric, "")
        notes = [*_run_notes(planned, view)]
        if claim is None and planned.family is not None:
            claim = _claim(claims, planned, planned.family, metric, "")
            if claim is not None:
                notes.append(f"the paper prints it for the {planned.family} family")
        if claim is None and value is None:
            continue
        measured = None if value is None else Measurement(metric, "", value, None, None, None, "")
        rows.append(_row(plan, planned, view, metric, "", claim, measured, notes))
    return rows


def _run_notes(planned: PlannedRow, view: RecordView | None) -> tuple[str, ...]:
    """What the plan and the record say about a row; for a row without a record, why it has none."""
    if view is not None:
        return distinct((planned.note, *view.notes))
    if planned.run_key is not None:
        return distinct((planned.note, f"no record of run {planned.run_key}: not finished, or failed"))
    return (planned.note or "not run",)


def _claim(claims: tuple[Claim, ...], planned: PlannedRow, model: str, metric: str, dataset: str) -> Claim | None:
    found = find(
        claims, model=model, method=planned.method, setting=planned.setting, metric=metric, dataset=dataset
    )  # fmt: skip
    return found[0] if found else None


def _row(
    plan: TablePlan,
    planned: PlannedRow,
    view: RecordView | None,
    metric: str,
    dataset: str,
    claim: Claim | None,
    measured: Measurement | None,
    notes: Iterable[str],
) -> TidyRow:
    ledger = Ledger() if view is None else view.ledger
    of_claim = "" if claim is None or not claim.note else f"paper: {claim.note}"
    return TidyRow(
        item=plan.item,
        method=planned.method,
        setting=planned.setting,
        model=planned.model,
        metric=metric,
        dataset=dataset,
        paper=None if claim is None else claim.value,
        measured=None if measured is None else measured.value,
        stderr=None if measured is None else measured.stderr,
        nominal_weight_bits=ledger.nominal_weight_bits,
        nominal_scale_bits=ledger.nominal_scale_bits,
        payload_bits=ledger.payload_bits,
        total_bytes=ledger.total_bytes,
        run_key=planned.run_key or "",
        notes=distinct((*notes, of_claim)),
        protocol="" if measured is None else measured.protocol,
        calibration="" if view is None else view.calibration,
    )
