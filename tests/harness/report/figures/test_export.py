"""Files of figures: the same bytes each time, fonts inside, sizes of the venue, nothing heavy imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from PIL import Image

from harness.cli import export_figures
from harness.records import RecordStore
from harness.report.figures.export import draw_figures, write_figure
from harness.report.figures.style import VENUES, page
from harness.report.saved import plan_path

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def results(tmp_path):
    """A results folder with figure 3 of the toy model."""
    source = toy.source("figure3")
    store = RecordStore(tmp_path / "runs")
    for key, record in source.records.items():
        store.save(key, {name: part for name, part in record.items() if name not in ("format", "key", "created")})
    source.plan.save(plan_path(tmp_path, "figure3"))
    return tmp_path


def drawn(name="figure3", style="neurips", width="page", formats=("pdf", "svg", "png")):
    return next(iter(draw_figures(toy.source(name), page(style, width), formats, [])))


def test_the_same_records_give_the_same_bytes():
    assert drawn().files == drawn().files


def test_no_file_holds_a_date():
    files = drawn().files
    assert b"CreationDate" not in files["pdf"]
    assert b"dc:date" not in files["svg"]


def test_the_pdf_embeds_its_fonts_as_truetype():
    pdf = drawn(formats=("pdf",)).files["pdf"]
    fonts = len(re.findall(rb"/Type /FontDescriptor", pdf))
    assert fonts
    assert len(re.findall(rb"/FontFile2", pdf)) == fonts
    assert b"/Subtype /Type3" not in pdf


def test_the_svg_has_outlines_instead_of_letters_and_names_its_runs():
    svg = drawn(formats=("svg",)).files["svg"].decode()
    assert "<text" not in svg
    assert "key-00" in svg


@pytest.mark.parametrize("style", VENUES)
@pytest.mark.parametrize("width", ["column", "page"])
def test_a_figure_has_the_width_of_the_venue(style, width, tmp_path):
    (tmp_path / "a.png").write_bytes(drawn(style=style, width=width, formats=("png",)).files["png"])
    inches = VENUES[style].column if width == "column" else VENUES[style].page
    assert Image.open(tmp_path / "a.png").size[0] == pytest.approx(300 * inches, abs=1)


def test_the_latex_float_includes_the_pdf_and_says_everything(tmp_path):
    paths = write_figure(drawn(formats=("pdf",)), tmp_path)
    assert [path.name for path in paths] == ["figure3.pdf", "figure3.tex"]
    text = paths[1].read_text(encoding="utf-8")
    assert r"\includegraphics{figure3}" in text
    assert "% Runs: key-00" in text
    assert "12 of 148 windows" in text


def test_the_script_writes_what_was_asked_for(results, capsys):
    arguments = ["--out", str(results), "--format", "svg,png", "--style", "icml", "--width", "column"]
    assert export_figures(arguments) == 0
    assert sorted(path.name for path in (results / "figures" / "icml-column").iterdir()) == [
        "figure3.png",
        "figure3.svg",
    ]
    assert capsys.readouterr().out.count("written: ") == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--style", "neurip"], "unknown style 'neurip'; did you mean 'neurips'"),
        (["--width", "wide"], "unknown width 'wide'; use column or page"),
        (["--format", "pfd"], "unknown figure format 'pfd'; did you mean 'pdf'"),
        (["--format", ","], "no figure format; use pdf, svg, png"),
        (["--figure", "11"], "figure 11 is unknown; known: 2, 3, 4, 5, 6, 7, 8, 9, 10"),
        (["--table", "2"], "no plan of table2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(results, arguments, problem, capsys):
    assert export_figures(["--out", str(results), *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_a_place_that_cannot_be_is_one_line_and_exit_code_2(results, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert export_figures(["--out", str(results), "--format", "svg", "--to", str(file / "figures")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}")
    assert said.count("\n") == 1


def test_drawing_does_not_import_torch(results):
    program = (
        "import sys; from harness.cli import main, export_figures;"
        "assert export_figures(['--out', sys.argv[1], '--format', 'svg']) == 0;"
        "assert main(['report', '--out', sys.argv[1]]) == 0;"
        "heavy = {'torch', 'transformers', 'pandas', 'lm_eval', 'scipy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(results)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (results / "report.html").is_file()
