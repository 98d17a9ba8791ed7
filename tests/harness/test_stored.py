"""Quantized models as rows: measured as they are, payload counted from their files."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from harness.checkpoint.exports import export_checkpoint
from harness.cli import main, reproduce
from harness.models.source import resolve_model
from harness.models.stored import load_stored, stored_format, stored_size
from harness.records import RecordStore
from harness.spec import ModelSpec, PerplexitySpec
from harness.stored import plan_stored, run_stored
from kernels.errors import InputError


@pytest.fixture
def checkpoint(tiny_folder, corpus_file, tmp_path):
    """A packed checkpoint of 4 bits in groups of 32."""
    arguments = ["--option", "bits=4", "group_size=32", "--profile", "embedded", "--device", "cpu"]
    arguments += ["--calibration-corpus", str(corpus_file), "--context", "32", "--calibration-samples", "4"]
    out = tmp_path / "checkpoint"
    assert main(["quantize", "--model", str(tiny_folder), "--method", "rtn", "--out", str(out), *arguments]) == 0
    return out


@pytest.fixture
def table(corpus_file, experiment_file, tmp_path):
    """The command line of a table on the models given."""
    experiment = experiment_file(figures=["pareto", "bits-by-role", "layer-errors", "claimed-measured"])
    return lambda *models: [
        "--experiment", str(experiment), *(part for model in models for part in ("--model", str(model))),
        "--corpus", str(corpus_file), "--context", "32", "--windows", "3", "--calibration-samples", "4",
        "--calibration-corpus", str(corpus_file), "--profile", "embedded", "--device", "cpu",
        "--out", str(tmp_path / "results"),
    ]  # fmt: skip


def linear_bytes(folder):
    tensors = load_file(folder / "model.safetensors")
    inside = [t for name, t in tensors.items() if "proj" in name and not name.endswith("bias")]
    return sum(tensor.numel() * tensor.element_size() for tensor in inside)


def test_a_packed_checkpoint_is_a_row_beside_the_rows_of_another_model(table, checkpoint, tiny_folder, tmp_path):
    assert reproduce(table(tiny_folder, checkpoint)) == 0
    records = RecordStore(tmp_path / "results" / "runs").load_all()
    (stored,) = [record for record in records.values() if record["method"]["name"] == "sagebench"]
    assert stored["metrics"][0]["windows"] == 3
    assert stored["ledger"]["payload_bytes"] == linear_bytes(checkpoint)
    written = json.loads((checkpoint / "ledger.json").read_text(encoding="utf-8"))
    assert stored["ledger"]["payload_bits"] == pytest.approx(written["payload_bits"])
    assert stored["ledger"]["bytes_by_role"] == written["bytes_by_role"]
    assert len(records) == 4  # the unquantized model and its two rows, and this one
    shown = (tmp_path / "results" / "tables" / "small.md").read_text(encoding="utf-8")
    assert "SAGEBENCH" in shown
    assert "rtn, as stored" in shown
    # Nobody says what the bits of a stored model should be: its marks have no hollow partner, and are drawn.
    drawn = " ".join(path.name for path in (tmp_path / "results" / "figures").glob("*.pdf"))
    assert all(name in drawn for name in ("pareto", "bits-by-role", "claimed-measured"))


def test_a_stored_row_measures_what_the_run_that_made_it_measured(table, tiny_folder, tmp_path):
    assert reproduce([*table(tiny_folder), "--save"]) == 0
    records = RecordStore(tmp_path / "results" / "runs").load_all()
    key = next(key for key, record in records.items() if record["method"]["name"] == "gptq")
    assert reproduce(table(tmp_path / "results" / "checkpoints" / key)) == 0
    after = RecordStore(tmp_path / "results" / "runs").load_all()
    (stored,) = [record for record in after.values() if record["method"]["name"] == "sagebench"]
    assert stored["metrics"][0]["window_nll"] == records[key]["metrics"][0]["window_nll"]
    assert stored["ledger"]["payload_bytes"] == records[key]["ledger"]["payload_bytes"]


def test_what_is_stored_is_measured_as_it_is_and_within_its_positions(gguf_file, corpus_file):
    asked = ModelSpec(name=str(gguf_file), reparameterize=True, seed=3)
    planned = plan_stored(asked, (PerplexitySpec(corpus=str(corpus_file), context=256),))
    assert (planned.run.model.reparameterize, planned.run.model.seed) == (False, 0)
    with pytest.raises(InputError, match=r"context 256 is longer than the 128 positions of model"):
        run_stored(planned.run)


def test_a_gguf_file_is_a_source_for_methods_and_a_row_of_its_own(gguf_file):
    source = resolve_model(str(gguf_file))
    assert stored_format(source)[:2] == ("gguf", "Q4_1")
    size = stored_size(source, None)
    assert 8 * size.payload["code"] / size.weights == 5.0
    model = load_stored(source, "float32", "cpu").model
    with torch.inference_mode():
        assert torch.isfinite(model(tiny.tokens()).logits).all()


def test_a_gguf_file_is_measured_as_it_is_beside_the_methods_that_start_from_it(table, gguf_file, tmp_path):
    assert reproduce(table(gguf_file)) == 0
    records = {r["method"]["name"]: r for r in RecordStore(tmp_path / "results" / "runs").load_all().values()}
    stored, dense = records["gguf"], records["fp16"]
    assert len(records) == 4
    assert stored["ledger"]["payload_bits"] == 5.0  # Q4_1: 4 bits and two 16-bit constants for 32 weights
    assert stored["metrics"][0]["windows"] == 3
    # The same weights; the unquantized row has them rounded to 16 bits.
    assert stored["metrics"][0]["value"] == pytest.approx(dense["metrics"][0]["value"], rel=1e-3)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_bits_of_foreign_formats_are_counted_from_their_files(checkpoint, tmp_path, format):
    export_checkpoint(checkpoint, tmp_path / "theirs", format)
    source = resolve_model(str(tmp_path / "theirs"))
    assert stored_format(source) == (format, "4 bit g32", 4.0)
    size = stored_size(source, AutoConfig.from_pretrained(tmp_path / "theirs"))
    assert sum(size.payload.values()) == linear_bytes(tmp_path / "theirs")
    assert size.payload["code"] == size.weights // 2
    assert size.payload["scale"] == size.weights // 32 * 2
    assert size.payload["zero"] == size.weights // 32 // 2
    total = (tmp_path / "theirs" / "model.safetensors").stat().st_size
    assert 0 < total - sum(size.payload.values()) - size.other < 30_000  # the file's header


def test_a_quantized_model_is_not_quantized_again(checkpoint, tmp_path, capsys):
    assert main(["quantize", "--model", str(checkpoint), "--method", "rtn", "--out", str(tmp_path / "twice")]) == 2
    assert "is already quantized (sagebench); give the unquantized model" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "library"), [("gptq", "gptqmodel"), ("awq", "gptqmodel")])
def test_a_library_that_is_not_installed_is_named(checkpoint, tmp_path, monkeypatch, method, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    export_checkpoint(checkpoint, tmp_path / "theirs", "gptq")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["quant_method"] = method
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=f"needs the package {library}"):
        load_stored(resolve_model(str(tmp_path / "theirs")), "float32", "cpu")


def test_a_format_that_nothing_here_reads_is_named(model_folder):
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "aqlm"}
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="quantized by 'aqlm'; what can be measured as it is: gptq, awq"):
        stored_format(resolve_model(str(model_folder)))
