"""Tables and figures again from what is on disk: saved plans, records, claims. Needs neither torch nor a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.claims import load_claims
from harness.plan import TablePlan
from harness.records import RecordStore
from harness.report.console import show_table
from harness.report.tables import write_table
from kernels.atomic import write_text
from kernels.errors import InputError

_FIGURE_FORMATS = ("pdf", "svg")


def plan_path(out: Path, name: str) -> Path:
    """Where the plan of table `name` is kept."""
    return out / "tables" / f"{name}.plan.json"


def render_saved(out: Path, name: str | None, console: Console | None = None) -> list[Path]:
    """Render table or figure `name`, or everything that was run and the page over it, from `out`.

    Raises InputError if there is nothing.
    """
    paths = []
    for plan in saved_plans(out, name):
        paths += render_plan(plan, out, console)
        paths += draw_plan(plan, out, console)
    return paths if name else [*paths, render_page(out)]


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


def draw_plan(plan: TablePlan, out: Path, console: Console | None = None) -> list[Path]:
    """Draw the figures of a plan in the default style into `out`/figures, say which lack data, return the paths."""
    if not plan.figures:
        return []
    paths, missing = _draw(plan, out, _FIGURE_FORMATS, "neurips", "page", out / "figures")
    for line in missing:
        (console or Console()).print(line, markup=False, style="yellow")
    return paths


def export_saved(
    out: Path, name: str | None, formats: Sequence[str], style: str, width: str, folder: Path | None
) -> list[Path]:
    """Draw the figures of plan `name`, or of all, for a venue. Raises InputError if there is none to draw."""
    folder = folder or out / "figures" / f"{style}-{width}"
    paths: list[Path] = []
    missing: list[str] = []
    for plan in saved_plans(out, name):
        written, lacking = _draw(plan, out, formats, style, width, folder)
        paths += written
        missing += lacking
    if not paths:
        raise InputError(missing[0] if missing else f"no figure belongs to {name or 'what was run'} below {out}")
    return paths


def render_page(out: Path) -> Path:
    """Write `out`/report.html: every table, every figure and every run on one page."""
    from harness.report.page.build import render_report

    store = RecordStore(out / "runs")
    write_text(out / "report.html", render_report(saved_plans(out, None), store.load_all(), load_claims()))
    return out / "report.html"


def saved_plans(out: Path, name: str | None) -> list[TablePlan]:
    """The plan called `name`, or all plans below `out`: tables first, then figures, by number."""
    paths = [plan_path(out, name)] if name else sorted((out / "tables").glob("*.plan.json"), key=_order)
    if not paths or not paths[0].is_file():
        wanted = name or "a table"
        raise InputError(f"no plan of {wanted} below {out / 'tables'}; run reproduce.py first")
    return [TablePlan.load(path) for path in paths]


def _order(path: Path) -> tuple[int, int, str]:
    stem = path.name.removesuffix(".plan.json")
    kind = next((place for place, kind in enumerate(("table", "figure")) if stem.startswith(kind)), 2)
    number = stem.removeprefix("table").removeprefix("figure").split("-")[0]
    return (kind, int(number) if number.isdigit() else 0, stem)


def _draw(
    plan: TablePlan, out: Path, formats: Sequence[str], style: str, width: str, folder: Path
) -> tuple[list[Path], list[str]]:
    from harness.report.figures.export import draw_figures, write_figure
    from harness.report.figures.source import Source
    from harness.report.figures.style import page

    store = RecordStore(out / "runs")
    records = {key: record for key in plan.run_keys if (record := store.load(key)) is not None}
    missing: list[str] = []
    paths: list[Path] = []
    for drawn in draw_figures(Source(plan, records, load_claims()), page(style, width), formats, missing):
        paths += write_figure(drawn, folder)
    return paths, missing
