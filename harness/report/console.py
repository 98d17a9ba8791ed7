"""A report page on the terminal: the same content as the Markdown file, drawn with rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from harness.claims import Claim
from harness.plan import TablePlan
from harness.report.document import Cell, Document, Table
from harness.report.layout import build_document
from harness.report.rows import Records

_NAMING = 2  # the leading columns, method and setting
_LOG_WIDTH = 140  # characters; a log file has no width of its own, and rich would take 80


def show_table(plan: TablePlan, records: Records, claims: Sequence[Claim], console: Console | None = None) -> None:
    """Print the page of a plan to `console`, by default the standard output."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_LOG_WIDTH)
    show_document(build_document(plan, records, claims), console)


def show_document(document: Document, console: Console) -> None:
    """Print a page. Texts are printed as they are: brackets in a note are not taken for markup."""
    console.print(Text(document.title, style="bold underline"))
    for note in document.notes:
        console.print(Text(note))
    for table in document.tables:
        console.print(_table(table, console))
    for line in document.origin:
        console.print(Text(line, style="dim"))


def _table(table: Table, console: Console) -> Group:
    below = [*table.remarks, *(f"{number}. {text}" for number, text in enumerate(table.footnotes, 1))]
    return Group(
        Text(),
        Text(table.title, style="bold"),
        *(Text(text, style="dim") for text in table.caption),
        *_grids(table, console),
        *(Text(text) for text in below),
        Text(),
    )


def _grids(table: Table, console: Console) -> list[RichTable]:
    """The table in as many pieces as the terminal's width asks for; each begins with the columns that name its rows."""
    unbounded = console.options.update(width=10_000)  # else rich answers what fits, not what is needed
    names = [place for place, column in enumerate(table.columns[:_NAMING]) if not column.numeric]
    grids: list[RichTable] = []
    shown: list[int] = []
    for place in range(len(names), len(table.columns)):
        grid = _grid(table, [*names, *shown, place])
        if shown and Measurement.get(console, unbounded, grid).maximum > console.width:
            grids.append(_grid(table, [*names, *shown]))
            shown = []
        shown.append(place)
    return [*grids, _grid(table, [*names, *shown])]


def _grid(table: Table, places: Sequence[int]) -> RichTable:
    grid = RichTable(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (table.columns[place] for place in places):
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        grid.add_column(Text("\n".join(column.lines)), justify=justify, overflow="fold", vertical="bottom")
    for row in table.rows:
        grid.add_row(*(_cell(row[place]) for place in places))
    return grid


def _cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.bold else "")
    text.append(f" {cell.tail}" if cell.tail else "", style="not bold")
    marks = ", ".join(str(mark) for mark in cell.marks)
    return text.append(f" [{marks}]" if marks and cell.text else marks, style="not bold")
