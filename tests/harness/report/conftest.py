"""A small table that never ran: every measured number below is made up, and round so that nobody mistakes it."""

from __future__ import annotations

from typing import Any

import pytest

from harness.claims import load_claims
from harness.plan import PlannedRow, TablePlan

PROVENANCE = {"paper": "", "code": "", "parity": "", "reconstruction": False}


def build_record(
    key: str,
    method: str,
    perplexity: float,
    *,
    dataset: str = "wikitext2",
    windows: int = 12,
    calibrated: bool = True,
    reconstruction: bool = False,
    quantized_source: bool = True,
    reparameterize: bool = False,
    bits: tuple[float, float, float] = (3.0, 0.25, 3.5),
) -> dict[str, Any]:
    """A synthetic record in the form that a run writes."""
    return {
        "format": 1,
        "key": key,
        "spec": {
            "model": {
                "name": "toy-model", "dtype": "float32", "device": "cpu", "reparameterize": reparameterize,
            },
            "method": {"name": method, "options": {}},
            "calibration": {"corpus": "c4-sample", "samples": 4, "context": 64, "seed": 0} if calibrated else None,
        },
        "model": {
            "name": "toy-model",
            "source_precision": {"quantized": quantized_source, "format": "Q4_1", "bits": 5.0, "detail": ""},
        },
        "method": {"name": method, "provenance": {**PROVENANCE, "reconstruction": reconstruction}},
        "metrics": [
            {
                "metric": "perplexity", "corpus": dataset, "dataset": dataset, "value": perplexity, "nll": 3.0,
                "nll_stderr": 0.05, "windows": windows, "windows_available": 148, "context": 2048, "dtype": "float32",
            }
        ],
        "ledger": {
            "nominal_weight_bits": bits[0], "nominal_scale_bits": bits[1], "payload_bits": bits[2],
            "total_bytes": 1_500_000,
        },
        "warnings": [],
    }  # fmt: skip


def build_planned(
    method: str, setting: str, key: str | None, *, model: str = "toy-model", note: str = ""
) -> PlannedRow:
    """A row of the plan with the method's name in capitals as its label."""
    return PlannedRow(method, setting, method.upper(), model, "OPT", key, note)


@pytest.fixture
def make_record():
    """`build_record`, for tests that need a record of their own."""
    return build_record


@pytest.fixture
def planned():
    """`build_planned`, for tests that need a row of their own."""
    return build_planned


@pytest.fixture(scope="session")
def claims():
    return load_claims()


@pytest.fixture
def records():
    return {
        "k-fp16": build_record("k-fp16", "fp16", 20.0, calibrated=False, bits=(16.0, 0.0, 16.0)),
        "k-gptq": build_record("k-gptq", "gptq", 40.0),
        "k-sage": build_record("k-sage", "sage-ptq", 30.0, calibrated=False, reconstruction=True),
    }


@pytest.fixture
def plan():
    return TablePlan(
        name="table1",
        item="table 1",
        title="Table 1: a synthetic example",
        metric="perplexity",
        datasets=("wikitext2",),
        rows=(
            build_planned("fp16", "16 bit", "k-fp16"),
            build_planned("gptq", "3 bit g128", "k-gptq"),
            build_planned("gptq", "2 bit g128", "k-lost"),
            build_planned("billm", "block 128", None, note="method not registered"),
            build_planned("sage-ptq", "n_lut 4", "k-sage"),
            build_planned("gptq", "3 bit g128", None, model="OPT-66B", note="not run: profile embedded"),
        ),
        notes=("Profile embedded",),
    )
