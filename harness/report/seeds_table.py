"""Rows that differ in nothing but their seed, as one: mean and spread. A table's other rows are one run each."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.plan import PlannedRow, TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Table
from harness.report.measured_table import slug
from harness.report.records_view import Measurement, RecordView, distinct
from harness.report.rows import Records
from harness.spec import UNQUANTIZED

# What a grid of seeds adds to a row's setting.
_SEED = re.compile(r"\s*\bseed=\d+")


@dataclass(frozen=True)
class _Run:
    row: PlannedRow
    view: RecordView
    measured: Measurement


def seeds_tables(plan: TablePlan, records: Records, model: str) -> tuple[Table, ...]:
    """One table for each dataset on which rows were measured with two seeds or more; none if there is none."""
    runs: dict[str, list[_Run]] = {}
    for row in plan.rows:
        record = records.get(row.run_key or "")
        if row.model == model and record is not None:
            view = RecordView(record)
            for dataset, measured in view.measurements(plan.metric).items():
                runs.setdefault(dataset, []).append(_Run(row, view, measured))
    tables = (_table(plan, model, dataset, found) for dataset, found in runs.items())
    return tuple(table for table in tables if table.rows)


def _table(plan: TablePlan, model: str, dataset: str, runs: list[_Run]) -> Table:
    unquantized = [run.measured for run in runs if run.row.method == UNQUANTIZED]
    # The distance from the unquantized model is that of mean losses, as perplexity is their exponential.
    base = unquantized[0] if unquantized and plan.metric == "perplexity" else None
    groups = [group for group in _groups(runs) if len(group) > 1]
    columns = [
        Column(("Method",), numeric=False),
        Column(("Setting",), numeric=False),
        Column(("Seeds",), numeric=False),
    ]
    columns += [Column(("Mean",))] + [Column(("Gap", "nats"))] * (base is not None) + [Column(("Payload", "bits"))]
    return Table(
        name=f"{plan.name}-{slug(model)}-seeds-{slug(dataset)}",
        title=f"{model}: {plan.metric} on {dataset} over seeds",
        caption=(f"Measured: {' / '.join(distinct(run.measured.protocol for group in groups for run in group))}",),
        columns=tuple(columns),
        rows=tuple(_cells(group, base) for group in groups),
        remarks=(
            "±: standard deviation over seeds, which choose calibration text and random draws; of two, the first is "
            "that of the text."
            + (" Gap: mean loss of a token less the unquantized model's." if base is not None else ""),
        ),
    )


def _groups(runs: Iterable[_Run]) -> list[list[_Run]]:
    """Runs that differ in nothing but their seed, each seed once, by rising seed."""
    found: dict[tuple[str, str], dict[tuple[int, ...], _Run]] = {}
    for run in runs:
        found.setdefault((run.row.method, run.view.but_for_seeds), {}).setdefault(run.view.seeds, run)
    return [[group[seeds] for seeds in sorted(group)] for group in found.values()]


def _cells(group: list[_Run], base: Measurement | None) -> tuple[Cell, ...]:
    first = group[0]
    cells = [
        Cell(first.row.label or first.row.method),
        Cell(" / ".join(distinct(_SEED.sub("", run.row.setting).strip() for run in group))),
        Cell(", ".join("/".join(map(str, run.view.seeds)) for run in group)),
        _mean([run.measured.value for run in group], formatting.with_error),
    ]
    if base is not None:
        values = [base.value, *(run.measured.value for run in group)]
        comparable = all(run.measured.protocol == base.protocol for run in group)
        comparable = comparable and all(value > 0 and math.isfinite(value) for value in values)
        gaps = [math.log(value / base.value) for value in values[1:]] if comparable else []
        cells.append(_mean(gaps, _nats))
    bits = sorted(run.view.ledger.payload_bits or 0.0 for run in group)
    return (*cells, Cell(", ".join(distinct(formatting.bits(value or None) for value in bits))))


def _mean(values: list[float], show: Callable[[float, float], tuple[str, str]]) -> Cell:
    """Mean and sample standard deviation of two values or more; of none, nothing."""
    if not all(map(math.isfinite, values)) or not values:
        return Cell(formatting.ABSENT)
    return Cell(*show(statistics.fmean(values), statistics.stdev(values)))


def _nats(mean: float, spread: float) -> tuple[str, str]:
    return f"{mean:.4f}", f"± {spread:.4f}"
