"""Divergence of one model's quantized versions from the unquantized one, with the noise floor of its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.plan import TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Table
from harness.report.measured_table import slug
from harness.report.records_view import distinct
from harness.report.rows import Records
from harness.spec import UNQUANTIZED


def divergence_tables(plan: TablePlan, records: Records, model: str) -> tuple[Table, ...]:
    """One table for each text that divergence was measured on; none if it was not."""
    found: dict[str, list[tuple[Cell, ...]]] = {}
    protocols: dict[str, list[str]] = {}
    for row in plan.rows:
        record = records.get(row.run_key or "")
        if row.model != model or record is None:
            continue
        for entry in record.get("metrics") or []:
            if isinstance(entry, Mapping) and entry.get("metric") == "divergence":
                dataset = str(entry.get("dataset"))
                found.setdefault(dataset, []).append(_cells(row.label or row.method, row.setting, row.method, entry))
                protocols.setdefault(dataset, []).append(_protocol(entry))
    return tuple(
        Table(
            name=f"{plan.name}-{slug(model)}-divergence-{slug(dataset)}",
            title=f"{model}: divergence from the unquantized model on {dataset}",
            caption=(f"Measured: {' / '.join(distinct(protocols[dataset]))}",),
            columns=(
                Column(("Method",), numeric=False),
                Column(("Setting",), numeric=False),
                Column(("KL mean",)),
                Column(("KL median",)),
                Column(("KL p99",)),
                Column(("Same top-1", "%")),
                Column(("RMS target", "%")),
            ),
            rows=tuple(rows),
            remarks=(
                "KL in nats a token, ±: standard error over windows. RMS target: of the difference of the target's "
                "probability. The unquantized row is the noise floor: its 16-bit weights in the dtype of the runs.",
            ),
        )
        for dataset, rows in found.items()
    )


def _cells(label: str, setting: str, method: str, entry: Mapping[str, Any]) -> tuple[Cell, ...]:
    name = f"{label} (noise floor)" if method == UNQUANTIZED else label
    stderr = entry.get("stderr")
    return (
        Cell(name),
        Cell(setting),
        Cell(_small(entry.get("value")), f"± {_small(stderr)}" if stderr is not None else ""),
        Cell(_small(entry.get("kl_median"))),
        Cell(_small(entry.get("kl_p99"))),
        Cell(formatting.number(_percent(entry.get("same_top")))),
        Cell(formatting.number(_percent(entry.get("rms_target")))),
    )


def _small(value: float | None) -> str:
    """Three significant digits: a noise floor of 1e-5 nats must not read 0.00."""
    return formatting.ABSENT if value is None else f"{value:.3g}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _protocol(entry: Mapping[str, Any]) -> str:
    return (
        f"{entry.get('windows')} of {entry.get('windows_available')} windows, context {entry.get('context')}, "
        f"{entry.get('dtype')} against a reference in {entry.get('reference_dtype')}"
    )
