"""A run that measures fewer windows than one before it is not carried out: its record is what it would have been."""

import json

import pytest
import tiny

from harness.cli import reproduce
from harness.records import RecordStore, outcome

ROWS = [
    {"method": "fp16", "setting": "16 bit", "label": "FP16"},
    {"method": "rtn", "setting": "3 bit", "label": "RTN", "options": {"bits": 3, "group_size": 32}},
    {"method": "gptq", "setting": "3 bit", "label": "GPTQ", "options": {"bits": 3, "group_size": 32}},
]


@pytest.fixture
def command(tiny_folder, corpus_file, tmp_path, capsys):
    """Run the command line for so many windows; returns how many runs were carried out, and all that was said."""
    path = tiny.write_experiment(tmp_path / "front.yaml", models=[str(tiny_folder)], rows=ROWS)

    def command(windows, *more, out="out"):
        line = [
            "--experiment", str(path), "--corpus", str(corpus_file), "--context", "32", "--profile", "paper",
            "--device", "cpu", "--calibration-samples", "4", "--calibration-corpus", str(corpus_file),
            "--out", str(tmp_path / out), *more,
        ]  # fmt: skip
        assert reproduce(line if windows is None else [*line, "--windows", str(windows)]) == 0
        said = capsys.readouterr().out
        return said.count("  done: "), said

    return command


def records(folder, windows):
    """Outcomes by method of the runs of so many windows."""
    found = RecordStore(folder / "runs").load_all().values()
    return {
        record["spec"]["method"]["name"]: record
        for record in found
        if record["spec"]["evaluations"][0]["windows"] == windows
    }


def test_fewer_windows_are_taken_from_a_longer_run_and_are_what_a_run_would_have_given(command, tmp_path):
    assert command(5)[0] == 3
    ran, said = command(2)
    assert ran == 0
    assert said.count("its windows were measured by the longer run") == said.count("finished before") == 3
    assert command(2, out="alone")[0] == 3
    taken, alone = records(tmp_path / "out", 2), records(tmp_path / "alone", 2)
    assert taken.keys() == alone.keys() == {"fp16", "rtn", "gptq"}
    longer = records(tmp_path / "out", 5)
    for method, record in taken.items():
        assert outcome(record) == outcome(alone[method])
        assert record["taken_from"] == {key: longer[method][key] for key in ("key", "created")}
        assert record["metrics"][0]["value"] != longer[method]["metrics"][0]["value"]
    assert (tmp_path / "out/tables/small.csv").read_bytes() == (tmp_path / "alone/tables/small.csv").read_bytes()


def test_more_windows_than_were_measured_are_measured(command):
    assert command(2)[0] == 3
    assert command(3)[0] == 3


def test_all_windows_serve_any_number_and_as_many_as_there_are_serve_all(command, tmp_path):
    assert command(None)[0] == 3
    there = records(tmp_path / "out", None)["fp16"]["metrics"][0]["windows_available"]
    assert command(there)[0] == 0
    assert command(there + 1)[0] == 0  # no more than there are
    assert command(there, out="other")[0] == 3
    assert command(None, out="other")[0] == 0


def test_other_weights_texts_and_contexts_are_measured(command, tmp_path):
    assert command(5)[0] == 3
    assert command(2, "--context", "30")[0] == 3
    assert command(2, "--reparameterize")[0] == 3
    assert command(2, "--calibration-samples", "5")[0] == 1  # of GPTQ alone


def test_fresh_measures_again(command):
    assert command(5)[0] == 3
    assert command(2, "--fresh")[0] == 3


def test_without_a_longer_run_of_the_unquantized_model_all_is_measured(command, tmp_path):
    assert command(5)[0] == 3
    RecordStore(tmp_path / "out/runs").path(records(tmp_path / "out", 5)["fp16"]["key"]).unlink()
    assert command(2)[0] == 3


def test_a_dry_run_knows_and_writes_nothing(command, tmp_path):
    assert command(5)[0] == 3
    before = sorted((tmp_path / "out/runs").iterdir())
    assert "to do: about 0 minutes" in command(2, "--dry-run")[1]
    assert sorted((tmp_path / "out/runs").iterdir()) == before


def test_records_of_another_build_are_passed_over(command, tmp_path):
    assert command(5)[0] == 3
    for path in (tmp_path / "out/runs").iterdir():
        record = json.loads(path.read_text(encoding="utf-8"))
        record["spec"]["model"]["colour"] = "blue"
        path.write_text(json.dumps(record), encoding="utf-8")
    assert command(2)[0] == 3
