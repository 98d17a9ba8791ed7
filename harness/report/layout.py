"""What a table page says, in any format: first the measured models, then the paper's own values."""

from __future__ import annotations

from collections.abc import Sequence

from harness.claims import Claim, find
from harness.plan import TablePlan
from harness.report.accuracy_table import accuracy_tables
from harness.report.divergence_table import divergence_tables
from harness.report.document import Document, Table
from harness.report.facts import FACTS
from harness.report.facts_table import facts_table
from harness.report.measured_table import measured_table
from harness.report.paper_table import paper_tables
from harness.report.records_view import distinct
from harness.report.rows import Records, build_rows
from harness.report.seeds_table import seeds_tables


def build_document(plan: TablePlan, records: Records, claims: Sequence[Claim]) -> Document:
    """The page of a plan; `records` are run records by run key."""
    rows = build_rows(plan, records, claims)
    models = _models_with_a_table(plan, claims)
    measured: list[Table] = []
    for model in models:
        if plan.metric == "accuracy":
            measured += accuracy_tables(plan, rows, model)
        elif plan.metric in FACTS:
            measured.append(facts_table(plan, rows, records, claims, model))
        else:
            measured.append(measured_table(plan, rows, model))
        if plan.metric not in FACTS:  # times and sizes are no draws
            measured += seeds_tables(plan, records, model)
        measured += divergence_tables(plan, records, model)
    return Document(
        name=plan.name,
        title=plan.title,
        # Measured tables carry the notes in their captions, where a table that is copied out keeps them.
        notes=() if models else plan.notes,
        tables=(*measured, *paper_tables(plan, claims)),
        run_keys=tuple(key for key in plan.run_keys if key in records),
    )


def _models_with_a_table(plan: TablePlan, claims: Sequence[Claim]) -> tuple[str, ...]:
    """Models that were to run, and models outside the paper, which would else be in no table at all.

    Where the claims hold nothing of the item, its models that were not run have nothing to show.
    """
    of_paper = {claim.model for claim in find(claims, item=plan.item)}
    to_run = distinct(row.model for row in plan.rows if row.run_key is not None)
    if not of_paper and to_run:
        return to_run
    return distinct(row.model for row in plan.rows if row.run_key is not None or row.model not in of_paper)
