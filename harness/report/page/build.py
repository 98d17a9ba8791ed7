"""Build report.html: one file, no network, no library; without scripts the tables and figures are still there.

Everything that comes from a record is escaped: texts as HTML, the records themselves as JSON without "<".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from harness.claims import Claim
from harness.plan import TablePlan
from harness.report import formatting
from harness.report.document import Cell, Column, Table
from harness.report.figures.export import Drawn, caption, draw_figures
from harness.report.figures.source import Source
from harness.report.figures.style import page
from harness.report.html import table_lines
from harness.report.layout import build_document
from harness.report.page.drilldown import slim
from harness.report.page.inline_svg import inline_svg
from harness.report.records_view import RecordView, distinct
from harness.report.rows import Records

# Nothing is loaded from anywhere; colour bars are small pictures inside the figures.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render_report(plans: Sequence[TablePlan], records: Records, claims: Sequence[Claim]) -> str:
    """The page over `plans`; `records` are all finished runs by key."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    sections = [_section(plan, records, claims) for plan in plans]
    links = [f'<a href="#{escape(plan.name)}">{escape(_item(plan))}</a>' for plan in plans]
    data = json.dumps({key: slim(record) for key, record in records.items()}, separators=(",", ":"), allow_nan=False)
    lines = [
        "<!DOCTYPE html>",
        "<!-- Generated from run records; `sagebench report` makes it again.",
        f"Runs: {', '.join(records)} -->",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>sagebench report</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        "<header>",
        "<h1>sagebench report</h1>",
        f"<p>{_summary(records)}</p>",
        '<div class="bar"><input type="search" id="filter" '
        'placeholder="Filter rows, e.g. sage-ptq &quot;n_lut 4&quot;" aria-label="Filter rows of all tables">'
        '<output id="matches"></output>'
        '<button type="button" id="theme">Light or dark</button></div>',
        f'<nav><a href="#runs">Runs</a>{"".join(links)}</nav>',
        "</header>",
        "<main>",
        *_runs(records),
        *(line for section in sections for line in section),
        "</main>",
        '<dialog id="run" aria-label="Run"><form method="dialog"><button>Close</button></form><div></div></dialog>',
        f'<script type="application/json" id="records">{_harmless(data)}</script>',
        f"<script>\n{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _harmless(data: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _item(plan: TablePlan) -> str:
    return plan.item[0].upper() + plan.item[1:] if plan.name.startswith(("table", "figure")) else plan.name


def _summary(records: Records) -> str:
    models = distinct(str(record["spec"]["model"]["name"]) for record in records.values())
    methods = distinct(str(record["spec"]["method"]["name"]) for record in records.values())
    count = f"{len(records)} run{'s' if len(records) != 1 else ''}"
    return escape(
        f"{count} of {len(methods)} methods on {', '.join(models) or 'nothing'}. "
        "Click a head to sort, a run to see its record."
    )


def _section(plan: TablePlan, records: Records, claims: Sequence[Claim]) -> list[str]:
    document = build_document(plan, records, claims)
    own = {key: records[key] for key in plan.run_keys if key in records}
    lines = [f'<section id="{escape(plan.name)}">', f"<h2>{escape(_item(plan))}: {escape(document.title)}</h2>"]
    lines += [f'<p class="caption">{escape(note)}</p>' for note in document.notes]
    missing: list[str] = []
    drawn = list(draw_figures(Source(plan, own, claims), page(), ("svg",), missing))
    figures = [line for one in drawn for line in _figure(one)]
    # A figure of the paper is what its section is about; below a table figures are further reading.
    first, second = (figures, []) if plan.name.startswith("figure") else ([], figures)
    lines += first
    for table in document.tables:
        lines += table_lines(table, heading="h3", linked=True)
    lines += [*second, *(f'<p class="caption">{escape(text)}</p>' for text in missing), "</section>"]
    return lines


def _figure(drawn: Drawn) -> list[str]:
    text = caption(drawn)
    runs = ", ".join(f'<a href="#run-{escape(key)}">{escape(key)}</a>' for key in drawn.run_keys)
    return [
        f'<figure id="fig-{escape(drawn.name)}">',
        f'<div class="scroll">{inline_svg(drawn.files["svg"].decode("utf-8"), drawn.name, drawn.caption[0])}</div>',
        f"<figcaption>{escape(text)} Runs: {runs}.</figcaption>",
        "</figure>",
    ]


def _runs(records: Records) -> list[str]:
    """Every finished run in one table."""
    views = {key: RecordView(record) for key, record in records.items()}
    texts = {
        metric: distinct(name for view in views.values() for name in view.measurements(metric))
        for metric in ("perplexity", "divergence")
    }
    columns = [Column((name,), numeric=False) for name in ("Run", "Model", "Method", "Options")]
    columns += [Column((f"Perplexity {name}",)) for name in texts["perplexity"]]
    columns += [Column((f"KL {name}",)) for name in texts["divergence"]]
    columns += [Column((name,)) for name in ("Nominal bits", "Payload bits", "Total MB", "Quantization min")]
    rows = []
    for key, record in records.items():
        view = views[key]
        cells = [Cell(key), *(Cell(text) for text in _described(record))]
        for metric, names in texts.items():
            found = view.measurements(metric)
            for name in names:
                one = found.get(name)
                value = formatting.with_error(one.value, one.stderr) if one else (formatting.ABSENT, "")
                cells.append(Cell(*(value if metric == "perplexity" or one is None else (f"{one.value:.3g}", ""))))
        ledger = view.ledger
        minutes = view.measurements("quantization_minutes").get("")
        cells += [
            Cell(formatting.bits(ledger.nominal_bits)),
            Cell(formatting.bits(ledger.payload_bits)),
            Cell(formatting.megabytes(ledger.total_bytes)),
            Cell(formatting.number(minutes.value if minutes else None)),
        ]
        rows.append(tuple(cells))
    table = Table("all-runs", "Runs", (), tuple(columns), tuple(rows), keys=tuple(records))
    return ['<section id="runs">', *table_lines(table, heading="h2", linked=True), "</section>"]


def _described(record: Mapping[str, Any]) -> tuple[str, str, str]:
    spec = record["spec"]
    options = ", ".join(f"{name}={value}" for name, value in spec["method"].get("options", {}).items())
    model = re.sub(r".*[/\\]", "", str(spec["model"]["name"]))
    return model, str(spec["method"]["name"]), options
