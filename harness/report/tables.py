"""Write a table in every file format. The same plan, records and claims give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.claims import Claim
from harness.plan import TablePlan
from harness.report.html import render_html
from harness.report.latex import render_latex
from harness.report.layout import build_document
from harness.report.markdown import render_markdown
from harness.report.rows import Records, build_rows
from harness.report.tidy_csv import render_csv
from kernels.atomic import write_text


def write_table(plan: TablePlan, records: Records, claims: Sequence[Claim], folder: Path) -> list[Path]:
    """Write `<name>.md`, `.csv`, `.tex` and `.html` into `folder` and return their paths in that order.

    `records` are run records by run key; a planned run without a record gets a row that says so. Each file is
    replaced whole or left as it was.
    """
    document = build_document(plan, records, claims)
    # Everything is rendered before the first file is replaced: an error leaves the old set of files together.
    texts = {
        "md": render_markdown(document),
        "csv": render_csv(build_rows(plan, records, claims)),
        "tex": render_latex(document),
        "html": render_html(document),
    }
    paths = []
    for ending, text in texts.items():
        path = Path(folder) / f"{plan.name}.{ending}"
        write_text(path, text)
        paths.append(path)
    return paths
