"""A real Ray cluster of two nodes on this machine: the records of one process, whatever dies on the way."""

import os
from pathlib import Path

import dying
import pytest

from harness.engines import InProcess
from harness.records import RecordStore, outcome
from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec
from harness.sweep import Reporter, sweep
from kernels.errors import InputError

ray = pytest.importorskip("ray", reason="needs the extra sagebench[ray]")

from harness.engines.ray_cluster import RayCluster  # noqa: E402

_ROOT = Path(__file__).resolve().parents[3]
DYING = 5


# Ray gives up on nodes and workers that are slow, and ends workers when the machine is short of memory: not here.
_PATIENT = {
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_health_check_failure_threshold": "100",
    "RAY_memory_monitor_refresh_ms": "0",
}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Before Ray starts anything: its own processes must find the package too, installed or not.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])))
        for name, value in _PATIENT.items():
            patch.setenv(name, value)
        started = Cluster()
        try:
            add_node(started, include_dashboard=False)
            add_node(started)
            started.wait_for_nodes(timeout=300)
            yield started
        finally:
            started.shutdown()


def add_node(cluster, **more):
    """A node of one core. Ray allows it half a minute to start, which a busy machine may not keep."""
    for tries_left in (4, 3, 2, 1, 0):
        try:
            cluster.add_node(wait=False, num_cpus=1, object_store_memory=80_000_000, **more)
            return
        except Exception as error:
            if not tries_left or "timed out during startup" not in str(error):
                raise


@pytest.fixture
def plan(tiny_folder, corpus_file, tmp_path, monkeypatch):
    """Twelve runs: FP16, and eleven that are compared with it, one of them with a method whose process can die."""
    dying.install(tmp_path / "plugin", monkeypatch)

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
    runs += [spec("gptq", bits=bits, group_size=32) for bits in (1, 2, 3, 4)]
    runs.insert(DYING, spec("dying", bits=3, group_size=32))
    return runs, {run.key: runs[0].key for run in runs}


class Listener(Reporter):
    def __init__(self):
        self.ended = []

    def end(self, spec, status, record):
        self.ended.append((spec.key, status))


def test_two_nodes_give_the_records_of_one_process_though_a_worker_is_killed(cluster, plan, tmp_path, monkeypatch):
    runs, references = plan
    assert len(runs) == 12
    assert len(cluster.list_all_nodes()) == 2
    here, there = RecordStore(tmp_path / "here"), RecordStore(tmp_path / "there")
    sweep(runs, references, here, engine=InProcess())
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "another-cache"))
    to_die = dying.deaths(tmp_path / "deaths", 1, monkeypatch)
    listener = Listener()
    found = sweep(runs, references, there, listener, engine=RayCluster(cluster.address, threads=1))
    assert not list(to_die.iterdir())  # a worker was killed
    assert not found.failed
    assert sorted(found.done) == sorted(run.key for run in runs)  # each once
    assert sorted(listener.ended) == sorted((run.key, "done") for run in runs)
    assert sorted(path.name for path in there.folder.iterdir()) == sorted(f"{run.key}.json" for run in runs)
    for run in runs:
        assert outcome(there.load(run.key)) == outcome(here.load(run.key))
    # Both nodes are this machine: the run went on from its first block.
    assert there.load(runs[DYING].key)["quantization"]["restored_blocks"] == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:99999"])
def test_an_address_where_nobody_answers_is_refused(address):
    with pytest.raises(InputError, match=f"--address '{address}': no Ray cluster answers there"):
        RayCluster(address)
