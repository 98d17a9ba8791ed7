"""Checkpoints of other tools as rows of a table: loaded by their own library, counted from their files."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("gptqmodel")
pytest.importorskip("compressed_tensors")
pytest.importorskip("harness")


ROWS = {
    "gptq": ("rtn-4-symmetric", "gptq"),
    "gptq_v2": ("rtn-3", "gptq_v2"),
    "awq": ("awq-4", "awq"),
    "compressed-tensors": ("rtn-4", "compressed-tensors"),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_foreign_checkpoint_computes_what_ours_does(case, row):
    from harness.models.source import resolve_model
    from harness.models.stored import load_stored

    made = case(*ROWS[row])
    loaded = load_stored(resolve_model(str(made.folder)), "float16", "cpu")
    with torch.inference_mode():
        made.check_logits(loaded.model(input_ids=made.tokens).logits)


@pytest.mark.parametrize("row", ROWS)
def test_a_foreign_checkpoint_is_a_row(case, row, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from harness.cli import reproduce

    made = case(*ROWS[row])
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))
    text = Path(os.environ["SAGEBENCH_PEERS"]) / "story.txt"
    arguments = ["--table", "1", "--model", str(made.folder), "--corpus", str(text), "--context", "32"]
    arguments += ["--calibration-samples", "4", "--calibration-corpus", str(text), "--profile", "embedded"]
    arguments += ["--windows", "3", "--device", "cpu", "--dtype", "float16", "--out", str(tmp_path)]
    assert reproduce(arguments) == 0
    (path,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["method"]["name"] == row.removesuffix("_v2")
    assert record["metrics"][0]["windows"] == 3
    assert record["metrics"][0]["value"] > 1
    tensors = load_file(made.folder / "model.safetensors")
    linears = sum(t.numel() * t.element_size() for name, t in tensors.items() if "_proj." in name)
    assert record["ledger"]["payload_bytes"] == linears
    assert record["ledger"]["payload_bits"] == 8 * linears / record["ledger"]["weights"]
