"""The stages of scripts/measure_gpu.py: what becomes of the others when one fails, hangs or leaves a process."""

import importlib.util
import signal
import sys
import time
from pathlib import Path

import pytest

from harness.runtime.command import runtime_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_gpu.py"


@pytest.fixture
def script(monkeypatch):
    described = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    module = importlib.util.module_from_spec(described)
    monkeypatch.setitem(sys.modules, "measure_gpu", module)  # dataclasses look their module up
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
