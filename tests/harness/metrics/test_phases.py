import time

import numpy as np
import pytest

from harness.metrics.phases import Phases


def test_a_phase_has_its_wall_time():
    phases = Phases("cpu")
    with phases.measure("load"):
        time.sleep(0.12)
    assert 0.12 <= phases.measured["load"]["seconds"] < 5


def test_a_phase_entered_twice_adds_its_seconds():
    phases = Phases("cpu")
    for _ in range(2):
        with phases.measure("evaluate"):
            time.sleep(0.06)
    assert list(phases.measured) == ["evaluate"]
    assert phases.measured["evaluate"]["seconds"] >= 0.12


def test_memory_that_was_freed_again_still_counts_in_the_peak():
    phases = Phases("cpu")
    with phases.measure("small"):
        pass
    with phases.measure("large"):
        block = np.ones(25_000_000)  # 200 MB, every page touched
        time.sleep(0.15)
        del block
    gained = phases.measured["large"]["peak_bytes"] - phases.measured["small"]["peak_bytes"]
    assert gained > 150_000_000
    with phases.measure("large"):
        pass
    assert phases.measured["large"]["peak_bytes"] - phases.measured["small"]["peak_bytes"] == gained


def test_a_phase_that_fails_is_measured_all_the_same():
    phases = Phases("cpu")
    with pytest.raises(ZeroDivisionError), phases.measure("load"):
        raise ZeroDivisionError
    assert phases.measured["load"]["peak_bytes"] > 1_000_000
