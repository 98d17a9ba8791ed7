import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from harness.metrics.phases import Phases

MB = 10**6


@pytest.fixture
def memory(monkeypatch):
    """The process's memory as the test says; `seen` waits until the sampler has read what was said last."""
    said = SimpleNamespace(rss=100 * MB)
    samples = threading.Semaphore(0)

    def info(process):
        found = SimpleNamespace(rss=said.rss)
        samples.release()
        return found

    def seen():
        while samples.acquire(blocking=False):
            pass
        assert samples.acquire(timeout=300) and samples.acquire(timeout=300)  # the first may have begun before

    monkeypatch.setattr(psutil.Process, "memory_info", info)
    said.seen = seen
    return said


def test_a_phase_has_its_wall_time():
    phases = Phases("cpu")
    before = time.perf_counter()
    with phases.measure("load"):
        start = time.perf_counter()
        time.sleep(0.01)
        least = time.perf_counter() - start
    assert least <= phases.measured["load"]["seconds"] <= time.perf_counter() - before


def test_a_phase_entered_twice_adds_its_seconds():
    phases = Phases("cpu")
    for _ in range(2):
        with phases.measure("evaluate"):
            time.sleep(0.06)
    assert list(phases.measured) == ["evaluate"]
    assert phases.measured["evaluate"]["seconds"] >= 0.12


def test_memory_that_was_freed_again_still_counts_in_the_peak(memory):
    phases = Phases("cpu")
    with phases.measure("small"):
        pass
    with phases.measure("large"):
        memory.rss = 300 * MB
        memory.seen()
        memory.rss = 100 * MB
    with phases.measure("large"):
        pass
    assert phases.measured["small"]["peak_bytes"] == 100 * MB
    assert phases.measured["large"]["peak_bytes"] == 300 * MB


def test_a_phase_that_fails_is_measured_all_the_same():
    phases = Phases("cpu")
    with pytest.raises(ZeroDivisionError), phases.measure("load"):
        raise ZeroDivisionError
    assert phases.measured["load"]["peak_bytes"] > 1_000_000
