"""Tidy rows as csv: the sixteen columns of `rows.COLUMNS`, full precision, an empty cell for what is absent."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from harness.report.rows import COLUMNS, TidyRow


def render_csv(rows: Iterable[TidyRow]) -> str:
    """The rows as csv text with a header line and "\\n" line ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(getattr(row, column)) for column in COLUMNS])
    return text.getvalue()


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return ""
    # 12 digits: all that a measurement can carry, without the tail of binary noise that a difference leaves.
    return f"{value:.12g}" if isinstance(value, float) else str(value)
