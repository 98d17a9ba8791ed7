import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from harness.models.source import (
    fingerprint,
    linear_weights,
    open_gguf,
    require_unquantized,
    resolve_model,
    source_precision,
)
from kernels.errors import InputError


def refused(folder):
    with pytest.raises(InputError) as caught:
        resolve_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_a_catalogue_name_is_known_in_any_case():
    source = resolve_model("OPT-1.3B")
    assert (source.name, source.kind, source.hub_id, source.family) == ("opt-1.3b", "hub", "facebook/opt-1.3b", "opt")


def test_a_folder_is_found_with_its_family(model_folder):
    source = resolve_model(str(model_folder))
    assert (source.kind, source.path, source.family) == ("folder", model_folder, "llama")


@pytest.mark.parametrize(
    ("kind", "family"), [("opt", "opt"), ("qwen2", "qwen"), ("qwen3", "qwen"), ("gemma2", "llama")]
)
def test_the_family_follows_the_model_type(model_folder, kind, family):
    edit_config(model_folder, model_type=kind)
    assert resolve_model(str(model_folder)).family == family


def test_owner_and_name_is_a_hub_id():
    assert resolve_model("someone/some-model").hub_id == "someone/some-model"


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(InputError, match=r"unknown model 'opt-13\.b'; did you mean .*'opt-1\.3b'"):
        resolve_model("opt-13.b")


def test_a_missing_gguf_file_is_named():
    with pytest.raises(InputError, match=r"'nowhere\.gguf': no such GGUF file"):
        resolve_model("nowhere.gguf")


def test_a_folder_without_config_is_refused(model_folder):
    (model_folder / "config.json").unlink()
    assert "has no config.json" in refused(model_folder)


@pytest.mark.parametrize("content", ["{", "[]", '"text"', ""])
def test_a_broken_config_is_refused(model_folder, content):
    (model_folder / "config.json").write_text(content, encoding="utf-8")
    assert "config.json is not valid JSON" in refused(model_folder)


def test_a_config_that_is_no_text_is_refused(model_folder):
    (model_folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not valid JSON" in refused(model_folder)


def test_a_folder_without_weights_is_refused(model_folder):
    (model_folder / "model.safetensors").unlink()
    assert refused(model_folder).endswith("has no weights (*.safetensors)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(model_folder, name):
    (model_folder / "model.safetensors").rename(model_folder / name)
    message = refused(model_folder)
    assert f"{name} is a pickle and is never read" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(model_folder, keep):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(model_folder)
    assert str(file) in message
    assert "may be truncated" in message


def shard(folder):
    """Turn the folder's one file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (name > names[9])}-of-00002.safetensors" for name in names}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8"
    )


def test_shards_are_accepted_and_a_missing_one_is_named(model_folder):
    shard(model_folder)
    assert resolve_model(str(model_folder)).kind == "folder"
    (model_folder / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in refused(model_folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', "[]"])
def test_a_damaged_index_is_refused(model_folder, content):
    shard(model_folder)
    (model_folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    assert "model.safetensors.index.json is damaged" in refused(model_folder)


def test_a_quantized_folder_is_known_as_such_and_not_taken_for_a_model_to_quantize(model_folder):
    assert resolve_model(str(model_folder)).quantized is None
    edit_config(model_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    source = resolve_model(str(model_folder))
    assert source.quantized == "gptq"
    with pytest.raises(InputError, match=r"is already quantized \(gptq\); give the unquantized model"):
        require_unquantized(source)


def test_the_fingerprint_follows_the_weights(model_folder):
    source = resolve_model(str(model_folder))
    before = fingerprint(source)
    assert fingerprint(source) == before
    file = model_folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert fingerprint(source) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_fingerprint_follows_configuration_and_tokenizer(model_folder, name):
    source = resolve_model(str(model_folder))
    before = fingerprint(source)
    file = model_folder / name
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert fingerprint(source) != before


def test_the_fingerprint_does_not_see_what_decides_nothing(model_folder):
    source = resolve_model(str(model_folder))
    before = fingerprint(source)
    (model_folder / "README.md").write_text("a model", encoding="utf-8")
    assert fingerprint(source) == before


def test_precision_of_a_folder_is_that_of_its_matrices(model_folder):
    source = resolve_model(str(model_folder))
    assert source_precision(source).as_record() == {
        "quantized": False, "format": "F32", "bits": 32.0, "detail": "safetensors, mostly F32",
    }  # fmt: skip
    file = model_folder / "model.safetensors"
    halves = {name: t.half() if t.dim() == 2 else t for name, t in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})
    assert (source_precision(source).format, source_precision(source).bits) == ("F16", 16.0)


def test_sizes_come_from_the_headers(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    in_blocks = sum(t.numel() for name, t in tensors.items() if ".layers." in name and t.dim() == 2)
    total = sum(t.numel() for t in tensors.values())
    assert linear_weights(resolve_model(str(model_folder))) == (total, in_blocks)


def test_precision_of_a_gguf_file_counts_its_constants(gguf_file):
    source = resolve_model(str(gguf_file))
    precision = source_precision(source)
    assert (source.kind, source.family) == ("gguf", "llama")
    assert (precision.quantized, precision.format, precision.bits) == (True, "Q4_1", 5.0)
    assert linear_weights(source)[1] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


def test_a_gguf_file_cut_anywhere_is_refused_in_one_line(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    header = open_gguf(gguf_file).data_offset
    places = [0, 3, 4, 8, 20, 24, *range(30, header, 499), header - 1, header, header + 1, len(content) // 2, -1]
    for place in places:
        cut.write_bytes(content[:place])
        message = refused(cut)
        assert str(cut) in message, place
        assert "truncated" in message, place


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model at all, only some text", b"PK\x03\x04" * 100, b"GGUF" + struct.pack("<I", 99) + b"\0" * 64],
)
def test_bytes_that_are_not_gguf_are_refused(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    assert "not a readable GGUF file" in refused(path)
