import json
import sys
from pathlib import Path

import pytest
import torch
from pretended_device import on_device

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from harness.catalog import ShapeEntry
from harness.cli import main
from harness.metrics.phases import Phases
from harness.models.blocks import model_linears
from harness.models.load import load_model
from harness.records import RecordStore
from harness.runtime import architecture, measure, products, runner
from harness.runtime.runner import run_runtime
from harness.runtime.synthetic import synthetic_layer
from harness.spec import DecodeSpec, MemorySpec, MethodSpec, ModelSpec, RunSpec
from kernels.errors import InputError, NumericalError
from methods import create_method

SMALL = {"prompt": 6, "tokens": 4}


@pytest.fixture
def small_shapes(monkeypatch):
    """Two layers of each kind of block, under names of their own."""
    size = {"layers": 2, "hidden": 64, "intermediate": 96, "heads": 4, "vocabulary": 1024}
    entries = {
        "small-llama": ShapeEntry(block="llama", kv_heads=2, **size),
        "small-qwen": ShapeEntry(block="llama", kv_heads=2, head_norms=True, **size),
        "small-opt": ShapeEntry(block="opt", tied=True, **size),
    }
    monkeypatch.setattr(architecture, "shapes", lambda: entries)
    monkeypatch.setattr(
        measure, "measure_bandwidth", lambda device: measure.Bandwidth(copy_gb_s=10.0, host_to_device_gb_s=None)
    )


def spec(model="small-llama", method="sage-ptq", evaluations=None, dtype="bfloat16", **options):
    return RunSpec(
        model=ModelSpec(name=model, dtype=dtype),
        method=MethodSpec(name=method, options=options),
        calibration=None,
        evaluations=evaluations or (DecodeSpec(synthetic=True, rounds=2, **SMALL),),
    )


@pytest.mark.parametrize("method", ["fp16", "gptq", "pb-llm", "billm", "binary", "sage-ptq"])
@pytest.mark.parametrize("model", ["small-llama", "small-opt"])
def test_decode_of_every_layout(model, method, small_shapes, tmp_path):
    store = RecordStore(tmp_path)
    run = spec(model, method, **({"group_size": 32} if method == "gptq" else {}))
    store.save(run.key, run_runtime(run))
    record = store.load(run.key)
    assert record is not None and not store.warnings
    (entry,) = record["metrics"]
    assert entry["metric"] == "decode" and entry["synthetic"]
    assert entry["arms"].keys() == ({"dense"} if method == "fp16" else {"packed", "dense"})
    for arm in entry["arms"].values():
        assert len(arm["rounds"]) == 2 and arm["ms_p50"] <= arm["ms_p95"] <= arm["ms_p99"]
        assert arm["share_of_copy"] == pytest.approx(arm["bytes_per_token"] / arm["ms_p50"] / 1e6 / 10.0)
    assert entry["value"] == entry["arms"]["dense" if method == "fp16" else "packed"]["tokens_per_second"]
    assert (entry["speedup"] is None) == (method == "fp16")
    assert 0 <= entry["correctness"]["relative_error"] <= 1e-2
    if method != "fp16":
        assert set(entry["kernels"].values()) == {"CpuMatrix"}
        assert entry["arms"]["packed"]["bytes_per_token"] < entry["arms"]["dense"]["bytes_per_token"]


def test_memory_counts_what_the_ledger_counts(small_shapes):
    run = spec(evaluations=(MemorySpec(synthetic=True, **SMALL),))
    record = run_runtime(run)
    (entry,) = record["metrics"]
    assert entry["ledger_bytes"] == record["ledger"]["payload_bytes"]
    assert entry["linear_bytes"] == pytest.approx((1 + entry["over_ledger"]) * entry["ledger_bytes"])
    assert entry["other_bytes"] == record["ledger"]["other_bytes"]
    assert entry["value"] == entry["linear_bytes"] + entry["other_bytes"]
    assert entry["dense_bytes"] == 2 * record["ledger"]["weights"]
    assert (
        entry["kv_cache_bytes"] == 2 * 2 * 2 * 64 * 16 * 2
    )  # two layers, two heads, 64 positions, 16 numbers, bfloat16
    assert entry["phases"].keys() == {"load", "prefill", "decode"}


def test_the_phase_of_decoding_has_no_prefill_in_it(small_shapes, monkeypatch):
    prompts, read = [], measure.Decoder.prefill
    monkeypatch.setattr(measure.Decoder, "prefill", lambda self, prompt: prompts.append(prompt) or read(self, prompt))
    run_runtime(spec(evaluations=(MemorySpec(synthetic=True, **SMALL),)))
    assert len(prompts) == 1


def test_memory_of_the_dense_runtime_is_that_of_dense_weights(small_shapes):
    record = run_runtime(spec(evaluations=(MemorySpec(synthetic=True, runtime="dense", **SMALL),)))
    (entry,) = record["metrics"]
    assert entry["linear_bytes"] == entry["dense_bytes"]


def test_a_product_that_is_wrong_is_not_timed(small_shapes, monkeypatch):
    monkeypatch.setitem(measure.TOLERANCE, torch.bfloat16, 1e-9)
    with pytest.raises(NumericalError, match=r"qkv: relative error .* against decode"):
        run_runtime(spec())


@pytest.mark.parametrize("batch", [1, 3])
def test_the_product_that_is_timed_is_the_one_that_is_checked(batch, small_shapes, monkeypatch):
    right = products.PackedProduct.__call__

    def wrong_in_one_row(self, inputs):
        out = right(self, inputs)
        if len(inputs) == batch:
            out[:, 3] += 0.2 * out.square().mean().sqrt()
        return out

    monkeypatch.setattr(products.PackedProduct, "__call__", wrong_in_one_row)
    monkeypatch.setitem(measure.TOLERANCE, torch.float32, 2e-2)  # the norm hides one row in 128
    with pytest.raises(NumericalError, match=r"qkv: relative error"):
        run_runtime(spec(evaluations=(DecodeSpec(synthetic=True, batch=batch, **SMALL),), dtype="float32"))


def test_the_synthetic_ledger_is_that_of_one_block_times_the_blocks(small_shapes):
    record = run_runtime(spec("small-qwen", "gptq", bits=3, group_size=32))
    a = architecture.catalogued("small-qwen")
    method = create_method("gptq", bits=3, group_size=32)
    layer = synthetic_layer(a, method, torch.device("cpu"))
    assert record["ledger"]["payload_bytes"] == 2 * sum(weight.nbytes() for weight in layer.values())
    assert sum(record["ledger"]["bytes_by_role"].values()) == record["ledger"]["payload_bytes"]
    assert record["ledger"]["nominal_weight_bits"] == pytest.approx(3)


def test_banded_needs_a_gpu(small_shapes):
    run = spec(evaluations=(DecodeSpec(synthetic=True, runtime="banded", **SMALL),))
    with pytest.raises(InputError, match="--runtime banded needs a CUDA device, not cpu"):
        run_runtime(run)


def test_a_model_of_ones_own_is_quantized_and_decoded(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        measure, "measure_bandwidth", lambda device: measure.Bandwidth(copy_gb_s=10.0, host_to_device_gb_s=None)
    )
    monkeypatch.setattr(measure, "_VOCABULARY", tiny.VOCABULARY)
    monkeypatch.setenv("COLUMNS", "200")
    command = ["decode", "--model", str(model_folder), "--methods", "fp16", "sage-ptq", "--prompt", "5"]
    command += ["--tokens", "3", "--rounds", "1", "--dtype", "float32", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "packed" in shown and "copy 10.0 GB/s" in shown
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "runs").glob("*.json"))]
    assert len(records) == 3  # fp16, and SAGE-PTQ with two index widths
    assert all(record["metrics"][0]["correctness"]["relative_error"] <= 1e-5 for record in records)
    assert main(command) == 0
    assert "finished before" in capsys.readouterr().out


def source_of(run, pretended_cuda, made):
    with pretended_cuda:
        method = create_method(run.method.name, **run.method.options)
        return made(run, method, Phases("cuda"), False, lambda done, total, what: None)


def test_what_random_weights_are_made_of_does_not_stay_on_the_device(small_shapes, pretended_cuda, monkeypatch):
    def drawn(shapes, method, device):  # no generator draws on a pretended device
        found = synthetic_layer(shapes, method, torch.device("cpu"))
        return {name: weight.to(device) for name, weight in found.items()}

    monkeypatch.setattr(runner, "synthetic_layer", drawn)
    run = spec("small-llama")
    run = run.model_copy(update={"model": run.model.model_copy(update={"device": "cuda"})})
    source = source_of(run, pretended_cuda, runner._synthetic)
    assert not any(on_device(tensor) for weight in source.layer.values() for tensor in weight.tensors().values())


@pytest.mark.parametrize("method", ["fp16", "rtn"])
def test_the_model_that_was_quantized_does_not_stay_beside_its_packed_weights(
    method, tiny_folder, pretended_cuda, monkeypatch
):
    loaded = []
    monkeypatch.setattr(runner, "load_model", lambda *given: loaded.append(load_model(*given)) or loaded[0])
    options = {"bits": 3, "group_size": 32} if method == "rtn" else {}
    run = RunSpec(
        model=ModelSpec(name=str(tiny_folder), dtype="float16", device="cuda"),
        method=MethodSpec(name=method, options=options),
        calibration=None,
        evaluations=(MemorySpec(**SMALL),),
    )
    source = source_of(run, pretended_cuda, runner._real)
    model = loaded[0].model
    assert all(linear.weight.numel() == 0 for linear in model_linears(model).values())
    assert on_device(model.get_input_embeddings().weight)
    assert not any(on_device(tensor) for weight in source.layer.values() for tensor in weight.tensors().values())
    assert source.ledger["resident_bytes"]["evaluated_dense"] > source.ledger["total_bytes"] // 2
    with pretended_cuda:
        dense = measure.dense_products(torch.device("cuda"), torch.float16)
        for _ in range(2):  # several evaluations of a run share the source
            made = source.weights(dense)
            assert all(on_device(product.weight) for block in made.blocks for product in block.products.values())


def test_speed_and_memory_of_one_run_are_measured_on_the_same_weights(tiny_folder, monkeypatch):
    monkeypatch.setattr(measure, "measure_bandwidth", lambda device: measure.Bandwidth(10.0, None))
    monkeypatch.setattr(measure, "_VOCABULARY", tiny.VOCABULARY)
    run = RunSpec(
        model=ModelSpec(name=str(tiny_folder), dtype="bfloat16"),
        method=MethodSpec(name="rtn", options={"bits": 3, "group_size": 32}),
        calibration=None,
        evaluations=(DecodeSpec(rounds=1, **SMALL), MemorySpec(**SMALL), MemorySpec(runtime="dense", **SMALL)),
    )
    record = run_runtime(run)
    speed, packed, dense = record["metrics"]
    assert speed["correctness"]["relative_error"] <= 1e-2
    assert packed["ledger_bytes"] == record["ledger"]["payload_bytes"]
    assert dense["linear_bytes"] == packed["dense_bytes"] == 2 * record["ledger"]["weights"]


def test_a_model_that_changed_after_planning_is_refused(tiny_folder):
    run = RunSpec(
        model=ModelSpec(name=str(tiny_folder), dtype="bfloat16", content="0" * 16),
        method=MethodSpec(name="fp16"),
        calibration=None,
        evaluations=(MemorySpec(**SMALL),),
    )
    with pytest.raises(InputError, match="planned with 0000000000000000"):
        run_runtime(run)


def test_too_long_a_generation_is_refused(model_folder, tmp_path, capsys):
    command = ["decode", "--model", str(model_folder), "--methods", "fp16", "--prompt", "100", "--tokens", "100"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "prompt 100 and 100 tokens are more than the 128 positions" in capsys.readouterr().err


def test_a_band_without_the_banded_runtime_is_refused(tmp_path, capsys):
    assert main(["decode", "--synthetic", "llama-2-7b", "--band", "4", "--out", str(tmp_path)]) == 2
    assert "--band 4 is for --runtime banded" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["decode", "memory"])
def test_an_unknown_device_is_refused(verb, tmp_path, capsys):
    assert main([verb, "--synthetic", "llama-2-7b", "--device", "cpuu", "--out", str(tmp_path)]) == 2
    assert "device 'cpuu' is unknown; use cpu, cuda or cuda:N" in capsys.readouterr().err
