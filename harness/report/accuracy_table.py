"""Zero-shot accuracy of one measured model: an overview like the paper's, then each task held against the paper.

All accuracies are percent, errors percentage points. The paper's number is compared with `acc`; `acc_norm` stands
beside it where the task has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from harness.plan import PlannedRow, TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Footnotes, Table
from harness.report.measured_table import slug
from harness.report.records_view import distinct
from harness.report.rows import TidyRow
from harness.spec import UNQUANTIZED


@dataclass(frozen=True)
class _Line:
    """One (method, setting): its tidy rows by metric and task."""

    planned: PlannedRow
    rows: Mapping[tuple[str, str], TidyRow]

    @property
    def label(self) -> str:
        return self.planned.label or self.planned.method

    def acc(self, task: str) -> TidyRow | None:
        return self.rows.get(("accuracy", task))

    def acc_norm(self, task: str) -> TidyRow | None:
        return self.rows.get(("accuracy_norm", task))

    @property
    def any_row(self) -> TidyRow:
        return next(iter(self.rows.values()))

    def mean(self, tasks: Sequence[str]) -> tuple[float, float] | None:
        """The mean acc over all of `tasks` with its standard error, or None if one is not measured."""
        found = [row for task in tasks if (row := self.acc(task)) is not None and row.measured is not None]
        if not found or len(found) < len(tasks):
            return None
        errors = sqrt(sum((row.stderr or 0.0) ** 2 for row in found))  # tasks are independent samples
        return sum(row.measured or 0.0 for row in found) / len(found), errors / len(found)


def accuracy_tables(plan: TablePlan, rows: Sequence[TidyRow], model: str) -> tuple[Table, Table]:
    """The tables of `model`; `rows` are all tidy rows of the plan."""
    lines = _lines(plan, rows, model)
    tasks = _tasks(plan, lines)
    return _overview(plan, lines, tasks, model), _by_task(plan, lines, tasks, model)


def _lines(plan: TablePlan, rows: Sequence[TidyRow], model: str) -> list[_Line]:
    lines = []
    for planned in plan.rows:
        if planned.model == model:
            place = (planned.method, planned.setting, model)
            own = [row for row in rows if (row.method, row.setting, row.model) == place]
            lines.append(_Line(planned, {(row.metric, row.dataset): row for row in own}))
    return lines


def _tasks(plan: TablePlan, lines: Sequence[_Line]) -> tuple[str, ...]:
    """The tasks with a measured number, in the plan's order; all of them before anything is measured."""
    measured = [
        task
        for task in plan.datasets
        if any((row := line.acc(task)) is not None and row.measured is not None for line in lines)
    ]
    return tuple(measured) or plan.datasets


def _overview(plan: TablePlan, lines: Sequence[_Line], tasks: Sequence[str], model: str) -> Table:
    best = {task: _best(line.acc(task) for line in lines) for task in tasks}
    footnotes = Footnotes()
    body = []
    for line in lines:
        row = line.any_row
        mean = line.mean(tasks)
        average = Cell(formatting.ABSENT) if mean is None else Cell(*formatting.with_error(*mean))
        notes = _notes(line, tasks)
        body.append(
            (
                Cell(line.label),
                Cell(row.setting),
                *(_measured(line.acc(task), best[task]) for task in tasks),
                average,
                Cell(formatting.bits(row.payload_bits)),
                Cell(formatting.megabytes(row.total_bytes)),
                Cell(marks=footnotes.marks(notes)),
            )
        )
    return Table(
        name=f"{plan.name}-{slug(model)}",
        title=f"{model}: accuracy (acc, %)",
        caption=(*_caption(lines, tasks), *plan.notes),
        columns=(
            Column(("Method",), numeric=False),
            Column(("Setting",), numeric=False),
            *(Column((task,)) for task in tasks),
            Column(("Mean",)),
            Column(("Payload", "bits")),
            Column(("Total", "MB")),
            Column(("Notes",), numeric=False),
        ),
        rows=tuple(body),
        remarks=(
            "Bold: best measured value of a quantized row. ±: standard error over examples; two rows share their "
            "examples, so `sagebench compare` says more about their difference. MB: 1e6 bytes.",
        ),
        footnotes=tuple(footnotes.texts),
        keys=tuple(line.any_row.run_key if line.mean(tasks) else "" for line in lines),
    )


def _by_task(plan: TablePlan, lines: Sequence[_Line], tasks: Sequence[str], model: str) -> Table:
    footnotes = Footnotes()
    body = []
    for task in tasks:
        best_norm = _best(line.acc_norm(task) for line in lines)
        best = _best(line.acc(task) for line in lines)
        for line in lines:
            acc = line.acc(task)
            # What the whole run must tell stands in the overview; here only what is the task's own.
            notes = () if acc is None else tuple(note for note in acc.notes if note not in _run_notes(line, tasks))
            body.append(
                (
                    Cell(task),
                    Cell(line.label),
                    Cell(line.any_row.setting),
                    Cell(formatting.number(None if acc is None else acc.paper)),
                    _measured(acc, best),
                    Cell(formatting.signed(None if acc is None else acc.difference)),
                    _measured(line.acc_norm(task), best_norm, absent=formatting.ABSENT),
                    Cell(marks=footnotes.marks(notes)),
                )
            )
    return Table(
        name=f"{plan.name}-{slug(model)}-by-task",
        title=f"{model}: accuracy by task, %",
        caption=("Difference: acc less the paper's value. A task without acc_norm has none in the harness.",),
        columns=(
            Column(("Task",), numeric=False),
            Column(("Method",), numeric=False),
            Column(("Setting",), numeric=False),
            Column(("Paper",)),
            Column(("Measured", "(acc)")),
            Column(("Difference",)),
            Column(("Measured", "(acc_norm)")),
            Column(("Notes",), numeric=False),
        ),
        rows=tuple(body),
        footnotes=tuple(footnotes.texts),
    )


def _measured(row: TidyRow | None, best: float | None, absent: str = "") -> Cell:
    if row is None or row.measured is None:
        return Cell(absent or (formatting.ABSENT if row is not None and row.run_key else "not run"))
    text, tail = formatting.with_error(row.measured, row.stderr)
    return Cell(text, tail, bold=row.method != UNQUANTIZED and row.measured == best)


def _best(rows: object) -> float | None:
    values = [
        row.measured
        for row in rows  # type: ignore[attr-defined]
        if row is not None and row.method != UNQUANTIZED and row.measured is not None
    ]
    return max(values, default=None)


def _notes(line: _Line, tasks: Sequence[str]) -> tuple[str, ...]:
    """The footnotes of a line in the overview: what holds for every task."""
    calibration = line.any_row.calibration
    return distinct((*_run_notes(line, tasks), f"calibration {calibration}" if calibration else ""))


def _run_notes(line: _Line, tasks: Sequence[str]) -> tuple[str, ...]:
    of_task = [row.notes for task in tasks if (row := line.acc(task)) is not None]
    return tuple(note for note in (of_task[0] if of_task else ()) if all(note in notes for notes in of_task))


def _caption(lines: Sequence[_Line], tasks: Sequence[str]) -> tuple[str, ...]:
    protocols = distinct(row.protocol for task in tasks for line in lines if (row := line.acc(task)) is not None)
    if not protocols:
        return (f"Nothing measured yet on {', '.join(tasks)}",)
    # "0-shot, lm_eval 0.4.13, float32, first 200 of 1838 examples of piqa v1.0": said once up to the examples.
    common = protocols[0].rsplit(", ", 1)[0]
    alike = all(protocol.rsplit(", ", 1)[0] == common for protocol in protocols)
    parts = [protocol.rsplit(", ", 1)[1] for protocol in protocols] if alike else list(protocols)
    return (f"Measured: {f'{common}, ' if alike else ''}{' / '.join(parts)}",)
