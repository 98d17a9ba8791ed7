"""The paper's own values, as it prints them: methods down, models across, with its bit counts and its misprints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.claims import BIT_METRICS, Claim, bit_families, family_of, find
from harness.plan import TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Footnotes, Table
from harness.report.facts import FACTS
from harness.report.records_view import distinct


def paper_tables(plan: TablePlan, claims: Iterable[Claim]) -> tuple[Table, ...]:
    """One table for each dataset and model family of the plan's item; none if the paper has no such item."""
    of_item = find(claims, item=plan.item)
    metrics = distinct(claim.metric for claim in of_item)
    if plan.metric in FACTS and len(metrics) > 1:
        return (_by_model(plan, of_item, metrics),)
    families = bit_families(of_item, plan.item)
    tables: list[Table] = []
    for dataset in distinct(claim.dataset for claim in find(of_item, metric=plan.metric)):
        values = find(of_item, metric=plan.metric, dataset=dataset)
        # None gathers the models that are of no family, as all of table 3.
        for family in (*families, None):
            own = tuple(claim for claim in values if family_of(claim.model, families) == family)
            if own:
                bits = tuple(claim for claim in of_item if claim.metric in BIT_METRICS and claim.model == family)
                tables.append(_table(plan, own, bits, family, dataset, number=len(tables) + 1))
    return tuple(tables)


def _table(
    plan: TablePlan, values: Sequence[Claim], bits: Sequence[Claim], family: str | None, dataset: str, number: int
) -> Table:
    models = distinct(claim.model for claim in values)
    footnotes = Footnotes()
    body = []
    for method, setting in dict.fromkeys((claim.method, claim.setting) for claim in (*values, *bits)):
        cells = [Cell(_label(plan, method)), Cell(setting)]
        cells += [_cell(find(values, method=method, setting=setting, model=model), footnotes) for model in models]
        if bits:
            cells += [
                _cell(find(bits, method=method, setting=setting, metric=metric), footnotes, is_bits=True)
                for metric in BIT_METRICS
            ]
        body.append(tuple(cells))
    columns = [Column(("Method",), numeric=False), Column(("Setting",), numeric=False)]
    columns += [Column((model,)) for model in models]
    if bits:
        columns += [Column(("Weight", "bits")), Column(("Scale", "bits"))]
    return Table(
        name=f"{plan.name}-paper-{number}",
        title=f"The paper's own values, {plan.item}: {f'{family}, ' if family else ''}{_about(plan, dataset)}",
        caption=(
            f"As printed in {', '.join(distinct(claim.source for claim in values))}"
            + ("; bits as the paper counts them" if bits else ""),
        ),
        columns=tuple(columns),
        rows=tuple(body),
        remarks=_not_run(plan, models),
        footnotes=tuple(footnotes.texts),
    )


def _by_model(plan: TablePlan, claims: Sequence[Claim], metrics: Sequence[str]) -> Table:
    """Several numbers of each model and method: models and methods down, the numbers across."""
    known = {fact.metric: fact for fact in FACTS[plan.metric]}
    shown = [known[metric] for metric in metrics if metric in known]
    with_setting = any(claim.setting for claim in claims)
    footnotes = Footnotes()
    body = []
    for model, method, setting in dict.fromkeys((claim.model, claim.method, claim.setting) for claim in claims):
        cells = [Cell(model), Cell(_label(plan, method)), *([Cell(setting)] if with_setting else [])]
        for fact in shown:
            found = find(claims, model=model, method=method, setting=setting, metric=fact.metric)
            marks = footnotes.marks([claim.note for claim in found if claim.note])
            cells.append(Cell(fact.text(found[0].value if found else None), marks=marks))
        body.append(tuple(cells))
    names = ("Model", "Method", *(("Setting",) if with_setting else ()))
    return Table(
        name=f"{plan.name}-paper-1",
        title=f"The paper's own values, {plan.item}",
        caption=(f"As printed in {', '.join(distinct(claim.source for claim in claims))}",),
        columns=(*(Column((name,), numeric=False) for name in names), *(Column(fact.head) for fact in shown)),
        rows=tuple(body),
        remarks=_not_run(plan, distinct(claim.model for claim in claims)),
        footnotes=tuple(footnotes.texts),
    )


def _cell(found: Sequence[Claim], footnotes: Footnotes, is_bits: bool = False) -> Cell:
    if not found:
        return Cell(formatting.ABSENT)
    claim = found[0]
    text = formatting.bits(claim.value) if is_bits else formatting.number(claim.value)
    return Cell(text, marks=footnotes.marks([claim.note] if claim.note else []))


def _about(plan: TablePlan, dataset: str) -> str:
    fact = next((fact for fact in FACTS.get(plan.metric, ()) if fact.metric == plan.metric), None)
    what = plan.metric if fact is None else ", ".join(fact.head).lower()
    return f"{what} on {dataset}" if dataset else what


def _label(plan: TablePlan, method: str) -> str:
    return next((row.label for row in plan.rows if row.method == method and row.label), method)


def _not_run(plan: TablePlan, models: Sequence[str]) -> tuple[str, ...]:
    """Why the models of which no row was run were not: one sentence for each reason."""
    has_run = {row.model for row in plan.rows if row.run_key is not None}
    by_reason: dict[str, list[str]] = {}
    for row in plan.rows:
        if row.model in models and row.model not in has_run:
            known = by_reason.setdefault(row.note or "not run", [])
            if row.model not in known:
                known.append(row.model)
    return tuple(f"{', '.join(names)}: {reason}." for reason, names in by_reason.items())
