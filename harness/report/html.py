"""A report page as one HTML file: no script, no other file, light and dark, readable on a phone."""

from __future__ import annotations

from html import escape

from harness.report.document import Cell, Column, Document, Table

_STYLE = """\
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a6068; --line: #d5d9de; --page: #ffffff; --head: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2a9b2; --line: #3a4048; --page: #15181c; --head: #1f242a; }
}
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--ink); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, li { overflow-wrap: anywhere; }
.caption, .remark, footer, ol { color: var(--soft); font-size: .9rem; }
.caption { margin: .2rem 0; } .remark { margin: .4rem 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
thead th { background: var(--head); vertical-align: bottom; white-space: normal; }
.number { text-align: right; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--page); }
code { font-size: .95em; }"""


def render_html(document: Document) -> str:
    """The page as a self-contained HTML text."""
    command, runs = document.origin
    title = escape(document.title)
    lines = [
        "<!DOCTYPE html>",
        f"<!-- {command}\n{runs} -->",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>\n{_STYLE}\n</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        *(f'<p class="caption">{escape(note)}</p>' for note in document.notes),
    ]
    for table in document.tables:
        lines += table_lines(table)
    shown = escape(command).replace("`sagebench report`", "<code>sagebench report</code>")
    lines += [f"<footer><p>{shown} {escape(runs)}</p></footer>", "</body>", "</html>"]
    return "\n".join(lines) + "\n"


def table_lines(table: Table, heading: str = "h2", linked: bool = False) -> list[str]:
    """One table as a section of a page. linked: the first cell of a row leads to its run, "#run-<key>"."""
    lines = [f'<section id="{escape(table.name)}">', f"<{heading}>{escape(table.title)}</{heading}>"]
    lines += [f'<p class="caption">{escape(text)}</p>' for text in table.caption]
    # Only the table scrolls sideways on a narrow screen; the text around it wraps.
    lines += ['<div class="scroll" tabindex="0">', "<table>", "<thead>", "<tr>"]
    lines += [f'<th scope="col"{_align(column)}>{escape(column.title)}</th>' for column in table.columns]
    lines += ["</tr>", "</thead>", "<tbody>"]
    for number, row in enumerate(table.rows):
        first, *rest = (_cell(cell, table.name) for cell in row)
        key = table.keys[number] if linked and table.keys else ""
        first = f'<a href="#run-{escape(key)}">{first}</a>' if key else first
        cells = [f'<th scope="row">{first}</th>']
        cells += [f"<td{_align(column)}>{text}</td>" for text, column in zip(rest, table.columns[1:], strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines += ["</tbody>", "</table>", "</div>"]
    lines += [f'<p class="remark">{escape(remark)}</p>' for remark in table.remarks]
    if table.footnotes:
        lines.append("<ol>")
        notes = enumerate(table.footnotes, 1)
        lines += [f'<li id="{escape(table.name)}-note-{number}">{escape(text)}</li>' for number, text in notes]
        lines.append("</ol>")
    return [*lines, "</section>"]


def _align(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _cell(cell: Cell, table_name: str) -> str:
    text = escape(cell.text)
    text = f"<strong>{text}</strong>" if cell.bold else text
    tail = f" {escape(cell.tail)}" if cell.tail else ""
    marks = ", ".join(f'<a href="#{escape(table_name)}-note-{mark}">{mark}</a>' for mark in cell.marks)
    if marks and text:
        marks = f"<sup>{marks}</sup>"
    return f"{text}{tail}{marks}"
