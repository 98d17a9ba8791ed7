"""A real Ray cluster of two nodes on this machine: the records of one process, whatever dies on the way."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.engines import InProcess
from harness.records import RecordStore, outcome
from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec
from harness.sweep import Reporter, sweep
from kernels.errors import InputError

ray = pytest.importorskip("ray", reason="needs the extra sagebench[ray]")

from harness.engines.ray_cluster import RayCluster  # noqa: E402

_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Before Ray starts anything: its own processes must find the package too, installed or not.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        started.add_node(num_cpus=1)
        yield started
        started.shutdown()


@pytest.fixture
def plan(tiny_folder, corpus_file):
    """Twelve runs: FP16, and eleven that are compared with it."""

    def spec(name, **options):
        calibration = CalibrationSpec(corpus=str(corpus_file), samples=8, context=32) if name == "gptq" else None
        return RunSpec(
            model=ModelSpec(name=str(tiny_folder)),
            method=MethodSpec(name=name, options=options),
            calibration=calibration,
            evaluations=(PerplexitySpec(corpus=str(corpus_file), context=32, windows=4),),
        )

    runs = [spec("fp16")]
    runs += [spec("rtn", bits=bits, group_size=size) for bits in (2, 3, 4) for size in (16, 32)]
    runs += [spec("gptq", bits=bits, group_size=32) for bits in (1, 2, 3, 4, 5)]
    return runs, {run.key: runs[0].key for run in runs}


class KillOneWorker(Reporter):
    """Kills a process that works on a run, once half of the runs are done."""

    def __init__(self):
        self.done = 0
        self.ended = []
        self.killed = []

    def end(self, spec, status, record):
        self.ended.append((spec.key, status))
        if len(self.ended) == 5 and not self.killed:
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for process in psutil.process_iter(["pid", "cmdline"]):
                line = process.info["cmdline"] or [""]
                if line[0].startswith("ray::") and "on " in line[0] and "IDLE" not in line[0]:
                    self.killed.append(process.info["pid"])
                    process.kill()
                    return
            time.sleep(0.02)


def test_two_nodes_give_the_records_of_one_process_though_a_worker_is_killed(cluster, plan, tmp_path, monkeypatch):
    runs, references = plan
    assert len(runs) == 12
    assert len(cluster.list_all_nodes()) == 2
    here, there = RecordStore(tmp_path / "here"), RecordStore(tmp_path / "there")
    sweep(runs, references, here, engine=InProcess())
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "another-cache"))
    killer = KillOneWorker()
    found = sweep(runs, references, there, killer, engine=RayCluster(cluster.address, threads=1))
    assert killer.killed
    assert not found.failed
    assert sorted(found.done) == sorted(run.key for run in runs)  # each once
    assert sorted(killer.ended) == sorted((run.key, "done") for run in runs)
    assert sorted(path.name for path in there.folder.iterdir()) == sorted(f"{run.key}.json" for run in runs)
    for run in runs:
        assert outcome(there.load(run.key)) == outcome(here.load(run.key))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:99999"])
def test_an_address_where_nobody_answers_is_refused(address):
    with pytest.raises(InputError, match=f"--address '{address}': no Ray cluster answers there"):
        RayCluster(address)
