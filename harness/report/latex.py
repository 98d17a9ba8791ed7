"""A report page as LaTeX: one table* float for each table, for a document that loads booktabs and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable

from harness.report.document import Cell, Column, Document, Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "−": r"$-$", "–": "--", "—": "---",
    # At the start of a row these two would be read as an argument of the \\ that ends the row above.
    "[": "{[}", "*": "{*}",
}  # fmt: skip


def render_latex(document: Document) -> str:
    """The page as LaTeX text: tables only, to be read with \\input."""
    head = [f"% {' '.join(line.split())}" for line in (*document.origin, document.title, *document.notes)]
    head.append(r"% Needs \usepackage{booktabs}.")
    return "\n".join(head) + "\n\n" + "\n".join(_table(table) for table in document.tables)


def escape_latex(text: str) -> str:
    """`text` as it is, with every character that TeX reads as a command made visible."""
    parts = re.split("(?<=-)(?=-)", " ".join(text.split()))
    # TeX would draw the two hyphens of "--option" as one dash: an empty group keeps them apart.
    return "{}".join("".join(_SPECIAL.get(character, character) for character in part) for part in parts)


def _table(table: Table) -> str:
    sentences = [_sentence(text) for text in (table.title, *table.caption)]
    columns = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [
        # Both columns of the page: ten columns of numbers do not fit into one.
        r"\begin{table*}[t]",
        r"\centering\small",
        r"\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{' '.join(sentences)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"\toprule",
        _row(_head(column) for column in table.columns),
        r"\midrule",
        *(_row(_cell(cell, column) for cell, column in zip(row, table.columns, strict=True)) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *_below(table),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _head(column: Column) -> str:
    stacked = r" \\ ".join(escape_latex(line) for line in column.lines)
    if len(column.lines) == 1:
        return stacked
    return rf"\shortstack[{'r' if column.numeric else 'l'}]{{{stacked}}}"


def _cell(cell: Cell, column: Column) -> str:
    text = cell.text
    if column.numeric and text[:1] in ("+", "-") and text[1:]:
        text = f"${text[0]}${escape_latex(text[1:])}"  # a sign, not a hyphen
    else:
        text = "--" if text == "-" else escape_latex(text)
    text = rf"\textbf{{{text}}}" if cell.bold else text
    marks = ", ".join(str(mark) for mark in cell.marks)
    if marks and text:
        marks = rf"\textsuperscript{{{marks}}}"
    tail = f" {escape_latex(cell.tail)}" if cell.tail else ""
    return f"{text}{tail}{marks}"


def _below(table: Table) -> list[str]:
    """Remarks and footnotes, as wide as the page and in small print."""
    texts = [escape_latex(remark) for remark in table.remarks]
    texts += [rf"\textsuperscript{{{n}}} {escape_latex(text)}" for n, text in enumerate(table.footnotes, 1)]
    if not texts:
        return []
    body = "\\par\n".join(texts)
    return ["", r"\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", body, r"\end{minipage}"]


def _sentence(text: str) -> str:
    text = escape_latex(text)
    return text if text.endswith(".") else f"{text}."
