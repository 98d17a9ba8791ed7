import csv
import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from harness.report import formatting
from harness.report.console import show_table
from harness.report.document import Cell, Column, Document, Table
from harness.report.latex import escape_latex, render_latex
from harness.report.layout import build_document
from harness.report.markdown import escape_markdown
from harness.report.tables import write_table

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def written(plan, records, claims, tmp_path):
    """The four files of the synthetic table, by ending."""
    return {path.suffix[1:]: path.read_text(encoding="utf-8") for path in write_table(plan, records, claims, tmp_path)}


def on_console(plan, records, claims, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    show_table(plan, records, claims, console)
    return console.file.getvalue()


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (20.112, "20.11"), (999.99, "999.99"), (999.996, "1000"), (1234.4, "1234"), (99999.4, "99999"),
        (123456.7, "1.23e5"), (float("inf"), "inf"), (None, "-"), (0.0, "0.00"),
    ],
)  # fmt: skip
def test_values_have_two_decimals_none_or_an_exponent(value, text):
    assert formatting.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(5.486, "+5.49"), (-0.32, "-0.32"), (-1234.0, "-1234"), (-0.001, "0.00"), (None, "-")]
)
def test_differences_carry_their_sign(value, text):
    assert formatting.signed(value) == text


def test_an_error_has_the_decimals_of_its_value():
    assert formatting.with_error(20.114, 0.841) == ("20.11", "± 0.84")
    assert formatting.with_error(1234.4, 56.2) == ("1234", "± 56")
    assert formatting.with_error(20.0, None) == ("20.00", "")
    assert formatting.with_error(float("inf"), float("nan")) == ("inf", "")


def test_sizes_are_decimal_megabytes_and_bits_show_a_small_scale():
    assert formatting.megabytes(1_550_000) == "1.6"
    assert formatting.bits(0.004) == "0.004"


# The formats


def test_the_plans_notes_stand_once_on_the_page(written):
    assert written["md"].count("Profile embedded") == 1


def test_every_text_format_says_the_same(plan, records, claims, written):
    document = build_document(plan, records, claims)
    console = " ".join(on_console(plan, records, claims, 300).split())
    for table in document.tables:
        for text in (table.title, *table.caption, *table.remarks, *table.footnotes):
            assert escape_markdown(text) in written["md"]
            assert escape_latex(text) in written["tex"]
            assert text.replace("'", "&#x27;") in written["html"]
            assert text in console


def test_each_file_but_the_csv_names_the_command_and_the_runs(written, plan, records, claims):
    for text in (written["md"], written["tex"], written["html"], on_console(plan, records, claims, 140)):
        assert "`sagebench report`" in text
        assert "Runs: k-fp16, k-gptq, k-sage" in text
    assert len(list(csv.DictReader(io.StringIO(written["csv"])))) == 18


def test_two_writes_are_byte_equal(plan, records, claims, tmp_path):
    first = write_table(plan, records, claims, tmp_path / "a")
    second = write_table(plan, dict(reversed(records.items())), claims, tmp_path / "b")
    assert [path.name for path in first] == ["table1.md", "table1.csv", "table1.tex", "table1.html"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b % c & d # e", r"a\_b \% c \& d \# e"),
        ("$x^2$ {y} ~z", r"\$x\textasciicircum{}2\$ \{y\} \textasciitilde{}z"),
        ("C:\\dir <b>", r"C:\textbackslash{}dir \textless{}b\textgreater{}"),
        ("use --option", r"use -{}-option"),
        ("[1] * x", "{[}1{]} {*} x".replace("{]}", "]")),
    ],
)
def test_latex_escapes_what_tex_would_read_as_a_command(text, escaped):
    assert escape_latex(text) == escaped


def test_latex_tables_balance_and_every_row_has_every_column(plan, records, claims, tmp_path, planned):
    nasty = dataclasses.replace(plan, title="50% & more\n\\end", rows=(*plan.rows, planned("m_1", "#1 & {2} %", None)))
    text = write_table(nasty, records, claims, tmp_path)[2].read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    plain = re.sub(r"\\[{}&%#_$]", "", body)
    assert plain.count("{") == plain.count("}")
    assert "%" not in plain
    assert "#" not in plain
    assert plain.count(r"\begin{table*}") == plain.count(r"\end{table*}") == 2
    found = re.findall(r"\\begin\{tabular\}\{@\{\}(.*?)@\{\}\}\n(.*?)\\end\{tabular\}", plain, re.DOTALL)
    assert len(found) == 2
    for spec, tabular in found:
        columns = len(re.findall(r"[lrS]", re.sub(r"\[[^]]*\]|@\{[^}]*\}", "", spec)))
        rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert rows
        # A value with its error takes two columns, and the head one cell for both.
        assert {line.count("&") + line.count(r"\multicolumn{2}") for line in rows} == {columns - 1}
    assert set(re.findall(r"\\([a-zA-Z]+)", plain)) <= {
        "begin", "end", "centering", "small", "setlength", "tabcolsep", "caption", "label", "toprule", "midrule",
        "bottomrule", "shortstack", "textbf", "textsuperscript", "pm", "smallskip", "linewidth", "footnotesize", "par",
        "sisetup", "multicolumn", "bfseries", "scriptsize",
        "belowcaptionskip", "enspace",
    }  # fmt: skip


def test_a_latex_table_that_no_type_makes_fit_shrinks_to_the_page_and_says_what_that_needs():
    def text(columns):
        heads, cells = (Column((f"task{n}",)) for n in range(columns)), (Cell("64.00", " ± 3.40"),) * columns
        return render_latex(Document("page", "Page", (), (Table("wide", "Wide", (), tuple(heads), (cells,)),), ()))

    narrow, wide = text(6), text(12)
    assert "resizebox" not in narrow and "graphicx" not in narrow
    assert r"\usepackage{graphicx}" in wide
    box, _, rest = wide.partition(r"\sbox0{%")[2].partition("\n\\end{tabular}}%\n")
    assert box.startswith("\n\\begin{tabular}")
    assert rest.startswith(r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi")


def test_latex_numbers_are_aligned_on_their_decimal_marker_by_siunitx(plan, records, claims, tmp_path):
    text = write_table(plan, records, claims, tmp_path)[2].read_text(encoding="utf-8")
    measured, paper = re.findall(r"\\begin\{tabular\}\{(.*)\}", text)
    assert r"S[table-format=2.2]@{\,}l" in measured  # perplexity and its error
    assert "S[table-format=2.3]" in measured  # bits
    assert "S[table-format=3.2]" in paper
    assert r"\bfseries 30.00 & $\pm$ 1.50" in text


def test_latex_leaves_exponents_to_siunitx(plan, records, claims, tmp_path, make_record):
    records["k-gptq"] = make_record("k-gptq", "gptq", 123456.0)
    text = write_table(plan, records, claims, tmp_path)[2].read_text(encoding="utf-8")
    assert r"\num{1.23e5} $\pm$ 6173" in text or r"\num{1.23e5} $\pm$ 6.17e3" in text


def test_html_shows_a_script_in_a_note_and_does_not_run_it(plan, records, claims, tmp_path, planned):
    nasty = planned("awq", '"x" & y', None, note="<script>alert(1)</script>")
    paths = write_table(dataclasses.replace(plan, rows=(*plan.rows, nasty)), records, claims, tmp_path)
    html = paths[3].read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&quot;x&quot; &amp; y" in html
    assert r"\<script\>" in paths[0].read_text(encoding="utf-8")


def test_html_needs_no_other_file_and_follows_the_readers_colours(written):
    assert not re.search(r"\b(src|href)=\"(?!#)", written["html"])
    assert "prefers-color-scheme: dark" in written["html"]
    assert 'name="viewport"' in written["html"]
    targets = set(re.findall(r'href="#([^"]+)"', written["html"]))
    assert targets
    assert targets <= set(re.findall(r'id="([^"]+)"', written["html"]))


def test_markdown_rows_keep_their_cells_apart(plan, records, claims, tmp_path, planned):
    nasty = planned("a|b", "*x* `y`", None, note="see [1]")
    text = write_table(dataclasses.replace(plan, rows=(nasty,)), records, claims, tmp_path)[0].read_text("utf-8")
    assert r"| A\|B   | \*x\* \`y\` |" in text
    assert r"1. see \[1\]" in text


def test_a_narrow_terminal_gets_the_table_in_pieces_with_no_cell_broken(plan, records, claims):
    text = on_console(plan, records, claims, 80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "30.00 ± 1.50" in text
    assert len(re.findall(r"^ *SAGE-PTQ +n_lut 4", text, re.MULTILINE)) == 4  # two tables of two pieces, n_lut 4 each


def test_brackets_in_a_note_are_printed_and_not_read_as_markup(plan, claims, planned):
    nasty = planned("awq", "3 bit", None, note="[red]kept[/red]")
    assert "[red]kept[/red]" in on_console(dataclasses.replace(plan, rows=(nasty,)), {}, claims, 140)


def test_rendering_imports_neither_torch_nor_transformers(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    program = (
        "import sys; from pathlib import Path;"
        "from harness.claims import load_claims; from harness.plan import TablePlan;"
        "from harness.report.tables import write_table; from harness.report.console import show_table;"
        "folder = Path(sys.argv[1]); plan = TablePlan.load(folder / 'plan.json');"
        "write_table(plan, {}, load_claims(), folder); show_table(plan, {}, load_claims());"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'lm_eval'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table1.html").exists()
