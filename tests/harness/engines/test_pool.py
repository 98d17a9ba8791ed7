import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import dying
import pytest

from harness.engines import Result, Task, pool
from harness.engines.messages import result_from_text, result_to_text, task_from_text, task_to_text
from harness.engines.pool import ProcessPool, core_group
from harness.engines.worker import UNHEARD
from harness.records import RecordStore, outcome
from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec
from harness.sweep import Reporter, sweep


@pytest.fixture
def plan(tiny_folder, corpus_file, tmp_path, monkeypatch):
    """FP16 and two quantized runs, and their references."""
    dying.install(tmp_path / "plugin", monkeypatch)

    def spec(name, **options):
        calibration = CalibrationSpec(corpus=str(corpus_file), samples=8, context=32) if name == "gptq" else None
        return RunSpec(
            model=ModelSpec(name=str(tiny_folder)),
            method=MethodSpec(name=name, options=options),
            calibration=calibration,
            evaluations=(PerplexitySpec(corpus=str(corpus_file), context=32, windows=4),),
        )

    runs = [spec("fp16"), spec("dying", bits=3, group_size=32), spec("gptq", bits=3, group_size=32)]
    return runs, {run.key: runs[0].key for run in runs}


def another_checkout(tmp_path):
    """A folder whose own `harness` no worker of this one may run."""
    package = tmp_path / "another" / "harness"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the wrong package')", encoding="utf-8")
    return package.parent


def outcomes(store):
    return {key: outcome(record) for key, record in store.load_all().items()}


class Listener(Reporter):
    def __init__(self):
        self.heard = []

    def progress(self, spec, done, total, what):
        self.heard.append((spec.method.name, what))


def test_a_pool_gives_the_records_of_one_process_though_a_worker_is_killed(plan, tmp_path, monkeypatch):
    runs, references = plan
    here, there = RecordStore(tmp_path / "here"), RecordStore(tmp_path / "there")
    sweep(runs, references, here)
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "another-cache"))
    to_die = dying.deaths(tmp_path / "deaths", 1, monkeypatch)
    listener = Listener()
    done = sweep(runs, references, there, listener, engine=ProcessPool(2, threads=1))
    assert not list(to_die.iterdir())
    assert sorted(done.done) == sorted(run.key for run in runs)
    assert outcomes(there) == outcomes(here)
    assert there.load(runs[1].key)["quantization"]["restored_blocks"] == 1  # it went on from its first block
    assert {name for name, _ in listener.heard} == {"fp16", "dying", "gptq"}
    assert any("block" in what for _, what in listener.heard)


def test_a_run_whose_worker_dies_again_and_again_is_given_up(plan, tmp_path, monkeypatch):
    runs, references = plan
    store = RecordStore(tmp_path / "runs")
    sweep(runs[:1], references, store)
    to_die = dying.deaths(tmp_path / "deaths", 3, monkeypatch)
    found = sweep(runs[:2], references, store, engine=ProcessPool(2, threads=1, retries=1))
    assert len(list(to_die.iterdir())) == 1
    assert (found.done, found.failed) == ([], [runs[1].key])
    (line,) = found.errors.values()
    assert "WorkerDied: its process was ended by SIGKILL (the system does that when memory runs out), 2 times" in line
    assert store.failure_path(runs[1].key).is_file()


def test_a_worker_that_dies_in_the_middle_of_a_word_is_begun_again(plan, tmp_path, monkeypatch):
    words = tmp_path / "half.py"
    words.write_text('import sys; sys.stdin.read(); sys.stdout.write(\'{"result": {"rec\')', encoding="utf-8")
    real = subprocess.Popen

    def launch(command, **options):
        if not words.exists():
            return real(command, **options)
        process = real([sys.executable, "-c", words.read_text(encoding="utf-8")], **options)
        words.unlink()
        return process

    monkeypatch.setattr(subprocess, "Popen", launch)
    runs, references = plan
    found = sweep(runs[:1], references, RecordStore(tmp_path / "runs"), engine=ProcessPool(1, threads=1))
    assert found.done == [runs[0].key]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no core groups on this system")
def test_workers_keep_to_their_cores_and_end_when_the_sweep_is_interrupted(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(another_checkout(tmp_path))
    engine, processes, cores = ProcessPool(2, threads=1), [], {}

    class Interrupted(Reporter):
        def progress(self, spec, done, total, what):
            processes.extend(worker.process for worker in engine._workers)
            (mine,) = [worker for worker in engine._workers if worker.task.spec == spec]
            for task in Path(f"/proc/{mine.process.pid}/task").iterdir():
                with suppress(ProcessLookupError):  # a thread that has ended since
                    cores[task.name] = os.sched_getaffinity(int(task.name)), set(core_group(mine.slot, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(*plan, RecordStore(tmp_path / "runs"), Interrupted(), engine=engine)
    assert processes and all(process.returncode is not None for process in processes)
    assert cores and all(found == wanted for found, wanted in cores.values())


def test_tasks_and_results_travel_as_text(plan):
    runs, _ = plan
    task, settings = task_from_text(task_to_text(Task(runs[2], {"key": "k"}, True), threads=2, cores=[0]))
    assert task == Task(runs[2], {"key": "k"}, True)
    assert task.spec.key == runs[2].key
    assert settings == {"threads": 2, "cores": [0]}
    result = Result(runs[0], None, "no", "at length", bad_input=True)
    assert result_from_text(runs[0], result_to_text(result)) == result


def test_a_worker_whose_reader_is_gone_ends(plan):
    worker = subprocess.Popen(
        [sys.executable, "-c", pool._PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    worker.stdout.close()
    worker.stdin.write(task_to_text(Task(plan[0][0])) + "\n")
    worker.stdin.close()
    assert worker.wait(900) == UNHEARD


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no core groups on this system")
@pytest.mark.parametrize(
    ("slots", "groups"),
    [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (3, [[0], [1], [2]]), (5, [[0], [1], [2], [3], [0]])],
)
def test_cores_are_shared_out(monkeypatch, slots, groups):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 0, 2})
    assert [core_group(slot, slots) for slot in range(slots)] == groups
