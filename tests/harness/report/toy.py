"""Experiments of the paper with made-up records of a toy model, for tests of what is drawn and laid out."""

from __future__ import annotations

from typing import Any

from harness.claims import load_claims
from harness.experiments import load_experiment
from harness.plan import PlannedRow, TablePlan
from harness.report.figures.source import Source

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
BLOCKS = 4
PAYLOAD = {"fp16": 16.0, "gptq": 3.16, "awq": 3.17, "pb-llm": 3.01, "billm": 2.95, "sage-ptq": 4.07, "sage-x": 2.2}
NOMINAL = {"fp16": 16.0, "gptq": 3.0, "awq": 3.0, "pb-llm": 1.7, "billm": 1.09, "sage-ptq": 1.04, "sage-x": 2.2}


def record(key: str, method: str, options: dict[str, Any], datasets: tuple[str, ...], place: int) -> dict[str, Any]:
    """A record in the form that a run writes; every number is made up."""
    unquantized = method == "fp16"
    bits = PAYLOAD[method] + options.get("n_lut", 3) - 3
    metrics: list[dict[str, Any]] = []
    for number, name in enumerate(datasets):
        level = 20.0 * (1 if unquantized else 1.4**place) * (1 + 0.3 * number)
        common = {"corpus": name, "dataset": name, "windows": 12, "windows_available": 148, "context": 2048}
        metrics.append({"metric": "perplexity", "value": level, "nll": 3.0, "nll_stderr": 0.08, **common})
        kl = {"metric": "divergence", "value": 1e-5 if unquantized else 0.3 * place, "stderr": 0.01 * (place + 1e-4)}
        metrics.append({**kl, **common, "dtype": "float32", "reference_dtype": "float32"})
    if not datasets:
        metrics = [decode(unquantized), {"metric": "memory", "dataset": "decode", "value": int(1e8 * bits / 5)}]
    layers = [
        {
            "name": f"model.layers.{block}.self_attn.{kind}", "block": block, "shape": [64, 64],
            "relative_error": 0.0 if unquantized else 0.01 * (1 + block + number),
            "proxy_loss": None, "payload_bits": bits, "seconds": 0.1,
            "facts": {"groups": 5 + (block + number) % 3, "salient_fraction": 0.01 + 0.002 * number}
            if method == "sage-ptq" else {},
        }
        for block in range(BLOCKS)
        for number, kind in enumerate(KINDS)
    ]  # fmt: skip
    weights = 1_000_000
    roles = {"index": 0.7, "sign": 0.2, "scale": 0.1} if method == "sage-ptq" else {"code": 0.9, "scale": 0.1}
    counts = [0] * 50
    counts[20:30] = [20, 40, 60, 80, 100, 100, 80, 60, 40, 20]
    return {
        "format": 1,
        "key": key,
        "created": "2026-01-01T00:00:00Z",
        "spec": {
            "model": {"name": "toy-model", "dtype": "float32", "device": "cpu", "reparameterize": False},
            "method": {"name": method, "options": options},
            "calibration": None,
        },
        "model": {"name": "toy-model", "parameters": 130_000_000, "source_precision": {}},
        "method": {"name": method, "options": {"max_salient": 0.01, **options}, "provenance": {}},
        "environment": {"cpu": "Some CPU", "threads": 2, "gpus": []},
        "metrics": metrics,
        "ledger": {
            "weights": weights, "nominal_weight_bits": NOMINAL[method],
            "nominal_scale_bits": 0.0 if unquantized else 0.02,
            "payload_bits": bits, "payload_bytes": int(bits * weights / 8), "total_bytes": int(bits * 2e7),
            "bytes_by_role": {role: int(share * bits * weights / 8) for role, share in roles.items()},
            "artifact_bytes": int(bits * 2.1e7), "resident_bytes": {"packed": int(bits * 2e7)},
        },
        "layers": layers,
        "phases": {"quantize": {"seconds": 60.0 + place, "peak_bytes": 2_000_000_000}},
        **(
            {
                "weights": {
                    layer["name"]: {
                        "mean": 0.0, "std": 0.02, "counts": counts, "below": 1, "above": 2,
                        "kl": 0.001 * (1 + number), "excess_kurtosis": 1.0,
                    }
                    for number, layer in enumerate(layers)
                }
            }
            if unquantized else {}
        ),
        "warnings": [],
    }  # fmt: skip


def decode(unquantized: bool) -> dict[str, Any]:
    """What harness.metrics.decode writes of a run."""
    arms = (
        {"dense": (30.0, 270_000_000)} if unquantized else {"packed": (55.0, 110_000_000), "dense": (29.0, 270_000_000)}
    )
    value = next(iter(arms.values()))[0]
    return {
        "metric": "decode", "dataset": "batch 1, prompt 1984, 64 tokens", "value": value,
        "device": "Some GPU", "dtype": "float16",
        "runtime": "resident", "synthetic": False, "batch": 1, "prompt": 1984, "tokens": 64, "threads": 2,
        "arms": {
            name: {
                "tokens_per_second": speed, "iqr": [0.95 * speed, 1.04 * speed], "time_to_first_token_ms": 400.0,
                "ms_p50": 1e3 / speed, "ms_p95": 1.1e3 / speed, "ms_p99": 1.2e3 / speed, "bytes_per_token": size,
                "effective_gb_s": speed * size / 1e9, "share_of_copy": speed * size / 12e9, "rounds": [speed] * 7,
            }
            for name, (speed, size) in arms.items()
        },
        "speedup": None, "token_latency_ms": 1e3 / value, "copy_gb_s": 12.0, "roofline_tokens_per_second": 109.0,
        "correctness": {"worst": 1e-4, "tolerance": 1e-3}, "kernels": {}, "absent": {}, "bands": None,
    }  # fmt: skip


def source(name: str, model: str = "toy-model") -> Source:
    """The experiment `name` run on the toy model, with the paper's models not run."""
    experiment = load_experiment(name)
    rows, records = [], {}
    for place, row in enumerate(experiment.rows):
        if row.method not in PAYLOAD:  # the paper's alone
            rows.append(PlannedRow(row.method, row.setting, row.label, model, None, None, "method not registered"))
            continue
        key = f"key-{place:02d}"
        rows.append(PlannedRow(row.method, row.setting, row.label, model, None, key, row.note))
        records[key] = record(key, row.method, row.options, experiment.corpora, place)
    plan = TablePlan(
        name=experiment.name,
        item=experiment.item,
        title=experiment.title,
        metric=experiment.metric,
        datasets=experiment.corpora or ("decode",),
        rows=tuple(rows),
        notes=("Profile: made up.",),
        figures=experiment.figures,
    )
    return Source(plan, records, load_claims())
