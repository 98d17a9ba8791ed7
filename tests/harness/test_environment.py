import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from harness import environment


def test_the_record_is_json_and_holds_versions_and_machine():
    record = environment.environment_record()
    assert json.loads(json.dumps(record)) == record
    assert record["python"] == platform.python_version()
    assert record["packages"]["torch"] == torch.__version__
    assert {"sagebench", "transformers", "tokenizers"} <= record["packages"].keys()
    assert record["threads"] == torch.get_num_threads()
    assert record["memory_bytes"] > 1e8
    assert record["cpu"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small tree in the shape of ours."""
    names = ("kernels/a.py", "methods/deep/b.py", "harness/models/c.py", "harness/report/d.py", "harness/metrics/e.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    for name in (
        "calibration.py",
        "quantize.py",
        "layer_log.py",
        "determinism.py",
        "corpora.py",
        "ledger.py",
        "runner.py",
        "evaluations.py",
        "reference.py",
        "stored.py",
    ):
        (tmp_path / "harness" / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    yield tmp_path
    environment.quantization_fingerprint.cache_clear()


def weights():
    """The fingerprint of the code that decides the weights."""
    environment.quantization_fingerprint.cache_clear()
    return environment.quantization_fingerprint()


def fingerprint():
    """The fingerprint of all that a measurement depends on."""
    environment.quantization_fingerprint.cache_clear()
    return environment.code_fingerprint.__wrapped__()


@pytest.mark.parametrize("name", ["kernels/a.py", "methods/deep/b.py", "harness/models/c.py", "harness/quantize.py"])
def test_an_edit_of_what_decides_the_weights_changes_the_fingerprint(source, name):
    before = fingerprint(), weights()
    assert (fingerprint(), weights()) == before
    (source / name).write_text("edited", encoding="utf-8")
    assert fingerprint() != before[0]
    assert weights() != before[1]


@pytest.mark.parametrize("name", ["harness/metrics/e.py", "harness/ledger.py", "harness/runner.py"])
def test_an_edit_of_what_is_measured_leaves_the_weights_alone(source, name):
    before = fingerprint(), weights()
    (source / name).write_text("edited", encoding="utf-8")
    assert fingerprint() != before[0]
    assert weights() == before[1]


def test_an_edit_of_a_report_does_not(source):
    before = fingerprint()
    (source / "harness/report/d.py").write_text("edited", encoding="utf-8")
    assert fingerprint() == before


def test_moving_code_between_files_changes_the_fingerprint(source):
    before = fingerprint()
    (source / "kernels/a.py").rename(source / "kernels/b.py")
    assert fingerprint() != before


def test_every_file_that_the_fingerprint_names_exists():
    environment.code_fingerprint.__wrapped__()


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_state_knows_clean_from_dirty_and_a_checkout_from_none(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_state() is None
    file = Path(tmp_path / "file")
    file.write_text("one", encoding="utf-8")
    git(tmp_path, "init")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    clean = environment.git_state()
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    file.write_text("two", encoding="utf-8")
    assert environment.git_state() == {"commit": clean["commit"], "dirty": True}


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
            "aarch64, CPU implementer 0x41, CPU part 0xd40",
        ),
        ("", "aarch64"),
    ],
)
def test_a_processor_without_a_name_goes_by_its_numbers(monkeypatch, lines, name):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(environment.Path, "read_text", lambda path, encoding: lines)
    assert environment.cpu_name() == name
