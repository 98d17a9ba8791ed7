"""`sagebench decode` and `memory`: which finished records are used again, and what is said of them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from harness import environment, planning, sweep
from harness.catalog import ShapeEntry
from harness.cli import main
from harness.experiments import load_profile
from harness.planning import Choices
from harness.runtime import architecture, command, measure
from harness.runtime.bandwidth import Bandwidth
from harness.spec import RunSpec

PUBLISHED = Path(__file__).parents[3] / "results" / "published"


@pytest.fixture
def decode(monkeypatch, tmp_path, capsys):
    """Run `sagebench decode` of a small shape; returns what it printed."""
    entry = ShapeEntry(block="llama", layers=1, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=1024)
    monkeypatch.setattr(architecture, "shapes", lambda: {"small": entry})
    rates = iter(range(10, 100))
    monkeypatch.setattr(measure, "measure_bandwidth", lambda device: Bandwidth(float(next(rates)), None))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SAGEBENCH_CPU", raising=False)
    line = ["decode", "--synthetic", "small", "--methods", "fp16", "billm", "--prompt", "5", "--tokens", "3"]
    line += ["--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "out")]

    def run():
        assert main(line) == 0
        return capsys.readouterr().out

    return run


def with_another_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)


def with_another_instruction_set(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CPU", "torch" if command.chosen() == "plain" else "plain")


def on_another_device(monkeypatch):
    given = command.run_conditions
    monkeypatch.setattr(command, "run_conditions", lambda device: {**given(device), "cpu": "Another CPU"})


def test_finished_records_are_used_again(decode):
    assert "finished before" not in decode()
    shown = decode()
    assert shown.count("finished before") == 2
    assert "warning" not in shown


@pytest.mark.parametrize("changed", [with_another_thread, with_another_instruction_set, on_another_device])
@pytest.mark.parametrize("metric", ["decode", "memory"])
def test_records_made_under_other_conditions_are_not(metric, changed, monkeypatch):
    monkeypatch.delenv("SAGEBENCH_CPU", raising=False)

    def key():
        (spec,) = command.plan_runtime(metric, plain_arguments()).values()
        return spec.key

    before = key()
    assert key() == before
    changed(monkeypatch)
    assert key() != before


def plain_arguments(**changes):
    values = {
        "synthetic": "llama-2-7b", "model": "smollm2-135m", "device": "cpu", "dtype": None, "methods": ["fp16"],
        "runtime": "resident", "band": None, "batch": 1, "prompt": 5, "tokens": 3, "rounds": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_records_of_another_runtime_are_used_with_a_warning(decode, monkeypatch):
    decode()
    monkeypatch.setattr(sweep, "runtime_fingerprint", lambda: "0" * 16)
    shown = decode()
    assert shown.count("warning: fp16() on small: measured with other code than this; --fresh repeats it") == 1
    assert shown.count("warning: billm() on small: measured with other code") == 1


def test_warnings_of_the_sweep_are_shown(decode, tmp_path):
    decode()
    next((tmp_path / "out" / "runs").glob("*.json")).write_text("{", encoding="utf-8")
    shown = decode()
    assert "warning: record" in shown and "is corrupt" in shown and "the run is repeated" in shown


def test_a_machine_is_named_once_with_the_range_of_its_copies(decode):
    (line,) = [line for line in decode().splitlines() if "measured copy" in line]
    assert line.endswith("threads; measured copy 10.0 to 11.0 GB/s")


def test_every_machine_of_the_rows_is_named():
    def record(device, **more):
        return {"metrics": [{"device": device, "dtype": "float16", "dataset": "batch 1", **more}]}

    copies = [record(name, threads=2, copy_gb_s=rate) for name, rate in (("A", 10.0), ("B", 20.0), ("A", 10.0))]
    assert command._machines(copies) == [
        "A, float16, batch 1, 2 threads; measured copy 10.0 GB/s",
        "B, float16, batch 1, 2 threads; measured copy 20.0 GB/s",
    ]
    assert command._machines([record("A"), record("A"), record("B")]) == ["A, float16, batch 1", "B, float16, batch 1"]


def test_the_keys_of_plans_without_conditions_are_what_they_were():
    kept = {}
    for file in PUBLISHED.glob("*/runs/*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if any(part["metric"] in ("decode", "memory") for part in record["metrics"]):
            spec = RunSpec.model_validate_json(json.dumps(record["spec"]))
            assert spec.model_dump(mode="json") == record["spec"]
            kept[record["key"]] = spec.key
    assert kept and all(key == now for key, now in kept.items())


def test_conditions_are_part_of_the_record_and_of_the_key():
    (spec,) = command.plan_runtime("memory", plain_arguments()).values()
    (evaluation,) = spec.evaluations
    assert {"cpu", "threads", "device", "instruction_set", "packages"} <= evaluation.conditions.keys()
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    without = spec.model_copy(update={"evaluations": (evaluation.model_copy(update={"conditions": None}),)})
    assert without.key != spec.key
    assert "conditions" not in without.model_dump_json()


def test_a_model_of_the_users_has_a_checksum_as_in_tables(tiny_folder, tmp_path):
    gguf = tiny.write_gguf(tmp_path / "own.gguf")
    for name in (str(gguf), str(tiny_folder)):
        before = content_of(name)
        tables, _ = planning._model_spec(name, Choices(device="cpu"), load_profile("embedded"))
        assert before == tables.content is not None
    before = content_of(str(gguf))
    gguf.write_bytes(gguf.read_bytes() + b"\0" * 32)
    assert content_of(str(gguf)) != before


def content_of(name):
    (spec,) = command.plan_runtime("decode", plain_arguments(synthetic=None, model=name)).values()
    return spec.model.content


def test_the_runtime_has_a_fingerprint_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    monkeypatch.setattr(environment, "code_fingerprint", lambda: "quality")
    file = tmp_path / "harness" / "runtime" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text("one", encoding="utf-8")
    before = environment.runtime_fingerprint.__wrapped__()
    assert environment.runtime_fingerprint.__wrapped__() == before
    file.write_text("two", encoding="utf-8")
    edited = environment.runtime_fingerprint.__wrapped__()
    assert edited != before
    monkeypatch.setattr(environment, "code_fingerprint", lambda: "edited")  # kernels, among others
    assert environment.runtime_fingerprint.__wrapped__() != edited


def test_the_version_of_triton_is_recorded_where_it_is_installed():
    triton = pytest.importorskip("triton")
    assert environment.environment_record()["packages"]["triton"] == triton.__version__


class Nvml:
    """The package pynvml, on a machine whose driver answers or does not."""

    def __init__(self, version=None):
        self._version = version

    def nvmlInit(self):
        if self._version is None:
            raise RuntimeError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self):
        return self._version


@pytest.mark.parametrize(
    ("nvml", "driver"),
    [(Nvml("570.1"), "570.1"), (Nvml(b"535.2"), "535.2"), (Nvml(), None), (None, None)],
    ids=["text", "bytes", "no driver", "no package"],
)
def test_the_driver_of_the_gpus_is_recorded_where_nvml_knows_it(nvml, driver, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    record = environment.environment_record()
    assert (record["gpus"], record["gpu_driver"]) == (["GPU"], driver)


def test_nvml_is_not_asked_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("570.1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert environment.environment_record()["gpu_driver"] is None
