"""Every registered method: what is saved is what the ledger says, and what is loaded is what was measured."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.checkpoint.files import weight_files
from harness.checkpoint.read import load_checkpoint, verify_checkpoint
from harness.cli import main
from harness.models import load
from harness.models.load import load_model
from kernels.linear import PackedLinear
from methods import Refinement
from methods.registry import method_names

ROOT = Path(__file__).resolve().parents[3]
every_method = pytest.mark.parametrize("name", method_names())


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).logits


def stored(folder):
    """All tensors of a checkpoint by name."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def linear_bytes(folder):
    """Bytes of the tensors that belong to packed layers."""
    layers = verify_checkpoint(folder).layers
    tensors = stored(folder)
    unquantized = verify_checkpoint(folder).unquantized
    inside = [name for name in tensors if name.rpartition(".")[0] in layers and name not in unquantized]
    return sum(tensors[name].numel() * tensors[name].element_size() for name in inside)


def same_tensors(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@every_method
def test_a_reloaded_model_gives_the_bits_of_the_model_in_memory(name, save, tiny_folder):
    saved = save(name, tiny_folder)
    loaded = AutoModelForCausalLM.from_pretrained(saved.folder)
    assert torch.equal(logits(loaded, saved.tokens), saved.packed_logits)
    assert torch.equal(logits(load_checkpoint(saved.folder, dequantize=True), saved.tokens), saved.logits)
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert linear_bytes(saved.folder) == saved.record["ledger"]["payload_bytes"]
    loaded.save_pretrained(saved.folder.parent / "again")
    assert same_tensors(stored(saved.folder.parent / "again"), stored(saved.folder))
    verify_checkpoint(saved.folder.parent / "again")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_of_models_comes_back(family, save, tmp_path):
    saved = save("rtn", tiny.save(tmp_path / "model", family))
    assert torch.equal(logits(load_checkpoint(saved.folder), saved.tokens), saved.packed_logits)
    assert torch.equal(logits(load_checkpoint(saved.folder, dequantize=True), saved.tokens), saved.logits)


def test_gains_that_were_trained_outside_the_blocks_are_stored(save, tiny_folder, monkeypatch):
    name = "model.norm.weight"
    trained = (torch.arange(tiny.HIDDEN) / 7).half()
    monkeypatch.setattr("methods.sage_x.method.distill", lambda view, targets: Refinement({}, {name: trained}))
    saved = save("sage-x", tiny_folder, tuning="model", without=["allocation", "weighting"])
    assert torch.equal(stored(saved.folder)[name].float(), trained.float())
    assert torch.equal(logits(load_checkpoint(saved.folder), saved.tokens), saved.packed_logits)
    assert torch.equal(logits(load_checkpoint(saved.folder, dequantize=True), saved.tokens), saved.logits)


def test_scales_that_a_method_folded_into_norms_are_stored(save, tiny_folder):
    saved = save("awq", tiny_folder)
    before = load_model(str(tiny_folder)).model.state_dict()
    after = stored(saved.folder)
    folded = [name for name in after if "layernorm" in name and not torch.equal(after[name].float(), before[name])]
    assert folded
    assert torch.equal(logits(load_checkpoint(saved.folder), saved.tokens), saved.packed_logits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_model_comes_back_in_its_dtype(dtype, save, tiny_folder):
    saved = save("rtn", tiny_folder, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(saved.folder)
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(logits(loaded, saved.tokens), saved.packed_logits)


def test_another_dtype_can_be_asked_for_and_does_not_change_what_is_stored(pristine, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(pristine.folder, dtype=torch.float16)
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").scales.dtype == torch.float16
    close = (logits(loaded, pristine.tokens).float() - pristine.logits).norm() / pristine.logits.norm()
    assert 0 < close < 0.01
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "again"), stored(pristine.folder))


def test_dense_weights_are_decoded_by_the_flag_and_by_the_method(pristine):
    flagged = load_checkpoint(pristine.folder, dequantize=True)
    called = AutoModelForCausalLM.from_pretrained(pristine.folder).dequantize()
    for model in (flagged, called):
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        assert not hasattr(model.config, "quantization_config")
        assert torch.equal(logits(model, pristine.tokens), pristine.logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_is_followed(pristine, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(pristine.folder, device_map=device_map)
    assert torch.equal(logits(loaded, pristine.tokens), pristine.packed_logits)


def test_blocks_can_be_left_on_disk(pristine, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        pristine.folder, device_map=places, offload_folder=tmp_path / "off", offload_buffers=True
    )
    assert torch.equal(logits(loaded, pristine.tokens), pristine.packed_logits)


def test_tied_weights_are_stored_once(save, tmp_path):
    model = tiny.build()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    saved = save("rtn", tiny.save(tmp_path / "model", model=model))
    assert "lm_head.weight" not in stored(saved.folder)
    loaded = load_checkpoint(saved.folder)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, saved.tokens), saved.packed_logits)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_model_that_is_streamed_from_disk_is_saved_to_the_same_bytes(
    method, tiny_folder, corpus_file, tmp_path, monkeypatch
):
    folders = [tmp_path / "whole", tmp_path / "streamed"]
    for folder in folders:
        monkeypatch.setenv("SAGEBENCH_CACHE", str(folder) + "-cache")
        command = ["quantize", "--model", str(tiny_folder), "--method", method, "--out", str(folder)]
        command += ["--option", "group_size=32", "--calibration-corpus", str(corpus_file), "--context", "32"]
        assert (
            main([*command, "--calibration-samples", "4", "--profile", "embedded", "--device", "cpu", "--force"]) == 0
        )
        monkeypatch.setattr(load, "available_memory", lambda device: 1000)
    places = [json.loads((folder / "record.json").read_text())["model"]["placement"] for folder in folders]
    assert places == ["whole", "streamed from disk"]
    assert same_tensors(*map(stored, folders))


def test_what_is_not_quantized_is_stored_in_16_bits(pristine):
    unquantized = verify_checkpoint(pristine.folder).unquantized
    tensors = stored(pristine.folder)
    assert {tensors[name].dtype for name in unquantized} == {torch.float16}
    size = sum(2 * tensors[name].numel() for name in unquantized)
    assert size == pristine.record["ledger"]["other_bytes"]


def test_the_folder_holds_tokenizer_ledger_record_and_checksums(pristine):
    folder = pristine.folder
    assert AutoTokenizer.from_pretrained(folder)("w3 w5")["input_ids"] == [5, 7]
    assert json.loads((folder / "ledger.json").read_text())["payload_bits"] == pristine.record["ledger"]["payload_bits"]
    assert json.loads((folder / "record.json").read_text())["method"]["options"]["bits"] == 3
    assert len(weight_files(folder)) > 1  # 20 KB a shard
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_saving_again_into_one_file_gives_the_same_tensors_and_the_same_sizes(pristine, tmp_path):
    loaded = load_checkpoint(pristine.folder)
    loaded.save_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert same_tensors(stored(tmp_path / "one"), stored(pristine.folder))


BLOCKS = os.environ.get("SAGEBENCH_TEST_BLOCKS")


def first_blocks(blocks, folder):
    """SmolLM2 with its first `blocks` blocks only (with SAGEBENCH_TEST_BLOCKS so many: it has 30) saved to `folder`,
    and 32 tokens of text for it."""
    blocks = int(BLOCKS or blocks)
    loaded = load_model("smollm2-135m", "float16")
    loaded.model.model.layers = loaded.model.model.layers[:blocks]
    loaded.model.config.num_hidden_layers = blocks
    loaded.model.config.use_cache = True
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    text = "The house is built of bricks, and each brick is counted once. " * 4
    return folder, torch.tensor([loaded.tokenizer(text)["input_ids"][:32]])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return first_blocks(1, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def eight_blocks(tmp_path_factory):
    return first_blocks(8, tmp_path_factory.mktemp("smollm2"))


# One method a layout, as what is stored depends on nothing else; the regression gate saves, loads and measures again
# every method on this model. Trellises are left to it alone: they take SAGE-X a minute.
LAYOUTS = ("fp16", "rtn", "binary", "pb-llm", "billm", "sage-ptq", "micromix", "cmpq", "slim-llm")


@pytest.mark.model
@pytest.mark.parametrize("name", LAYOUTS)
def test_smollm2_is_saved_and_reloaded_to_the_bit(name, smollm2, save, monkeypatch, tmp_path):
    model, tokens = smollm2
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))
    saved = save(name, model, tokens=tokens, samples=2, context=800, width=64)
    assert torch.equal(logits(load_checkpoint(saved.folder), tokens), saved.packed_logits)
    assert linear_bytes(saved.folder) == saved.record["ledger"]["payload_bytes"]
    # The weights as files, with their headers: within half a percent of what the ledger says of the whole model.
    files = sum(file.stat().st_size for file in weight_files(saved.folder))
    assert abs(files / saved.record["ledger"]["total_bytes"] - 1) < 0.005
    shutil.rmtree(saved.folder)


# Loads and saves a checkpoint; prints the peak resident memory above that of before, in the size of the model.
MEASURE = """
import sys, torch, harness
from transformers import AutoModelForCausalLM

folder, again, small = sys.argv[1:]

def resident(kind):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines[kind].split()[0])

# Code is no part of what is measured: all of it runs once before.
AutoModelForCausalLM.from_pretrained(small).save_pretrained(again + "-small")
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
model = AutoModelForCausalLM.from_pretrained(folder)
loading = resident("VmHWM") - before
open("/proc/self/clear_refs", "w").write("5")
model.save_pretrained(again)
saving = resident("VmHWM") - before
size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
print(loading / size, saving / size)
"""


@pytest.mark.model
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be measured one by one here")
def test_loading_and_saving_take_little_more_memory_than_the_packed_model(
    eight_blocks, pristine, save, monkeypatch, tmp_path
):
    # So many blocks that the dense model takes 1.7 times as much as the packed one.
    model, tokens = eight_blocks
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))
    saved = save("rtn", model, tokens=tokens, width=64, dtype="float16", bits=2)
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert dense > 1.5 * saved.record["ledger"]["total_bytes"]
    command = [sys.executable, "-c", MEASURE, str(saved.folder), str(tmp_path / "again"), str(pristine.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loading, saving = map(float, done.stdout.split()[-2:])
    print(f"peak over size of the packed model: {loading:.3f} loading, {saving:.3f} saving")
    assert 0.1 < loading <= 1.2
    assert 0.1 < saving <= 1.2
    first, second = (folder / "model.safetensors" for folder in (saved.folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
