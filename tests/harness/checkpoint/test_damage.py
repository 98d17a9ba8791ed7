"""A damaged, foreign or hostile checkpoint is refused with one clear line, before anything is loaded."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harness.checkpoint.description import config_sha256, tensors_sha256
from harness.checkpoint.files import weight_files
from harness.checkpoint.read import load_checkpoint, verify_checkpoint
from harness.checkpoint.write import check_target, write_sums
from harness.cli import main
from kernels.errors import InputError

LAYER = "model.layers.1.self_attn.q_proj"
INDEX = "model.safetensors.index.json"
readers = pytest.mark.parametrize("read", [verify_checkpoint, load_checkpoint, AutoModelForCausalLM.from_pretrained])


def edit(path, change):
    """Rewrite a JSON file after `change(content)`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_and_sign(folder, change):
    """Change the configuration as somebody would who renews the checksums."""

    def signed(config):
        change(config)
        config["quantization_config"]["sha256"] = config_sha256(config)

    edit(folder / "config.json", signed)
    write_sums(folder)


def shard_with(folder, tensor):
    return next(file for file in weight_files(folder) if tensor in load_file(file))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def forge(folder, tensor, change):
    """Change a tensor of a packed layer as somebody would who renews every checksum."""
    rewrite(shard_with(folder, tensor), lambda tensors: change(tensors[tensor]))
    layer = tensor.rpartition(".")[0]
    stored = load_file(shard_with(folder, tensor))
    inside = {name.rpartition(".")[2]: stored[name] for name in stored if name.rpartition(".")[0] == layer}
    sha256 = tensors_sha256(inside)
    edit_and_sign(folder, lambda config: config["quantization_config"]["layers"][layer].update(sha256=sha256))


@readers
@pytest.mark.parametrize("tensor", [f"{LAYER}.codes_b3", f"{LAYER}.scales", "model.norm.weight"])
def test_a_flipped_bit_is_found_and_its_tensor_named(checkpoint, read, tensor):
    def flip(tensors):
        tensors[tensor].view(torch.uint8)[-1] ^= 1

    rewrite(shard_with(checkpoint, tensor), flip)
    with pytest.raises(InputError, match=rf"{tensor.rpartition('.')[0]}.* is damaged: its sha256"):
        read(checkpoint)


# By method, the tensor that is filled with one value, the value, and what is said of it.
FORGERIES = [
    ("sage-ptq", "index", 255, "index plane names level"),
    ("sage-ptq", "index", 0, "index plane marks"),
    ("billm", "salient_columns", 255, "marks .* columns"),
    ("micromix", "exponents", 255, "which means NaN"),
    ("micromix", "permutation", 0, "each column exactly once"),
]


@pytest.mark.parametrize(("method", "tensor", "value", "told"), FORGERIES)
def test_content_that_cannot_have_been_packed_is_refused_whoever_signed_it(
    method, tensor, value, told, save, tiny_folder
):
    folder = save(method, tiny_folder).folder
    forge(folder, f"{LAYER}.{tensor}", lambda stored: stored.fill_(value))
    for read in (verify_checkpoint, load_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=f"layer {LAYER}: .*{told}"):
            read(folder)


def test_every_shard_is_protected_to_its_last_byte(checkpoint):
    for file in weight_files(checkpoint):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 0x80]))
        with pytest.raises(InputError, match="is damaged: its sha256"):
            verify_checkpoint(checkpoint)
        file.write_bytes(content)
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("read", [verify_checkpoint, load_checkpoint])
def test_a_missing_shard_is_named(checkpoint, read):
    lost = weight_files(checkpoint)[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"shard {lost.name} is missing"):
        read(checkpoint)


@readers
@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(checkpoint, read, cut):
    file = weight_files(checkpoint)[0]
    file.write_bytes(file.read_bytes()[:cut])
    # Without our check in front, transformers opens the file itself for its dtype.
    with pytest.raises(
        (InputError, OSError), match=rf"{file.name}.*not a readable safetensors file|[Hh]eader|deserializ"
    ):
        read(checkpoint)


@readers
def test_another_format_is_refused_whoever_signed_it(checkpoint, read):
    edit_and_sign(checkpoint, lambda config: config["quantization_config"].update(format=2))
    with pytest.raises(InputError, match="checkpoint format 2; this build reads format 1"):
        read(checkpoint)


@readers
@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(rms_norm_eps=1e-3),
        lambda config: config["quantization_config"]["layers"][LAYER]["metadata"].update(group_size=16),
        lambda config: config["quantization_config"].update(method="gptq"),
    ],
    ids=["epsilon", "group size", "method"],
)
def test_a_changed_configuration_is_refused(checkpoint, read, change):
    edit(checkpoint / "config.json", change)
    with pytest.raises(InputError, match=r"config\.json is not what was written"):
        read(checkpoint)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3, None])
def test_a_shard_outside_the_folder_is_refused(checkpoint, name):
    edit(checkpoint / INDEX, lambda index: index["weight_map"].update({f"{LAYER}.scales": name}))
    with pytest.raises(InputError, match=r"is no shard|is damaged"):
        verify_checkpoint(checkpoint)


def test_transformers_does_not_follow_a_shard_outside_the_folder_either(checkpoint):
    inside = shard_with(checkpoint, f"{LAYER}.scales")
    inside.rename(checkpoint.parent / inside.name)

    def move(index):
        index["weight_map"] = {
            key: f"../{name}" if name == inside.name else name for key, name in index["weight_map"].items()
        }

    edit(checkpoint / INDEX, move)
    with pytest.raises(InputError, match=r"is no shard|lies outside the checkpoint"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_pickled_weights_are_never_read(checkpoint):
    for file in (*weight_files(checkpoint), checkpoint / INDEX):
        file.unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_checkpoint(checkpoint)
    with pytest.raises(InputError, match=r"pytorch_model\.bin' is no shard"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_layers_that_changed_places_are_found(checkpoint):
    other = LAYER.replace("layers.1", "layers.2")
    files = {name: shard_with(checkpoint, f"{name}.scales") for name in (LAYER, other)}
    scales = {name: load_file(file)[f"{name}.scales"] for name, file in files.items()}
    for name, taken in ((LAYER, other), (other, LAYER)):
        rewrite(files[name], lambda tensors, name=name, taken=taken: tensors.update({f"{name}.scales": scales[taken]}))
    with pytest.raises(InputError, match="is damaged"):
        verify_checkpoint(checkpoint)


@readers
def test_a_tensor_too_many_and_one_too_few_are_named(checkpoint, read):
    file = shard_with(checkpoint, f"{LAYER}.scales")
    rewrite(file, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"'model\.extra' belongs to no layer"):
        read(checkpoint)
    file = shard_with(checkpoint, "model.norm.weight")
    rewrite(file, lambda tensors: (tensors.pop("model.extra", None), tensors.pop("model.norm.weight")))
    file = shard_with(checkpoint, f"{LAYER}.scales")
    rewrite(file, lambda tensors: tensors.pop("model.extra", None))
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing"):
        read(checkpoint)


def test_a_configuration_for_fewer_blocks_is_refused_even_if_signed(checkpoint):
    edit_and_sign(checkpoint, lambda config: config.update(num_hidden_layers=2))
    with pytest.raises(InputError, match=r"layer model\.layers\.2\..* is not in LlamaForCausalLM"):
        load_checkpoint(checkpoint)


def test_a_configuration_for_more_blocks_is_refused_even_if_signed(checkpoint):
    edit_and_sign(checkpoint, lambda config: config.update(num_hidden_layers=4))
    with pytest.raises(InputError, match=r"does not fit LlamaForCausalLM: it lacks model\.layers\.3\."):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("file", ["tokenizer.json", "record.json", "ledger.json", "generation_config.json"])
def test_the_other_files_are_under_checksums_too(checkpoint, file):
    (checkpoint / file).write_text((checkpoint / file).read_text() + " ")
    with pytest.raises(InputError, match=rf"{file} is not what was written"):
        verify_checkpoint(checkpoint)


def test_a_file_that_was_not_written_with_the_checkpoint_is_refused(checkpoint):
    (checkpoint / "modeling.py").write_text("print('hello')")
    with pytest.raises(InputError, match=r"modeling\.py was not written with the checkpoint"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("line", ["../../etc/passwd", "x y z", "/etc/passwd"])
def test_checksums_of_files_elsewhere_are_refused(checkpoint, line):
    with (checkpoint / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {line}\n" if line.startswith((".", "/")) else f"{line}\n")
    with pytest.raises(InputError, match="is not a checksum and a file of this folder"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, '{"quantization_config": 3}', "{}"])
def test_a_config_that_is_no_checkpoints_is_refused(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        verify_checkpoint(checkpoint)


def test_a_configuration_of_any_size_is_not_read(checkpoint):
    with (checkpoint / "config.json").open("r+b") as file:
        os.truncate(file.fileno(), 1 << 40)  # sparse: takes no disk
    with pytest.raises(InputError, match="larger than any configuration"):
        verify_checkpoint(checkpoint)


def test_a_folder_that_is_not_there_or_not_empty_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is there already and not empty"):
        check_target(checkpoint)


def test_verify_says_what_is_there_or_what_is_wrong(checkpoint, capsys):
    assert main(["verify", str(checkpoint)]) == 0
    assert "whole; 21 packed layers, method rtn" in capsys.readouterr().out
    shutil.rmtree(checkpoint)
    assert main(["verify", str(checkpoint)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
