import copy
import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from harness import records, runner
from harness.cli import main, reproduce
from harness.quantize import quantize_model
from kernels.layouts import DenseWeight
from methods import method_class

COLUMNS = (
    "item,method,setting,model,metric,dataset,paper,measured,stderr,difference,"
    "nominal_weight_bits,nominal_scale_bits,payload_bits,total_bytes,run_key,note"
)
FORMATS = ("md", "csv", "tex", "html")


def command_line(folder, model, corpus, *more, out):
    """A small table on a tiny model."""
    experiment = tiny.write_experiment(folder / "small.yaml")
    return [
        "--experiment", str(experiment), "--model", str(model), "--corpus", str(corpus),
        "--calibration-corpus", str(corpus), "--context", "32", "--calibration-samples", "8",
        "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """Where results go."""
    return tmp_path / "results"


@pytest.fixture
def arguments(tiny_folder, corpus_file, tmp_path, out):
    return lambda *more: command_line(tmp_path, tiny_folder, corpus_file, *more, out=out)


@pytest.fixture(scope="module")
def whole(tiny_folder, corpus_file, tmp_path_factory):
    """The results of an undisturbed run, made once; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SAGEBENCH_CACHE", str(folder / "cache"))
        patch.delenv("SAGEBENCH_DATA", raising=False)
        assert reproduce(command_line(folder, tiny_folder, corpus_file, out=folder / "results")) == 0
    return folder / "results"


@pytest.fixture
def finished(whole, out):
    """A copy of `whole` at `out`, as if the run had been made there."""
    return Path(shutil.copytree(whole, out))


def tables(out):
    return {suffix: (out / "tables" / f"small.{suffix}").read_bytes() for suffix in FORMATS}


def runs(out):
    """Method and file name of every record."""
    found = {}
    for path in sorted((out / "runs").glob("*.json")):
        found[json.loads(path.read_text(encoding="utf-8"))["spec"]["method"]["name"]] = path
    return found


def test_a_table_comes_from_one_command_and_a_second_one_repeats_nothing(arguments, finished, whole, capsys):
    assert runs(finished).keys() == {"fp16", "rtn", "gptq"}
    before = {path: path.stat().st_mtime_ns for path in runs(finished).values()}
    for suffix in FORMATS:
        (finished / "tables" / f"small.{suffix}").unlink()
    assert main(["run", *arguments()]) == 0
    said = capsys.readouterr()
    assert said.out.count("finished before") == 3
    assert said.err == ""
    assert {path: path.stat().st_mtime_ns for path in runs(finished).values()} == before
    assert tables(finished) == tables(whole)


def test_report_makes_the_same_files_from_the_records_alone(finished, whole):
    for suffix in FORMATS:
        (finished / "tables" / f"small.{suffix}").unlink()
    assert main(["report", "--out", str(finished)]) == 0
    assert tables(finished) == tables(whole)


def test_the_csv_is_tidy_and_holds_what_the_records_say(whole, tiny_folder):
    lines = (whole / "tables" / "small.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == COLUMNS
    everything = [row for row in csv.DictReader(lines) if row["run_key"]]
    assert len(everything) == len({(row["method"], row["setting"], row["model"], row["metric"]) for row in everything})
    rows = [row for row in everything if row["metric"] == "perplexity"]
    assert {(row["method"], row["dataset"], row["model"]) for row in rows} == {
        (method, "story", str(tiny_folder)) for method in ("fp16", "rtn", "gptq")
    }
    for row in rows:
        record = json.loads((whole / "runs" / f"{row['run_key']}.json").read_text(encoding="utf-8"))
        assert row["method"] == record["method"]["name"]
        assert float(row["measured"]) == pytest.approx(record["metrics"][0]["value"], rel=1e-9)
        assert int(row["total_bytes"]) == record["ledger"]["total_bytes"]
        assert float(row["payload_bits"]) == pytest.approx(record["ledger"]["payload_bits"])
    assert len({row["measured"] for row in rows}) == 3


def test_the_record_of_a_run_is_complete(whole):
    record = json.loads(runs(whole)["gptq"].read_text(encoding="utf-8"))
    assert record["data"]["calibration"]["dataset"] == "story"
    assert record["method"]["options"]["bits"] == 3
    assert record["method"]["provenance"]["paper"]
    assert record["phases"].keys() == {"load", "quantize", "evaluate"}
    assert record["reference"]["nll_gap"][0] != 0
    assert len(record["layers"]) == 21
    assert record["environment"]["packages"]["torch"]
    assert len(record["model"]["sha256"]) == 64


def test_fewer_windows_are_another_run_and_said_in_the_record(arguments, finished):
    assert reproduce(arguments("--windows", "5", "--methods", "fp16")) == 0
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (finished / "runs").glob("*.json")]
    counts = sorted((r["metrics"][0]["windows"], r["metrics"][0]["windows_available"]) for r in found)
    assert counts == [(5, 31), (12, 31), (12, 31), (12, 31)]


def test_fresh_runs_everything_again(arguments, finished, whole):
    before = {path: path.stat().st_mtime_ns for path in runs(finished).values()}
    assert reproduce(arguments("--fresh")) == 0
    assert all(path.stat().st_mtime_ns > then for path, then in before.items())
    assert not any(json.loads(path.read_text(encoding="utf-8"))["quantization"]["from_cache"] for path in before)
    assert tables(finished) == tables(whole)


def test_an_interrupted_table_is_completed_and_equals_an_uninterrupted_one(arguments, out, whole, monkeypatch, capsys):
    quantize = runner.quantize_model

    def interrupted(model, method, *rest):
        if method.name == "gptq":
            raise KeyboardInterrupt
        return quantize(model, method, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "quantize_model", interrupted)
        assert reproduce(arguments()) == 130
    assert capsys.readouterr().err == "interrupted; finished runs are kept, the same command goes on from there\n"
    assert runs(out).keys() == {"fp16", "rtn"}
    assert reproduce(arguments()) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert tables(out) == tables(whole)


def test_a_killed_run_leaves_nothing_half_written_and_is_completed(arguments, out, whole):
    script = Path(__file__).resolve().parents[2] / "scripts" / "reproduce.py"
    child = subprocess.Popen(
        [sys.executable, str(script), *arguments()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 900
    while not list(out.glob("runs/*.json")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert runs(out)  # a record is there, and whatever is there can be read
    assert reproduce(arguments()) == 0
    assert tables(out) == tables(whole)
    assert not list(out.glob("runs/*.corrupt"))


def test_a_corrupt_record_is_moved_aside_reported_and_run_again(arguments, finished, whole, capsys):
    path = runs(finished)["rtn"]
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert reproduce(arguments()) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is corrupt" in said
    assert f"moved to {path.name}.corrupt, the run is repeated" in said
    assert path.with_suffix(".json.corrupt").is_file()
    assert runs(finished)["rtn"] == path
    assert tables(finished) == tables(whole)


@pytest.mark.parametrize("command", ["report", "dry-run"])
def test_whatever_moves_a_corrupt_record_aside_says_so(arguments, finished, capsys, command):
    runs(finished)["rtn"].write_text("{", encoding="utf-8")
    assert (main(["report", "--out", str(finished)]) if command == "report" else reproduce(arguments("--dry-run"))) == 0
    assert "is corrupt" in " ".join(capsys.readouterr().out.split())


def test_a_failed_run_is_shown_and_gives_exit_code_1(arguments, out, monkeypatch, capsys):
    quantize = runner.quantize_model

    def broken(model, method, *rest):
        if method.name == "rtn":
            raise RuntimeError("something broke")
        return quantize(model, method, *rest)

    monkeypatch.setattr(runner, "quantize_model", broken)
    assert reproduce(arguments()) == 1
    assert "RuntimeError: something broke" in " ".join(capsys.readouterr().out.split())
    assert {name: path.name.endswith(".failed.json") for name, path in runs(out).items()} == {
        "fp16": False, "rtn": True, "gptq": False,
    }  # fmt: skip
    assert tables(out)


def test_a_method_that_does_nothing_fails(arguments, out, monkeypatch):
    def identity(self, weight, statistics=None, context=None):
        return DenseWeight(weight.detach().clone())

    monkeypatch.setattr(method_class("rtn"), "quantize_linear", identity)
    assert reproduce(arguments("--methods", "rtn")) == 1
    (failure,) = (out / "runs").glob("*.failed.json")
    assert "NoOpError" in json.loads(failure.read_text(encoding="utf-8"))["error"]


def test_a_perplexity_equal_to_the_unquantized_one_fails(arguments, out, monkeypatch):
    """A method may change weights and still not reach what is measured: say, if the model had kept a copy."""
    monkeypatch.setattr(runner, "quantize_model", lambda model, *rest: quantize_model(copy.deepcopy(model), *rest))
    assert reproduce(arguments("--methods", "rtn")) == 1
    (failure,) = (out / "runs").glob("*.failed.json")
    assert "equals the unquantized model's exactly" in json.loads(failure.read_text(encoding="utf-8"))["error"]


def test_a_full_disk_in_the_middle_keeps_finished_runs(arguments, out, monkeypatch, capsys):
    write, written = records.write_text, []

    def full(path, text):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, text)

    monkeypatch.setattr(records, "write_text", full)
    assert reproduce(arguments()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no disk space left (")
    assert error.count("\n") == 1
    assert runs(out).keys() == {"fp16"}


def test_a_dry_run_lists_runs_and_writes_nothing(arguments, out, capsys):
    assert reproduce(arguments("--dry-run")) == 0
    said = capsys.readouterr().out
    assert said.count("to do") >= 3
    assert "within a factor of two" in said
    assert not out.exists()


def test_reparameterized_runs_are_runs_of_their_own(arguments, finished):
    assert reproduce(arguments("--methods", "rtn", "--reparameterize")) == 0
    nll = {}
    for path in (finished / "runs").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        nll[record["method"]["name"], record["spec"]["model"]["reparameterize"]] = record["metrics"][0]["nll"]
    assert len(nll) == 5
    assert nll["fp16", True] == pytest.approx(nll["fp16", False], abs=0.01)
    assert abs(nll["rtn", True] - nll["rtn", False]) > 1e-3


@pytest.mark.parametrize(
    ("what", "shown"),
    [("methods", "sage-ptq"), ("models", "smollm2-135m"), ("corpora", "wikitext2"), ("experiments", "table1")],
)
def test_list_shows_what_is_there(capsys, what, shown):
    assert main(["list", what]) == 0
    assert shown in capsys.readouterr().out


def test_help_and_version_end_well(capsys):
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as caught:
            main([argument])
        assert caught.value.code == 0
    assert "sagebench 0." in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without CUDA does")
def test_the_default_device_is_the_cpu_without_cuda(arguments, out, finished, capsys):
    command = arguments()
    del command[command.index("--device") : command.index("--device") + 2]
    assert reproduce(command) == 0
    assert capsys.readouterr().out.count("finished before") == 3
