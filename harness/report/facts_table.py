"""Tables of facts: time, occupancy, memory. One line a method, each fact as the paper prints it and as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.claims import Claim, find
from harness.plan import PlannedRow, TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Footnotes, Table
from harness.report.facts import FACTS, Fact
from harness.report.measured_table import slug
from harness.report.records_view import RecordView, distinct
from harness.report.rows import Records, TidyRow
from harness.spec import UNQUANTIZED

_TITLES = {
    "quantization_minutes": "quantization time",
    "gpu_occupancy_percent": "bits, occupancy and perplexity",
    "gpu_memory_gb": "memory and storage",
    "token_latency_ms": "latency and memory of decoding",
}


def facts_table(
    plan: TablePlan, rows: Sequence[TidyRow], records: Records, claims: Sequence[Claim], model: str
) -> Table:
    """The table of `model`; `rows` are all tidy rows of the plan."""
    facts = FACTS[plan.metric]
    of_item = find(claims, item=plan.item)
    of_paper = {(claim.metric, claim.dataset) for claim in of_item}
    datasets = _datasets(plan, rows, model)
    parts = [(fact, dataset) for fact in facts for dataset in (datasets if fact.metric == "perplexity" else ("",))]
    planned = [row for row in plan.rows if row.model == model]
    views = {row.run_key: RecordView(records[row.run_key]) for row in planned if row.run_key and row.run_key in records}
    # Of a setting that is the paper's hardware our row has none: where it ran stands in the caption.
    with_setting = plan.metric != "quantization_minutes" and any(row.setting for row in planned)
    footnotes = Footnotes()
    body = []
    for row in planned:
        own = {
            (tidy.metric, tidy.dataset): tidy for tidy in rows if _place(tidy) == (row.method, row.setting, row.model)
        }
        cells = [Cell(row.label or row.method), *([Cell(row.setting)] if with_setting else [])]
        for fact, dataset in parts:
            at = (fact.metric, dataset)
            cells += _cells(fact, own.get(at), row, at in of_paper)
        notes = distinct(note for tidy in own.values() for note in tidy.notes) or distinct([row.note])
        body.append((*cells, Cell(marks=footnotes.marks(notes))))
    columns = [Column(("Method",), numeric=False), *([Column(("Setting",), numeric=False)] if with_setting else [])]
    for fact, dataset in parts:
        heads = ("(paper)", "(measured)") if (fact.metric, dataset) in of_paper else ("",)
        named = (*fact.head, dataset) if len(datasets) > 1 else fact.head
        columns += [Column(tuple(part for part in (*named, head) if part)) for head in heads]
    return Table(
        name=f"{plan.name}-{slug(model)}",
        title=f"{model}: {_TITLES[plan.metric]}",
        caption=(*_caption(rows, views, model, any(fact.metric == "perplexity" for fact in facts)), *plan.notes),
        columns=(*columns, Column(("Notes",), numeric=False)),
        rows=tuple(body),
        remarks=(f"Measured: {'; '.join(fact.what for fact in facts if fact.what)}. GB: 1e9 bytes.",),
        footnotes=tuple(footnotes.texts),
        keys=tuple(row.run_key if row.run_key in records else "" for row in planned),  # type: ignore[misc]
    )


def _datasets(plan: TablePlan, rows: Sequence[TidyRow], model: str) -> tuple[str, ...]:
    """The texts for which there is a perplexity of `model`, claimed or measured: a column each."""
    known = distinct(
        row.dataset
        for row in rows
        if (row.model, row.metric) == (model, "perplexity") and (row.paper, row.measured) != (None, None)
    )
    return known or tuple(plan.datasets[:1])


def _place(row: TidyRow) -> tuple[str, str, str]:
    return (row.method, row.setting, row.model)


def _cells(fact: Fact, row: TidyRow | None, planned: PlannedRow, has_paper: bool) -> list[Cell]:
    measured = None if row is None else row.measured
    if planned.method == UNQUANTIZED and fact.metric.startswith("quantization"):
        measured = None
    if measured is None:
        cell = Cell(formatting.ABSENT if planned.run_key else "not run")
    elif row is not None and row.stderr is not None:
        cell = Cell(*formatting.with_error(measured, row.stderr))
    else:
        cell = Cell(fact.text(measured))
    return [Cell(fact.text(None if row is None else row.paper)), cell] if has_paper else [cell]


def _caption(
    rows: Sequence[TidyRow], views: Mapping[str, RecordView], model: str, with_perplexity: bool
) -> tuple[str, ...]:
    own = [row for row in rows if row.model == model]
    hardware = distinct(view.hardware for view in views.values())
    protocols = distinct(row.protocol for row in own)
    calibrations = distinct(row.calibration for row in own)
    caption = [f"Measured on {' / '.join(hardware)}" if hardware else "Nothing measured yet"]
    decoding = distinct(view.decoding for view in views.values())
    if decoding:
        caption.append(f"Decoding: {' / '.join(decoding)}")
    if protocols and with_perplexity:
        caption.append(f"Perplexity: {' / '.join(protocols)}")
    if calibrations:
        caption.append(f"Calibration of methods that need it: {' / '.join(calibrations)}")
    return tuple(caption)
