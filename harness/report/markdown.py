"""A report page as Markdown: pipe tables, aligned in the source too."""

from __future__ import annotations

import re

from harness.report.document import Cell, Document, Table


def render_markdown(document: Document) -> str:
    """The page as Markdown text."""
    command, runs = document.origin
    parts = [f"<!-- {command}\n{runs} -->", f"# {escape_markdown(document.title)}"]
    parts += [escape_markdown(note) for note in document.notes]
    for table in document.tables:
        parts += _table(table)
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """`text` as it is: no markup, no HTML, no end of a table cell."""
    # An underscore inside a word (n_lut) is no markup and reads better bare.
    return re.sub(r"([\\`*\[\]<>|~#&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _table(table: Table) -> list[str]:
    parts = [f"## {escape_markdown(table.title)}"]
    parts += ["  \n".join(escape_markdown(line) for line in table.caption)] if table.caption else []
    grid = [[escape_markdown(column.title) for column in table.columns]]
    grid += [[_cell(cell) for cell in row] for row in table.rows]
    widths = [max(3, *(len(line[place]) for line in grid)) for place in range(len(table.columns))]
    rule = [
        f"{'-' * (width - 1)}{':' if column.numeric else '-'}"
        for column, width in zip(table.columns, widths, strict=True)
    ]
    lines = []
    for cells in (grid[0], rule, *grid[1:]):
        padded = [
            cell.rjust(width) if column.numeric else cell.ljust(width)
            for cell, column, width in zip(cells, table.columns, widths, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    parts.append("\n".join(lines))
    parts += [escape_markdown(remark) for remark in table.remarks]
    if table.footnotes:
        parts.append("\n".join(f"{number}. {escape_markdown(text)}" for number, text in enumerate(table.footnotes, 1)))
    return parts


def _cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    text = f"**{text}**" if cell.bold else text
    marks = ", ".join(str(mark) for mark in cell.marks)
    if marks and text:
        marks = f" \\[{marks}\\]"
    tail = f" {escape_markdown(cell.tail)}" if cell.tail else ""
    return f"{text}{tail}{marks}"
