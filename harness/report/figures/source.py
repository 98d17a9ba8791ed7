"""What a drawing may read: the plan, its records, the tidy rows and the claims; nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.claims import Claim, find
from harness.plan import PlannedRow, TablePlan
from harness.report.records_view import RecordView, distinct
from harness.report.rows import Records, TidyRow, build_rows


@dataclass(frozen=True)
class Source:
    """One plan with all that belongs to it."""

    plan: TablePlan
    records: Records
    claims: Sequence[Claim]

    @cached_property
    def rows(self) -> tuple[TidyRow, ...]:
        return build_rows(self.plan, self.records, self.claims)

    @cached_property
    def of_item(self) -> tuple[Claim, ...]:
        """What the paper prints in the table or figure of this plan."""
        return find(self.claims, item=self.plan.item)

    @property
    def models(self) -> tuple[str, ...]:
        """The models with a finished run, in the plan's order."""
        return distinct(row.model for row in self.plan.rows if row.run_key in self.records)

    def planned(self, model: str) -> tuple[tuple[PlannedRow, Mapping[str, Any]], ...]:
        """The finished rows of a model with their records."""
        return tuple(
            (row, self.records[row.run_key])
            for row in self.plan.rows
            if row.model == model and row.run_key is not None and row.run_key in self.records
        )

    def measured(self, metric: str, model: str | None = None) -> tuple[TidyRow, ...]:
        """The tidy rows with a measured number of `metric`."""
        return tuple(
            row for row in self.rows if row.metric == metric and row.measured is not None and model in (None, row.model)
        )

    def label(self, method: str) -> str:
        """The method as tables call it."""
        return next((row.label for row in self.plan.rows if row.method == method and row.label), method)

    def labels(self, method: str) -> tuple[str, ...]:
        """What tables call the rows of a method; several where it has variants: "sage-x", "sage-x, tuned"."""
        return distinct(row.label for row in self.plan.rows if row.method == method) or (method,)

    def variant(self, row: TidyRow) -> int:
        """The place of `row`'s label among those of its method."""
        same = (one for one in self.plan.rows if (one.method, one.setting) == (row.method, row.setting))
        label = next((one.label for one in same if one.label), "")
        labels = self.labels(row.method)
        return labels.index(label) if label in labels else 0

    def name(self, row: PlannedRow) -> str:
        """Method and setting of a row, "GPTQ 3 bit g128"."""
        return f"{row.label or row.method} {row.setting}".strip()

    def protocol(self, rows: Sequence[TidyRow]) -> tuple[str, ...]:
        """What a caption must say of how `rows` were measured: model, windows, context, dtype, calibration, profile."""
        models, protocols = ", ".join(distinct(row.model for row in rows)), distinct(row.protocol for row in rows)
        what = f"Measured on {models}: {' / '.join(protocols)}" if protocols else f"Model of our values: {models}"
        return (what, *self.making([self.records[key] for key in keys(rows)]))

    def making(self, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """What a caption must say of how the weights of `records` were made: calibration, their source, profile."""
        views = [RecordView(record) for record in records]
        calibrations = distinct(view.calibration for view in views)
        # Said when every run has it, as below the tables.
        shared = [note for note in (views[0].notes if views else ()) if all(note in view.notes for view in views)]
        return (
            *((f"Calibration of methods that need it: {' / '.join(calibrations)}",) if calibrations else ()),
            *(note[0].upper() + note[1:] for note in shared if note.startswith("weights come from")),
            *self.plan.notes,
        )


def keys(rows: Sequence[TidyRow]) -> tuple[str, ...]:
    """The run keys of rows with a measured number, each once."""
    return distinct(row.run_key for row in rows if row.measured is not None)
