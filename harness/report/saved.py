"""Tables again from what is on disk: the saved plan, the records and the claims. Needs neither torch nor a model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from harness.claims import load_claims
from harness.plan import TablePlan
from harness.records import RecordStore
from harness.report.console import show_table
from harness.report.tables import write_table
from kernels.errors import InputError


def plan_path(out: Path, name: str) -> Path:
    """Where the plan of table `name` is kept."""
    return out / "tables" / f"{name}.plan.json"


def render_saved(out: Path, name: str | None, console: Console | None = None) -> list[Path]:
    """Render table `name`, or every table that was run, from `out`. Raises InputError if there is none."""
    plans = [plan_path(out, name)] if name else sorted((out / "tables").glob("*.plan.json"))
    if not plans or not plans[0].is_file():
        wanted = name or "a table"
        raise InputError(f"no plan of {wanted} below {out / 'tables'}; run reproduce.py first")
    paths = []
    for path in plans:
        paths += render_plan(TablePlan.load(path), out, console)
    return paths


def render_plan(plan: TablePlan, out: Path, console: Console | None = None) -> list[Path]:
    """Write the files of one table, show it, and return the paths."""
    store = RecordStore(out / "runs")
    records = {key: record for key in plan.run_keys if (record := store.load(key)) is not None}
    claims = load_claims()
    paths = write_table(plan, records, claims, out / "tables")
    show_table(plan, records, claims, console)
    for warning in store.warnings:
        (console or Console()).print(f"warning: {warning}", markup=False, style="yellow")
    return paths
