"""A report page as LaTeX: one table* float for each table, for a document that loads booktabs and siunitx.

Numbers stand in siunitx's S columns, aligned on the decimal marker and formatted as the document asks for; an error has
a column of its own beside its value.
"""

from __future__ import annotations

import re
import textwrap
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
# Points that a page of one column has, the narrowest that tables must fit; sizes of type with the width of a letter.
_PAGE = 395.0
_SIZES = ((r"\small", 5.1, 4.0), (r"\footnotesize", 4.6, 3.0), (r"\scriptsize", 4.1, 2.0))
_SHRINK = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
_WRAP = 18  # letters of a cell of text before it takes another line
_DECIMAL = re.compile(r"([+-]?)(\d+)(?:\.(\d+))?")


def render_latex(document: Document) -> str:
    """The page as LaTeX text: tables only, to be read with \\input."""
    head = [f"% {' '.join(line.split())}" for line in (*document.origin, document.title, *document.notes)]
    tables = [_table(table) for table in document.tables]
    shrinking = r", \usepackage{graphicx}" if any(r"\resizebox" in table for table in tables) else ""
    head.append(rf"% Needs \usepackage{{booktabs}}{shrinking} and \usepackage{{siunitx}}, version 3.")
    return "\n".join(head) + "\n\n" + "\n".join(tables)


def escape_latex(text: str) -> str:
    """`text` as it is, with every character that TeX reads as a command made visible."""
    parts = re.split("(?<=-)(?=-)", " ".join(text.split()))
    # TeX would draw the two hyphens of "--option" as one dash: an empty group keeps them apart.
    return "{}".join("".join(_SPECIAL.get(character, character) for character in part) for part in parts)


@dataclass(frozen=True)
class _Form:
    """How a column is set. format: siunitx's table-format, or "" for text. error: its values have errors beside them.
    marks: its values have footnotes. letters: about how wide it is."""

    column: Column
    format: str
    error: bool
    marks: bool
    letters: float

    @property
    def spec(self) -> str:
        if not self.format:
            return "r" if self.column.numeric else "l"
        after = r",table-space-text-post={\textsuperscript{0}}" if self.marks else ""
        return rf"S[table-format={self.format}{after}]" + (r"@{\,}l" if self.error else "")

    @property
    def head(self) -> str:
        text = _stacked([escape_latex(line) for line in _head_lines(self.column)], "r" if self.column.numeric else "l")
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
        text = "--" if cell.text == "-" else _exponent(cell.text) or _wrapped(cell.text)
        text = rf"\textbf{{{text}}}" if cell.bold else text
        text = f"{text} {tail}" if tail else text
        if self.format:
            return f"{{{text}{raised}}}" + (" & " if self.error else "")
        return f"{text}{raised}"


def _table(table: Table) -> str:
    sentences = [_sentence(text) for text in (table.title, *table.caption)]
    shown = _shown(table)
    forms = [_form(table.columns[place], [row[place] for row in table.rows]) for place in shown]
    size, gap, fits = _size(forms)
    # The widest tables shrink on a page of one column and stand as they are on a wider one.
    before, after = ((), ()) if fits else ((r"\sbox0{%",), (_SHRINK,))
    lines = [
        # Both columns of the page: ten columns of numbers do not fit into one.
        r"\begin{table*}[t]",
        rf"\centering{size}",
        rf"\setlength{{\tabcolsep}}{{{gap:g}pt}}",
        r"\setlength{\belowcaptionskip}{4pt}",
        r"\sisetup{detect-weight=true,retain-explicit-plus=true}",
        rf"\caption{{{' '.join(sentences)}}}",
        rf"\label{{tab:{table.name}}}",
        *before,
        rf"\begin{{tabular}}{{@{{}}{''.join(form.spec for form in forms)}@{{}}}}",
        r"\toprule",
        _row(form.head for form in forms),
        r"\midrule",
        *(_row(form.cell(row[place]) for place, form in zip(shown, forms, strict=True)) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}" if fits else r"\end{tabular}}%",
        *after,
        *_below(table),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _shown(table: Table) -> list[int]:
    """The columns with something in them: print has no room for a paper's values of a model that it has not."""
    return [
        place
        for place in range(len(table.columns))
        if not table.rows or any(row[place].text.strip("-") or row[place].marks for row in table.rows)
    ]


def _form(column: Column, cells: Sequence[Cell]) -> _Form:
    """A column of plain decimals is aligned on them; one with an exponent or without any number is set as text."""
    found = [_DECIMAL.fullmatch(cell.text) for cell in cells]
    numbers = [match for match in found if match]
    exponent = any(_exponent(cell.text) for cell in cells)
    marks = any(cell.marks for cell in cells)
    head = max(len(line) for line in _head_lines(column))
    widest = max((_letters(cell) for cell in cells), default=0.0)
    if not column.numeric or not numbers or exponent:
        return _Form(column, "", False, marks, max(head, widest))
    sign = "+" if any(match[1] for match in numbers) else ""
    digits = max(len(match[2]) for match in numbers)
    decimals = max(len(match[3] or "") for match in numbers)
    tails = max(len(cell.tail) for cell in cells)
    letters = len(sign) + digits + decimals + (0.5 if decimals else 0.0) + tails + (0.7 if marks else 0.0)
    shape = f"{sign}{digits}.{decimals}" if decimals else f"{sign}{digits}"
    return _Form(column, shape, bool(tails), marks, max(head, letters))


def _size(forms: Sequence[_Form]) -> tuple[str, float, bool]:
    """The largest type, with its gap between columns in points, in which the table fits the narrowest page; False
    with the smallest if it fits in none."""
    letters = sum(form.letters for form in forms)
    for size, letter, gap in _SIZES:
        if letters * letter + 2 * gap * (len(forms) - 1) <= _PAGE:
            return size, gap, True
    return _SIZES[-1][0], _SIZES[-1][2], False


def _letters(cell: Cell) -> float:
    if not cell.text:
        return 1.5 * len(cell.marks)
    longest = max(len(line) for line in textwrap.wrap(cell.text, _WRAP))
    return longest + len(cell.tail) + 0.7 * bool(cell.marks)


def _head_lines(column: Column) -> tuple[str, ...]:
    """The lines of a head; a long name of a model is broken at its size, "LLaMA-2-" over "70B"."""
    if len(column.lines) == 1 and len(column.title) > 7 and "-" in column.title:
        first, _, last = column.title.rpartition("-")
        return (f"{first}-", last)
    return column.lines


def _wrapped(text: str) -> str:
    first, *rest = textwrap.wrap(text, _WRAP) or [""]
    if not rest:
        return escape_latex(first)
    lines = r" \\ ".join([escape_latex(first), *(rf"\enspace {escape_latex(line)}" for line in rest)])
    return rf"\begin{{tabular}}[t]{{@{{}}l@{{}}}}{lines}\end{{tabular}}"  # its first line stands on the row


def _stacked(lines: Sequence[str], side: str) -> str:
    if len(lines) < 2:
        return "".join(lines)
    stacked = r" \\ ".join(lines)
    return rf"\shortstack[{side}]{{{stacked}}}"


def _exponent(text: str) -> str:
    """ "1.23e5" for siunitx to typeset; "" for anything else."""
    return rf"\num{{{text}}}" if re.fullmatch(r"[+-]?\d+(\.\d+)?e[+-]?\d+", text) else ""


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
