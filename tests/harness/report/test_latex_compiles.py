"""Every LaTeX table and figure compiles as it is and fits the page. Needs pdflatex with booktabs and siunitx 3.

Without TeX these tests are skipped; `tox -e latex` installs a small TeX Live and sets SAGEBENCH_REQUIRE_LATEX.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import toy

from harness.paper_items import experiments_of_paper
from harness.report.figures.export import draw_figures, write_figure
from harness.report.figures.style import page
from harness.report.tables import write_table

PAPER = sorted(set(experiments_of_paper().values()))
RESULTS = Path(__file__).resolve().parents[3] / "results"
PUBLISHED = sorted(RESULTS.glob("published/*/tables/*.tex"))
PDFLATEX = shutil.which("pdflatex")
pytestmark = pytest.mark.skipif(
    PDFLATEX is None and "SAGEBENCH_REQUIRE_LATEX" not in os.environ, reason="no pdflatex in PATH; see tox -e latex"
)
# Text widths of ICML and ACL pages in inches; a NeurIPS page has one column of 5.5.
WIDTHS = {"two columns": ("twocolumn", 6.75), "one column": ("", 5.5)}


def compile_document(folder, inputs, layout):
    """Compile `inputs` in one article; returns the log."""
    columns, width = WIDTHS[layout]
    body = "\n\\clearpage\n".join(rf"\input{{{path.as_posix()}}}" for path in inputs)
    (folder / "all.tex").write_text(
        rf"""\documentclass[10pt,{columns}]{{article}}
\usepackage[letterpaper,textwidth={width}in,textheight=9in]{{geometry}}
\usepackage{{booktabs,siunitx,graphicx}}
\begin{{document}}
{body}
\end{{document}}
""",
        encoding="utf-8",
    )
    command = [PDFLATEX or "pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300, check=False)
    log = (folder / "all.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-3000:]
    return log


def too_wide(log):
    """Points by which boxes stick out, of those that stick out visibly."""
    return [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide", log) if float(points) > 2]


@pytest.mark.parametrize("layout", WIDTHS)
def test_published_tables_compile_and_fit(tmp_path, layout):
    assert PUBLISHED
    assert too_wide(compile_document(tmp_path, PUBLISHED, layout)) == []


def test_tables_of_every_kind_compile_and_fit(tmp_path):
    inputs = []
    for name in ("front", *PAPER):
        source = toy.source(name)
        inputs.append(write_table(source.plan, source.records, source.claims, tmp_path / name)[2])
    assert too_wide(compile_document(tmp_path, inputs, "two columns")) == []


def test_figures_compile_and_have_the_width_of_the_page(tmp_path):
    inputs = []
    for name in PAPER:
        for drawn in draw_figures(toy.source(name), page("icml", "page"), ("pdf",), []):
            inputs.append(write_figure(drawn, tmp_path)[-1])
    assert too_wide(compile_document(tmp_path, inputs, "two columns")) == []
