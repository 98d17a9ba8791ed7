"""A report page before it has a format: tables of plain text cells, marks and footnotes.

Layout decides what is said, the writers (markdown, latex, html, console) only how it looks. Texts are raw: each
writer escapes for its own format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a tail that is never bold (the error), and the numbers of its footnotes."""

    text: str = ""
    tail: str = ""
    bold: bool = False
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column head, given in the lines that a narrow format may stack; numbers are aligned right."""

    lines: tuple[str, ...]
    numeric: bool = True

    @property
    def title(self) -> str:
        """The head on one line."""
        return " ".join(self.lines)


@dataclass(frozen=True)
class Table:
    """One table with what stands above (title, caption) and below it (remarks, then footnotes 1, 2, ...)."""

    name: str  # unique on its page: letters, digits and "-"
    title: str
    caption: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    remarks: tuple[str, ...] = ()  # about the whole table, without a mark
    footnotes: tuple[str, ...] = ()  # number n is footnotes[n - 1]
    keys: tuple[str, ...] = ()  # the run behind each row, "" for none; () where rows are no runs


@dataclass(frozen=True)
class Document:
    """The tables of one page, and how to make it again."""

    name: str  # file stem
    title: str
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    run_keys: tuple[str, ...]

    @property
    def origin(self) -> tuple[str, str]:
        """How this page was made, for the head of each file: the command, and the runs it reads."""
        return (
            "Generated from run records; `sagebench report` makes it again.",
            f"Runs: {', '.join(self.run_keys)}" if self.run_keys else "Runs: none",
        )


@dataclass
class Footnotes:
    """Footnotes of one table: equal texts get one number, in order of first use."""

    texts: list[str] = field(default_factory=list)

    def marks(self, notes: Sequence[str]) -> tuple[int, ...]:
        """The numbers of these notes, new ones added."""
        for note in notes:
            if note not in self.texts:
                self.texts.append(note)
        return tuple(sorted({self.texts.index(note) + 1 for note in notes}))
