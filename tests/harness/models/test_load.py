import json

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file

from harness.models import load
from harness.models.blocks import model_linears
from harness.models.load import load_model
from harness.models.source import resolve_model, source_precision
from kernels.errors import InputError


@pytest.fixture
def from_gguf(gguf_file):
    return load_model(str(gguf_file))


def test_linear_weights_are_those_of_the_file_and_all_else_is_rounded_to_16_bits(tiny_folder):
    loaded = load_model(str(tiny_folder))
    stored = load_file(tiny_folder / "model.safetensors")
    parameters = dict(loaded.model.named_parameters())
    linears = {f"{name}.weight" for name in model_linears(loaded.model)}
    assert parameters.keys() <= stored.keys()
    assert all(torch.equal(parameters[name], stored[name]) for name in linears)
    assert all(torch.equal(parameters[name], stored[name].half().float()) for name in parameters.keys() - linears)


def test_a_loaded_model_evaluates_and_does_not_train(tiny_folder):
    loaded = load_model(str(tiny_folder))
    parameters = dict(loaded.model.named_parameters())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert loaded.parameters == sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_used(tiny_folder, dtype):
    assert load_model(str(tiny_folder), dtype).model.dtype == getattr(torch, dtype)


def test_the_record_says_where_a_model_came_from(tiny_folder):
    record = load_model(str(tiny_folder)).as_record()
    assert record["name"] == str(tiny_folder)
    assert record["class"] == "LlamaForCausalLM"
    assert len(record["sha256"]) == 64
    assert record["source_precision"]["format"] == "F32"
    json.dumps(record)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_loads_from_a_folder_and_runs(family, tmp_path):
    model = tiny.build(family)
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    loaded = load_model(str(tiny.save(tmp_path / family, model=model)))
    torch.testing.assert_close(loaded.model(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_a_parameter_beyond_16_bits_is_named(model_folder):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight does not fit in float16"):
        load_model(str(model_folder))


def test_gguf_weights_are_the_dequantized_blocks_of_the_file(from_gguf, gguf_file):
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    linears = model_linears(from_gguf.model)
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        tensor = stored[f"blk.1.{theirs}.weight"]
        expected = torch.from_numpy(np.asarray(dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(linears[f"model.layers.1.{ours}"].weight, expected)
    assert from_gguf.precision.bits == 5.0
    assert from_gguf.tokenizer("ab").input_ids == [257]


def test_a_converted_gguf_file_is_used_again(from_gguf, gguf_file, monkeypatch):
    def never(path):
        raise AssertionError("converted twice")

    monkeypatch.setattr(load, "open_gguf", never)
    again = load_model(str(gguf_file))
    assert all(map(torch.equal, from_gguf.model.parameters(), again.model.parameters()))


def test_a_conversion_leaves_one_dense_folder(from_gguf, tmp_path):
    (folder,) = (tmp_path / "cache" / "converted").iterdir()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert source_precision(resolve_model(str(folder))).format == "F32"


def test_a_gguf_file_of_an_unknown_architecture_is_refused_and_leaves_nothing(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    path = tmp_path / "odd.gguf"
    path.write_bytes(content.replace(b"llama", b"glama"))
    with pytest.raises(InputError, match=r"odd\.gguf: transformers cannot read this GGUF file"):
        load_model(str(path))
    assert not any((tmp_path / "cache" / "converted").iterdir())


def test_an_unknown_model_type_is_refused_in_one_line(model_folder):
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config.update(model_type="nonesuch", architectures=["Nonesuch"])
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_model(str(model_folder))
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_refused(model_folder):
    for file in model_folder.glob("token*"):
        file.unlink()
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_model(str(model_folder))
    assert "\n" not in str(caught.value)


def test_weights_that_the_file_lacks_are_named_and_never_made_up(model_folder):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(model_folder))


def test_weights_of_another_shape_are_refused(model_folder):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} is \[95, 64\] in .*, its config says \[96, 64\]"):
        load_model(str(model_folder))


@pytest.mark.model
def test_the_embedded_model_is_a_q4_1_file_of_210_linears():
    loaded = load_model("smollm2-135m")
    assert (loaded.precision.format, loaded.precision.bits) == ("Q4_1", 5.0)
    assert len(model_linears(loaded.model)) == 210
    assert loaded.parameters == 134_515_008
