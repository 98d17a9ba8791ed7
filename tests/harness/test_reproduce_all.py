"""`reproduce.py --all` on a tiny model: one plan over every table and figure, each run made once."""

import json
import re

import pytest

from harness.cli import main, reproduce
from harness.estimate import Estimate
from harness.paper_items import experiments_of_paper


@pytest.fixture
def command(tiny_folder, corpus_file, tmp_path):
    return lambda *more: [
        "--model", str(tiny_folder), "--corpus", str(corpus_file), "--calibration-corpus", str(corpus_file),
        "--context", "32", "--calibration-samples", "8", "--device", "cpu", "--out", str(tmp_path / "out"), *more,
    ]  # fmt: skip


def test_a_dry_run_shows_the_plan_of_every_item_and_what_is_left_out(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert reproduce(command("--all", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "left out: table4: none of its tasks is here" in said
    for name in set(experiments_of_paper().values()) - {"table4"}:
        assert name in said
    keys = re.findall(r"^\W*([0-9a-f]{16})\b", said, re.MULTILINE)
    assert len(keys) == len(set(keys)) > 15
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_making_of_weights_once_however_many_runs_measure_them(command, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "harness.reproduce.estimate",
        lambda spec, quantized: asked.append((spec.quantization_key(), quantized)) or Estimate(60.0, 0),
    )
    assert reproduce(command("--all", "--dry-run")) == 0
    made = [key for key, quantized in asked if not quantized]
    assert len(made) == len(set(made)) == len({key for key, _ in asked})
    assert f"about {len(asked)} minutes" in capsys.readouterr().out


def test_runs_that_several_tables_share_are_made_once(command, tmp_path, capsys):
    assert reproduce(command("--all", "--methods", "billm", "--divergence")) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert len(list((out / "runs").glob("*.json"))) == 2  # billm and its unquantized reference
    assert "left out: figure3 has no row of billm" in said
    plans = {path.name.removesuffix(".plan.json") for path in (out / "tables").glob("*.plan.json")}
    assert plans == {"table1", "table2", "table3", "table6", "table7", "figure8"}
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"table1-pareto.pdf", "table1-pareto.svg", "table1-pareto.tex", "figure8.pdf"} <= names
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in page for name in plans)
    # The same from the records alone, and each by its number.
    before = {path: path.read_bytes() for folder in ("tables", "figures") for path in (out / folder).iterdir()}
    assert main(["report", "--out", str(out)]) == 0
    assert main(["report", "--out", str(out), "--figure", "8"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (out / "report.html").read_text(encoding="utf-8") == page


def test_the_record_of_the_unquantized_model_alone_holds_the_weight_distributions(command, tmp_path):
    assert reproduce(command("--table", "3", "--methods", "billm")) == 0
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out" / "runs").glob("*.json")]
    for record in records:
        unquantized = record["method"]["name"] == "fp16"
        assert ("weights" in record) == unquantized
        if unquantized:
            assert record["weights"].keys() == {layer["name"] for layer in record["layers"]}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--figure", "1"], "figure 1 is unknown; known: 2, 3"),
        (["--table", "8"], "table 8 is unknown; known: 1, 2"),
        (["--all", "--methods", "bilm"], "unknown method 'bilm'; did you mean 'billm'"),
        (["--all", "--methods", "rtn"], "nothing is left to run"),
        (["--all", "--methods", "bilm block 128"], "unknown method 'bilm'; did you mean 'billm'"),
        (["--all", "--table", "1"], "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, arguments, problem, capsys):
    assert reproduce(command(*arguments)) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
