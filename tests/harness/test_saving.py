"""`sagebench quantize` and `--save`: a checkpoint from one command."""

import json

import pytest
import tiny
import torch

from harness import quantized_cache
from harness.checkpoint.read import load_checkpoint, verify_checkpoint
from harness.cli import main, reproduce
from harness.models.load import load_model
from harness.records import RecordStore
from harness.saving import parse_options
from kernels.errors import InputError


@pytest.fixture
def arguments(tiny_folder, corpus_file, tmp_path):
    def make(*more, method="gptq", out="checkpoint"):
        return [
            "quantize", "--model", str(tiny_folder), "--method", method, "--out", str(tmp_path / out),
            "--calibration-corpus", str(corpus_file), "--calibration-samples", "4", "--context", "32",
            "--profile", "embedded", "--device", "cpu", *more,
        ]  # fmt: skip

    return make


def test_one_command_makes_a_checkpoint_that_says_how(arguments, tmp_path, capsys):
    assert main(arguments("--option", "bits=3", "group_size=32")) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert verify_checkpoint(tmp_path / "checkpoint").options["bits"] == 3
    record = json.loads((tmp_path / "checkpoint" / "record.json").read_text(encoding="utf-8"))
    assert record["spec"]["method"] == {"name": "gptq", "options": {"bits": 3, "group_size": 32}}
    assert record["ledger"]["payload_bits"] == pytest.approx(3 + (16 + 3) / 32)
    model, unquantized = load_checkpoint(tmp_path / "checkpoint"), load_model(record["spec"]["model"]["name"]).model
    with torch.inference_mode():
        error = (model(tiny.tokens()).logits - unquantized(tiny.tokens()).logits).norm()
    assert error > 0


def test_shards_are_as_small_as_asked_for(arguments, tmp_path):
    assert main(arguments("--max-shard-size", "30KB", "--option", "group_size=32", method="rtn")) == 0
    shards = list((tmp_path / "checkpoint").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(file.stat().st_size for file in shards) < 40_000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--option", "bitz=3"], "unknown option 'bitz'; did you mean 'bits'"),
        (["--option", "bits"], "--option 'bits': write name=value"),
        (["--option", "bits=nine"], "bits='nine'"),
        (["--option", "group_size=100"], "group_size=100"),
        (["--method", "gtpq"], "unknown method 'gtpq'"),
        (["--max-shard-size", "big"], "--max-shard-size 'big'"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(arguments, tmp_path, capsys, more, said):
    assert main(arguments(*more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "checkpoint").exists()


def test_a_folder_that_is_in_use_is_refused_before_anything_is_loaded(arguments, tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.txt").write_text("kept")
    assert main(arguments()) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    assert (tmp_path / "checkpoint" / "mine.txt").read_text() == "kept"


def test_a_failure_while_writing_leaves_nothing(arguments, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.checkpoint.write.write_sums", full)
    assert main(arguments("--option", "group_size=32", method="rtn")) == 2
    assert not [path for path in tmp_path.iterdir() if "checkpoint" in path.name]


def test_options_are_read_as_yaml_scalars():
    found = parse_options(["bits=3", "symmetric=true", "damping=0.05", "scale-dtype=float32", "group_count=null"])
    assert found == {"bits": 3, "symmetric": True, "damping": 0.05, "scale_dtype": "float32", "group_count": None}
    for bad in ("bits", "=3", "bits=[1", "a=: :"):
        with pytest.raises(InputError, match="--option"):
            parse_options([bad])


@pytest.fixture
def table(tiny_folder, corpus_file, experiment_file, tmp_path):
    return [
        "--experiment", str(experiment_file()), "--model", str(tiny_folder), "--corpus", str(corpus_file),
        "--context", "32", "--windows", "3", "--calibration-samples", "4", "--calibration-corpus", str(corpus_file),
        "--profile", "embedded", "--device", "cpu", "--out", str(tmp_path / "results"),
    ]  # fmt: skip


def test_save_keeps_a_checkpoint_of_every_quantized_run(table, tmp_path, capsys):
    assert reproduce([*table, "--save"]) == 0
    records = RecordStore(tmp_path / "results" / "runs").load_all()
    quantized = {key for key, record in records.items() if record["method"]["name"] != "fp16"}
    folders = {folder.name: folder for folder in (tmp_path / "results" / "checkpoints").iterdir()}
    assert folders.keys() == quantized
    for key, folder in folders.items():
        verify_checkpoint(folder)
        stored = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert stored["metrics"] == records[key]["metrics"]
    assert capsys.readouterr().out.count("saved: ") == 2


def test_weights_made_again_under_other_conditions_do_not_get_figures_measured_on_others(table, tmp_path, monkeypatch):
    assert reproduce(table) == 0
    monkeypatch.setattr(quantized_cache, "cpu_name", lambda: "another processor")
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "emptied"))
    assert reproduce([*table, "--save"]) == 0
    folders = list((tmp_path / "results" / "checkpoints").iterdir())
    assert folders
    for folder in folders:
        stored = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert (stored["key"], stored["metrics"]) == (folder.name, [])


def test_the_weights_that_workers_measured_are_saved_and_not_made_again(table, tmp_path, capsys):
    more = 1 + torch.get_num_threads()  # other threads than this process: conditions of its own
    assert reproduce([*table, "--workers", "2", "--threads", str(more), "--save"]) == 0
    records = RecordStore(tmp_path / "results" / "runs").load_all()
    folders = list((tmp_path / "results" / "checkpoints").iterdir())
    assert len(folders) == 2
    for folder in folders:
        stored = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert stored["environment"]["threads"] == more
        assert stored["metrics"] == records[folder.name]["metrics"] != []
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 2


def test_save_works_for_runs_that_were_finished_without_it(table, tmp_path):
    assert reproduce(table) == 0
    assert not (tmp_path / "results" / "checkpoints").exists()
    assert reproduce([*table, "--save"]) == 0
    for folder in (tmp_path / "results" / "checkpoints").iterdir():
        verify_checkpoint(folder)
        assert json.loads((folder / "record.json").read_text(encoding="utf-8"))["metrics"][0]["windows"] == 3
