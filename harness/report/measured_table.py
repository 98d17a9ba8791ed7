"""The table of one measured model: paper, measured, difference, and the bits and bytes behind them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from harness.plan import TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Footnotes, Table
from harness.report.records_view import distinct
from harness.report.rows import TidyRow
from harness.spec import UNQUANTIZED


@dataclass(frozen=True)
class _Line:
    """A line of the table: one (method, setting), with its tidy rows by dataset."""

    label: str
    rows: dict[str, TidyRow]

    @property
    def any_row(self) -> TidyRow:
        return next(iter(self.rows.values()))

    @property
    def measured(self) -> bool:
        return any(row.measured is not None for row in self.rows.values())

    def fact(self, name: str, dataset: str) -> str:
        """The row's "protocol" or "calibration" as a note; "" if it has none."""
        text = getattr(self.rows[dataset], name) if dataset in self.rows else ""
        return f"calibration {text}" if text and name == "calibration" else text


def measured_table(plan: TablePlan, rows: Sequence[TidyRow], model: str) -> Table:
    """The table of `model`; `rows` are all tidy rows of the plan."""
    lines = _lines(plan, rows, model)
    datasets = _datasets(plan, lines)
    # Text that stands in for a corpus has no number in any paper: no columns for what cannot be there.
    with_paper = tuple(name for name in datasets if name in plan.datasets or _has_paper(lines, name)) or datasets
    shared = _shared_notes(lines)
    # Rows that were not measured alike say so one by one; else the caption says it for all.
    uneven = [
        fact
        for fact in ("protocol", "calibration")
        if any(len(distinct(line.fact(fact, dataset) for line in lines)) > 1 for dataset in datasets)
    ]
    best = {dataset: _best(lines, dataset) for dataset in datasets}
    footnotes = Footnotes()
    body = []
    for line in lines:
        notes = [note for row in line.rows.values() for note in row.notes]
        if line.measured:
            notes = [note for note in notes if note not in shared]
        notes += [line.fact(fact, dataset) for fact in uneven for dataset in datasets]
        body.append(_cells(line, datasets, with_paper, best, footnotes.marks(distinct(notes))))
    return Table(
        name=f"{plan.name}-{slug(model)}",
        title=f"{model}: {plan.metric}",
        caption=(*_caption(lines, datasets), *plan.notes),
        columns=_columns(plan, datasets, with_paper),
        rows=tuple(body),
        remarks=_remarks(lines, datasets, shared),
        footnotes=tuple(footnotes.texts),
        keys=tuple(line.any_row.run_key if line.measured else "" for line in lines),
    )


def _lines(plan: TablePlan, rows: Sequence[TidyRow], model: str) -> list[_Line]:
    lines = []
    for planned in plan.rows:
        if planned.model != model:
            continue
        place = (planned.method, planned.setting, model)
        own = [row for row in rows if (row.method, row.setting, row.model) == place and row.metric == plan.metric]
        lines.append(_Line(planned.label or planned.method, {row.dataset: row for row in own}))
    return lines


def _datasets(plan: TablePlan, lines: Sequence[_Line]) -> tuple[str, ...]:
    """The datasets to show: those with a number in any row, or those asked for if there is no number yet."""
    with_number = {
        dataset
        for line in lines
        for dataset, row in line.rows.items()
        if row.paper is not None or row.measured is not None
    }
    every = distinct(dataset for line in lines for dataset in line.rows)
    return tuple(dataset for dataset in every if dataset in with_number) or plan.datasets


def _has_paper(lines: Sequence[_Line], dataset: str) -> bool:
    return any(line.rows[dataset].paper is not None for line in lines if dataset in line.rows)


def _shared_notes(lines: Sequence[_Line]) -> tuple[str, ...]:
    """Notes that every measured line has, if there are two or more: said once for the table, not line by line."""
    measured = [line for line in lines if line.measured]
    if len(measured) < 2:
        return ()
    of_line = [distinct(note for row in line.rows.values() for note in row.notes) for line in measured]
    return tuple(note for note in of_line[0] if all(note in notes for notes in of_line))


def _best(lines: Sequence[_Line], dataset: str) -> float | None:
    """The best measured value of a quantized row; the unquantized model would win every time."""
    values = [
        row.measured
        for row in (line.rows.get(dataset) for line in lines)
        if row is not None and row.method != UNQUANTIZED and row.measured is not None and isfinite(row.measured)
    ]
    return min(values, default=None)


def _columns(plan: TablePlan, datasets: Sequence[str], with_paper: Sequence[str]) -> tuple[Column, ...]:
    columns = [Column(("Method",), numeric=False), Column(("Setting",), numeric=False)]
    for dataset in datasets:
        # A stand-in for the corpus is named in the head even when it is alone.
        of_dataset = () if tuple(datasets) == plan.datasets and len(datasets) == 1 else (f"({dataset})",)
        heads = ("Paper", "Measured", "Difference") if dataset in with_paper else ("Measured",)
        columns += [Column((head, *of_dataset)) for head in heads]
    columns += [
        Column(("Nominal", "weight bits")),
        Column(("Nominal", "scale bits")),
        Column(("Payload", "bits")),
        Column(("Total", "MB")),
        Column(("Notes",), numeric=False),
    ]
    return tuple(columns)


def _cells(
    line: _Line,
    datasets: Sequence[str],
    with_paper: Sequence[str],
    best: dict[str, float | None],
    marks: tuple[int, ...],
) -> tuple[Cell, ...]:
    row = line.any_row
    cells = [Cell(line.label), Cell(row.setting)]
    for dataset in datasets:
        number = line.rows.get(dataset)
        measured = Cell(formatting.ABSENT) if number is None else _measured_cell(number, best[dataset])
        paper = Cell(formatting.number(number.paper if number else None))
        difference = Cell(formatting.signed(number.difference if number else None))
        cells += [paper, measured, difference] if dataset in with_paper else [measured]
    cells += [
        Cell(formatting.bits(row.nominal_weight_bits)),
        Cell(formatting.bits(row.nominal_scale_bits)),
        Cell(formatting.bits(row.payload_bits)),
        Cell(formatting.megabytes(row.total_bytes)),
        Cell(marks=marks),
    ]
    return tuple(cells)


def _measured_cell(row: TidyRow, best: float | None) -> Cell:
    if row.measured is None:
        return Cell(formatting.ABSENT if row.run_key else "not run")
    text, tail = formatting.with_error(row.measured, row.stderr)
    return Cell(text, tail, bold=row.method != UNQUANTIZED and row.measured == best)


def _caption(lines: Sequence[_Line], datasets: Sequence[str]) -> tuple[str, ...]:
    protocols = distinct(row.protocol for line in lines for row in line.rows.values())
    calibrations = distinct(row.calibration for line in lines for row in line.rows.values())
    caption = [f"Measured: {' / '.join(protocols)}" if protocols else f"Nothing measured yet on {', '.join(datasets)}"]
    if calibrations:
        caption.append(f"Calibration of methods that need it: {' / '.join(calibrations)}")
    return tuple(caption)


def _remarks(lines: Sequence[_Line], datasets: Sequence[str], shared: Sequence[str]) -> tuple[str, ...]:
    remarks = [f"All measured rows: {note}." for note in shared]
    measured = [line for line in lines if line.measured]
    if measured and not any(line.any_row.method == UNQUANTIZED for line in measured):
        remarks.append("The table has no measured row of the unquantized model to hold these rows against.")
    if measured:
        remarks.append("Bold: best measured value of a quantized row. ±: standard error over windows. MB: 1e6 bytes.")
    return tuple(remarks)


def slug(text: str) -> str:
    """A text as part of a name: small letters, digits and "-"."""
    return re.sub(r"[^0-9A-Za-z]+", "-", text).strip("-").lower()
