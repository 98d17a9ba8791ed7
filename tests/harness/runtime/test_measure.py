"""What becomes of a measurement where memory gives out, and what is timed and weighed beside the main arm."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from harness.catalog import ShapeEntry
from harness.metrics.phases import Phases
from harness.runtime import architecture, measure
from harness.runtime.bandwidth import Bandwidth
from harness.runtime.runner import run_runtime
from harness.runtime.stepper import Round, Stepper
from harness.spec import DecodeSpec, MemorySpec, MethodSpec, ModelSpec, RunSpec

SMALL = {"synthetic": True, "prompt": 6, "tokens": 4}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation."


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    entry = ShapeEntry(block="llama", layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=1024)
    monkeypatch.setattr(architecture, "shapes", lambda: {"small": entry})
    monkeypatch.setattr(measure, "measure_bandwidth", lambda device: Bandwidth(10.0, None))


def decoded(method="sage-ptq"):
    run = RunSpec(
        model=ModelSpec(name="small", dtype="bfloat16"),
        method=MethodSpec(name=method),
        calibration=None,
        evaluations=(DecodeSpec(rounds=1, **SMALL),),
    )
    (entry,) = run_runtime(run)["metrics"]
    return entry


@pytest.mark.parametrize(("room", "arms"), [(1.05, {"packed"}), (1.15, {"packed", "dense"})])
def test_the_dense_arm_needs_a_tenth_more_than_its_weights(room, arms, monkeypatch):
    needed = []

    def bytes_of(subject, packed, given=measure._dense_bytes):
        needed.append(given(subject, packed))
        return needed[-1]

    monkeypatch.setattr(measure, "_dense_bytes", bytes_of)
    monkeypatch.setattr(measure, "available_memory", lambda device: room * needed[-1])
    entry = decoded()
    assert entry["arms"].keys() == arms
    assert entry["absent"].keys() == {"packed", "dense"} - arms
    assert (entry["speedup"] is None) == ("dense" not in arms)


def no_room(device, dtype):
    def make(*given):
        raise torch.OutOfMemoryError(FULL)

    return make


def test_a_dense_arm_that_takes_too_much_while_it_is_built_is_absent(monkeypatch):
    monkeypatch.setattr(measure, "dense_products", no_room)
    entry = decoded()
    assert entry["arms"].keys() == {"packed"}
    assert entry["absent"] == {"dense": "does not fit: CUDA out of memory. Tried to allocate 2.00 GiB."}


def test_without_another_arm_too_little_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(measure, "dense_products", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        decoded("fp16")


def test_a_dense_arm_that_takes_too_much_while_it_is_captured_leaves_nothing_behind(monkeypatch):
    def full(*given, graph=False):
        if graph:
            raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(measure, "Stepper", full)
    monkeypatch.setattr(measure, "_decoder", lambda *given: None)
    arms, absent = {"packed": object(), "packed-eager": object()}, {}
    subject = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16, weights=lambda make: None)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    measure._add_dense(arms, absent, subject, DecodeSpec(**SMALL), on_gpu, Phases("cpu"))
    assert arms.keys() == {"packed", "packed-eager"}
    assert absent == {"dense": "does not fit: CUDA out of memory. Tried to allocate 2.00 GiB."}


class Frozen:
    """A stepper that notes whether bands copied while it ran, and how often it did. seconds: of a step."""

    def __init__(self, bands, seconds, captured=None):
        self.bands, self.seconds, self._captured, self.ran = bands, seconds, captured, []
        self.decoder = SimpleNamespace(weights=SimpleNamespace(blocks=[None] * 4))

    def captured(self):
        assert self.bands.frozen
        if self._captured is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self._captured

    def run(self):
        self.ran.append(self.bands.frozen)
        return Round(0.0, [self.seconds] * 2, torch.zeros(1, 3))


@pytest.mark.parametrize("can_be_captured", [True, False])
def test_a_band_is_timed_in_a_graph_where_it_can_be(can_be_captured):
    bands = SimpleNamespace(frozen=False, layers=2, host_bytes=400)
    in_a_graph = Frozen(bands, 0.001)
    eager = Frozen(bands, 0.010, in_a_graph if can_be_captured else None)
    times = measure._band_times(bands, eager, None, Bandwidth(10.0, 1.0))
    assert times.band_decode_ms == pytest.approx(0.5 if can_be_captured else 5.0)  # two of four layers
    assert (in_a_graph if can_be_captured else eager).ran == [True, True]
    assert not bands.frozen


def test_an_arm_alone_that_takes_too_much_while_it_is_captured_runs_without_a_graph(monkeypatch):
    def full(*given, graph=False):
        if graph:
            raise torch.OutOfMemoryError(FULL)
        return "eager"

    monkeypatch.setattr(measure, "Stepper", full)
    monkeypatch.setattr(measure, "_decoder", lambda *given: None)
    arms, absent = {}, {}
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    measure._add_arms(arms, absent, "packed", None, DecodeSpec(**SMALL), on_gpu, None)
    assert arms == {"packed-eager": "eager"}
    assert absent["packed"].startswith("not captured in a graph: CUDA out of memory")


def test_a_captured_stepper_decodes_with_the_same_decoder(monkeypatch):
    made = []
    monkeypatch.setattr(Stepper, "_capture", lambda self: made.append(self))
    eager = Stepper(SimpleNamespace(), torch.zeros(1, 3, dtype=torch.int64), 5)
    captured = eager.captured()
    assert made == [captured]
    assert captured.decoder is eager.decoder and captured._prompt is eager._prompt and captured._steps == 5


class Event:
    """torch.cuda.Event, where there is no device."""

    def __init__(self, enable_timing): ...

    def record(self): ...

    def elapsed_time(self, other):
        return 1.0


def test_what_building_took_is_given_back_before_prefill_is_weighed(tiny_folder, pretended_cuda, monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(measure, "_VOCABULARY", tiny.VOCABULARY)
    run = RunSpec(
        model=ModelSpec(name=str(tiny_folder), dtype="float16", device="cuda"),
        method=MethodSpec(name="fp16"),
        calibration=None,
        evaluations=(MemorySpec(prompt=6, tokens=4),),
    )
    with pretended_cuda:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("given back"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: happened.append("phase"))
        record = run_runtime(run)
    # Before the metric's first phase (load), and again before the second (prefill) and the third.
    assert happened[-5:] == ["given back", "phase", "given back", "phase", "phase"]
    (entry,) = record["metrics"]
    assert entry["linear_bytes"] == entry["dense_bytes"]
    assert entry["activation_bytes"] == 0
