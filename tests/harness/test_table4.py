"""Table 4 from its command, on a tiny model."""

import csv

import documents
import pytest

from harness.cli import reproduce


@pytest.fixture
def command(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path / "data", "piqa", "winogrande", "arc_easy")))
    return [
        "--table",
        "4",
        "--model",
        str(tiny_folder),
        "--methods",
        "fp16",
        "sage-ptq",
        "--out",
        str(tmp_path / "out"),
    ]


def test_the_table_is_made_from_one_command_and_not_twice(command, tmp_path, capsys):
    assert reproduce(command) == 0
    first = (tmp_path / "out" / "tables" / "table4.csv").read_text()
    rows = [row for row in csv.DictReader(first.splitlines()) if row["measured"] and row["metric"].startswith("acc")]
    assert {(row["method"], row["dataset"], row["metric"]) for row in rows} == {
        (method, task, metric)
        for method in ("fp16", "sage-ptq")
        for task, metrics in (("piqa", 2), ("winogrande", 1), ("arc_easy", 2))
        for metric in ("accuracy", "accuracy_norm")[:metrics]
    }
    page = (tmp_path / "out" / "tables" / "table4.md").read_text()
    assert "Not measured, no data here: boolq, openbookqa, arc_challenge, hellaswag." in page
    capsys.readouterr()
    assert reproduce(command) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert (tmp_path / "out" / "tables" / "table4.csv").read_text() == first


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--limit", "-1"], "--limit -1: must be 1 or more, or 0 for all examples"),
        (["--tasks", "piqqa"], "unknown zero-shot task 'piqqa'; did you mean 'piqa'?"),
        (["--windows", "2"], "--corpus, --windows and --divergence are for tables of perplexity"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, more, problem, capsys):
    assert reproduce([*command, *more]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
