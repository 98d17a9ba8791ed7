"""The stages of scripts/measure_gpu.py: what becomes of the others when one fails, hangs or leaves a process, and what
is kept beside their records."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness.runtime.command import runtime_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_gpu.py"
BENCHMARK = SCRIPT.parents[1] / "tests" / "benchmarks" / "test_kernel_speed.py"


@pytest.fixture
def script(monkeypatch):
    return loaded(SCRIPT, monkeypatch)


def loaded(file, monkeypatch):
    described = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(described)
    monkeypatch.setitem(sys.modules, file.stem, module)  # dataclasses look their module up
    described.loader.exec_module(module)
    return module


def shell(line):
    return ["sh", "-c", line]


def test_a_stage_that_fails_or_hangs_takes_no_other_with_it(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "_LAST_SECONDS", 1.0)
    child = tmp_path / "child"
    stages = [
        script.Stage("fails", 60, shell("exit 3")),
        script.Stage("hangs", 5, shell(f"trap '' INT; sleep 600 & echo $! > {child}; wait")),
        script.Stage("works", 60, shell(f"touch {tmp_path / 'worked'}")),
    ]
    failed = script.run_stages(stages, 300, tmp_path / "done")
    assert failed == ["fails (exit code 3)", "hangs (more than 5 s)"]
    assert (tmp_path / "worked").exists()
    deadline = time.monotonic() + 30
    while is_running(child.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child.read_text().strip())


def is_running(pid):
    """What was killed and waits for its parent to notice does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("background", [False, True])
def test_what_is_asked_to_stop_may_write_what_it_has(script, tmp_path, background):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    writes = shell(f"trap 'touch {tmp_path / 'figures'}; exit 1' INT; sleep 600 & wait")
    try:
        assert script.run_stages([script.Stage("slow", 3, writes)], 60, tmp_path / "done") == ["slow (more than 3 s)"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "figures").exists()


def test_a_second_run_goes_on_with_what_was_not_done(script, tmp_path):
    stages = [
        script.Stage("once", 60, shell(f"printf x >> {tmp_path / 'count'}")),
        script.Stage("not yet", 60, shell("exit 1")),
    ]
    assert script.run_stages(stages, 60, tmp_path / "done") == ["not yet (exit code 1)"]
    assert script.run_stages(stages, 60, tmp_path / "done") == ["not yet (exit code 1)"]
    assert (tmp_path / "count").read_text() == "x"
    assert script.run_stages(stages, 1, tmp_path / "none") == ["once (no time left)", "not yet (no time left)"]


def test_stages_name_tests_and_rows_that_are_there(script, tmp_path):
    labels = {row.label for row in runtime_rows()}
    for stage in script.stages(tmp_path):
        command = stage.command
        files = [part for part in command if part.endswith(".py")]
        assert all((SCRIPT.parents[1] / file).is_file() for file in files)
        if "--methods" in command:
            assert command[command.index("--methods") + 1] in labels


def test_stages_that_decode_take_fewer_rounds_than_by_default(script, tmp_path):
    rounds = {
        stage.name: int(stage.command[stage.command.index("--rounds") + 1])
        for stage in script.stages(tmp_path)
        if "decode" in stage.command
    }
    assert rounds.pop("banded 70B") == 1
    assert len(rounds) == 5 and set(rounds.values()) == {4}


def test_the_bar_of_kernel_speed_is_that_of_a_cpu(monkeypatch):
    bars = {}
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        (mark,) = loaded(BENCHMARK, monkeypatch).test_sage_ptq_is_at_least_half_again_as_fast_as_dense.pytestmark
        bars[gpu] = (mark.name, mark.args[0])
    assert bars == {True: ("skipif", True), False: ("skipif", False)}


@pytest.fixture
def measured(script, tmp_path, monkeypatch):
    """Run the script's `main` with stages that do nothing, as if there were a GPU; returns the folder of results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "run_stages", lambda planned, seconds, done: [])
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--out", str(tmp_path / "out")])
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))

    def run():
        assert script.main() == 0
        return tmp_path / "out"

    return run


def test_clocks_power_and_temperature_are_noted_before_and_after(script, measured, monkeypatch):
    said = "A GPU, 570.1, P0, 1980, 1980, 3201, 70.1, 700.0, 31\n"

    def answer(command, **options):
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, said)

    monkeypatch.setattr(script.subprocess, "run", answer)
    for runs in (1, 2):  # a second run adds its own
        notes = json.loads((measured() / "gpu.json").read_text())
        assert [note["moment"] for note in notes] == ["start", "end"] * runs
    (gpu,) = notes[0]["gpus"]
    assert (gpu["name"], gpu["clocks.sm"], gpu["power.draw"], gpu["temperature.gpu"]) == ("A GPU", "1980", "70.1", "31")


@pytest.mark.parametrize("problem", [FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_without_an_answer_of_the_driver_nothing_else_is_lost(problem, script, measured, monkeypatch):
    def fails(command, **options):
        raise problem

    monkeypatch.setattr(script.subprocess, "run", fails)
    notes = json.loads((measured() / "gpu.json").read_text())
    assert [note["gpus"] for note in notes] == [None, None]


def test_measured_launches_are_kept_even_if_the_stages_are_interrupted(script, measured, tmp_path, monkeypatch):
    tuned = tmp_path / "cache" / "tuned"
    tuned.mkdir(parents=True)
    (tuned / "A-GPU.json").write_text("{}")

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run_stages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured()
    assert (tmp_path / "out" / "tuned" / "A-GPU.json").read_text() == "{}"
