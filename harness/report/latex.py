"""A report page as LaTeX: one table* float for each table, for a document that loads booktabs and siunitx.

Numbers stand in siunitx's S columns, aligned on the decimal marker and formatted as the document asks for; an error has
a column of its own beside its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.report.document import Cell, Column, Document, Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "−": r"$-$", "–": "--", "—": "---",
    # At the start of a row these two would be read as an argument of the \\ that ends the row above.
    "[": "{[}", "*": "{*}",
}  # fmt: skip
_DECIMAL = re.compile(r"([+-]?)(\d+)(?:\.(\d+))?")


def render_latex(document: Document) -> str:
    """The page as LaTeX text: tables only, to be read with \\input."""
    head = [f"% {' '.join(line.split())}" for line in (*document.origin, document.title, *document.notes)]
    head.append(r"% Needs \usepackage{booktabs} and \usepackage{siunitx}, version 3.")
    return "\n".join(head) + "\n\n" + "\n".join(_table(table) for table in document.tables)


def escape_latex(text: str) -> str:
    """`text` as it is, with every character that TeX reads as a command made visible."""
    parts = re.split("(?<=-)(?=-)", " ".join(text.split()))
    # TeX would draw the two hyphens of "--option" as one dash: an empty group keeps them apart.
    return "{}".join("".join(_SPECIAL.get(character, character) for character in part) for part in parts)


@dataclass(frozen=True)
class _Form:
    """How a column is set. format: siunitx's table-format, or "" for text. error: its values have errors beside them."""

    column: Column
    format: str
    error: bool

    @property
    def spec(self) -> str:
        if not self.format:
            return "r" if self.column.numeric else "l"
        return rf"S[table-format={self.format}]" + (r"@{\,}l" if self.error else "")

    @property
    def head(self) -> str:
        stacked = r" \\ ".join(escape_latex(line) for line in self.column.lines)
        side = "r" if self.column.numeric else "l"
        text = stacked if len(self.column.lines) == 1 else rf"\shortstack[{side}]{{{stacked}}}"
        if self.error:
            return rf"\multicolumn{{2}}{{r}}{{{text}}}"
        return f"{{{text}}}" if self.format else text

    def cell(self, cell: Cell) -> str:
        marks = ", ".join(str(mark) for mark in cell.marks)
        raised = rf"\textsuperscript{{{marks}}}" if marks and cell.text else marks
        tail = escape_latex(cell.tail)
        if self.format and _DECIMAL.fullmatch(cell.text):
            value = rf"\bfseries {cell.text}" if cell.bold else cell.text
            after = f"{{{raised}}}" if raised else ""
            return f"{value}{after} & {tail}" if self.error else f"{value}{after}"
        text = "--" if cell.text == "-" else _exponent(cell.text) or escape_latex(cell.text)
        text = rf"\textbf{{{text}}}" if cell.bold else text
        text = f"{text} {tail}" if tail else text
        if self.format:
            return f"{{{text}{raised}}}" + (" & " if self.error else "")
        return f"{text}{raised}"


def _table(table: Table) -> str:
    sentences = [_sentence(text) for text in (table.title, *table.caption)]
    forms = [_form(column, [row[place] for row in table.rows]) for place, column in enumerate(table.columns)]
    lines = [
        # Both columns of the page: ten columns of numbers do not fit into one.
        r"\begin{table*}[t]",
        r"\centering\small",
        r"\setlength{\tabcolsep}{4pt}",
        r"\sisetup{detect-weight=true,retain-explicit-plus=true}",
        rf"\caption{{{' '.join(sentences)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{@{{}}{''.join(form.spec for form in forms)}@{{}}}}",
        r"\toprule",
        _row(form.head for form in forms),
        r"\midrule",
        *(_row(form.cell(cell) for cell, form in zip(row, forms, strict=True)) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *_below(table),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _form(column: Column, cells: Sequence[Cell]) -> _Form:
    """A column of plain decimals is aligned on them; one with an exponent or without any number is set as text."""
    found = [_DECIMAL.fullmatch(cell.text) for cell in cells]
    numbers = [match for match in found if match]
    exponent = any(_exponent(cell.text) for cell in cells)
    if not column.numeric or not numbers or exponent:
        return _Form(column, "", False)
    sign = "+" if any(match[1] for match in numbers) else ""
    digits = max(len(match[2]) for match in numbers)
    decimals = max(len(match[3] or "") for match in numbers)
    shape = f"{sign}{digits}.{decimals}" if decimals else f"{sign}{digits}"
    return _Form(column, shape, any(cell.tail for cell in cells))


def _exponent(text: str) -> str:
    """ "1.23e5" for siunitx to typeset; "" for anything else."""
    return rf"\num{{{text}}}" if re.fullmatch(r"[+-]?\d+(\.\d+)?e-?\d+", text) else ""


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


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
