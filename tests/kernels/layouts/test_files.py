"""Packed weights in a file: several weights together, and every kind of damage refused with one clear error."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels.errors import InputError
from kernels.layouts import CodebookWeight, DenseWeight, UniformWeight, load_packed, save_packed


def weights():
    """One weight of each of three layouts, of odd sizes."""
    torch.manual_seed(0)
    index = torch.randint(1, 8, (5, 11))
    index[0, 3] = index[4, 10] = 0
    return {
        "model.layers.0.q_proj": UniformWeight.pack(
            torch.randint(0, 4, (3, 10)),
            torch.rand(3, 3).half(),
            torch.randint(0, 4, (3, 3)),
            bits=[2, 3, 2],
            group_size=4,
            permutation=torch.randperm(10),
        ),
        "model.layers.0.k_proj": CodebookWeight.pack(
            torch.rand(5, 11) < 0.5,
            index,
            torch.rand(7).bfloat16(),
            index_bits=3,
            salient_bits=4,
            salient_codes=torch.tensor([1, 7]),
            row_scales=torch.rand(5).bfloat16(),
        ),
        "lm_head": DenseWeight(torch.randn(2, 3)),
    }


@pytest.fixture
def file(tmp_path):
    save_packed(tmp_path / "packed.safetensors", weights())
    return tmp_path / "packed.safetensors"


def rewrite(path, change):
    """Save the file anew after `change(tensors, content)`; content is the parsed header of packed weights."""
    with safe_open(path, framework="pt") as opened:
        content = json.loads(opened.metadata()["sagebench"])
    tensors = load_file(path)
    change(tensors, content)
    save_file(tensors, path, metadata={"sagebench": json.dumps(content)})


def test_all_weights_come_back_in_their_layouts_and_to_the_bit(file):
    loaded, saved = load_packed(file), weights()
    assert set(loaded) == set(saved)
    for name, weight in saved.items():
        assert type(loaded[name]) is type(weight)
        assert loaded[name].metadata() == weight.metadata()
        assert torch.equal(loaded[name].decode(), weight.decode())


def test_the_file_holds_the_payload_and_nothing_else(file):
    stored = load_file(file)
    assert set(stored) == {f"{name}.{key}" for name, weight in weights().items() for key in weight.tensors()}
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert total == sum(weight.nbytes() for weight in weights().values())


def test_saving_twice_gives_the_same_bytes(file, tmp_path):
    save_packed(tmp_path / "again.safetensors", weights())
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_no_weights_at_all_can_be_saved(tmp_path):
    save_packed(tmp_path / "none.safetensors", {})
    assert load_packed(tmp_path / "none.safetensors") == {}


def test_a_failure_while_saving_leaves_the_old_file(file, monkeypatch):
    old = file.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kernels.tensor_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_packed(file, weights())
    assert file.read_bytes() == old
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.safetensors: no such file"):
        load_packed(tmp_path / "nowhere.safetensors")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_packed(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"not a safetensors file at all", bytes(64)])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.safetensors: not a readable safetensors file"):
        load_packed(path)


def test_a_file_cut_short_anywhere_is_refused(file):
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (1, 7, 8, 20, header - 1, header, header + 1, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"packed\.safetensors: not a readable safetensors file"):
            load_packed(file)


def test_bytes_after_the_end_are_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_packed(file)


def test_a_safetensors_file_of_others_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, tmp_path / "theirs.safetensors", metadata=metadata)
        with pytest.raises(InputError, match=r"theirs\.safetensors: .*not one of packed weights"):
            load_packed(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(file, version):
    rewrite(file, lambda tensors, content: content.update(version=version))
    with pytest.raises(InputError, match=f"version {version!r}; this build reads version 1"):
        load_packed(file)


def test_a_missing_tensor_is_refused_by_name(file):
    rewrite(file, lambda tensors, content: tensors.pop("model.layers.0.k_proj.index"))
    with pytest.raises(InputError, match=r"'model\.layers\.0\.k_proj\.index' is missing"):
        load_packed(file)


def test_a_tensor_that_the_header_does_not_list_is_refused_by_name(file):
    rewrite(file, lambda tensors, content: tensors.update({"lm_head.bias": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"'lm_head\.bias' belongs to no weight"):
        load_packed(file)


def test_a_tensor_that_the_layout_does_not_know_is_refused_by_name(file):
    def change(tensors, content):
        tensors["lm_head.bias"] = torch.zeros(2)
        content["weights"]["lm_head"]["tensors"].append("bias")

    rewrite(file, change)
    with pytest.raises(InputError, match=r"packed\.safetensors: lm_head: .*'bias'"):
        load_packed(file)


def test_a_tensor_of_the_wrong_size_is_refused_with_file_weight_and_tensor(file):
    rewrite(file, lambda tensors, content: tensors.update({"lm_head.weight": torch.zeros(3, 2)}))
    with pytest.raises(InputError, match=r"packed\.safetensors: lm_head: tensor 'weight' .*\[3, 2\]; .*\[2, 3\]"):
        load_packed(file)


def test_an_unknown_layout_is_refused_with_file_and_weight(file):
    rewrite(file, lambda tensors, content: content["weights"]["lm_head"].update(layout="danse"))
    with pytest.raises(InputError, match=r"packed\.safetensors: lm_head: unknown layout 'danse'; did you mean 'dense'"):
        load_packed(file)


def test_one_tensor_cannot_serve_two_weights(file):
    def change(tensors, content):
        content["weights"]["lm_head.x"] = {**content["weights"]["lm_head"], "tensors": []}

    rewrite(file, change)
    with pytest.raises(InputError, match=r"lm_head\.x: tensor 'weight' .*missing"):
        load_packed(file)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        '{"version": 1}',
        '{"weights": {}}',
        '{"version": 1, "weights": []}',
        '{"version": 1, "weights": {"a": 3}}',
        '{"version": 1, "weights": {"a": {}}}',
        '{"version": 1, "weights": {"a": {"layout": 3, "tensors": []}}}',
        '{"version": 1, "weights": {"a": {"layout": "dense", "tensors": "weight"}}}',
        '{"version": 1, "weights": {"a": {"layout": "dense", "tensors": [1]}}}',
        '{"version": 1, "weights": {"a": {"layout": "dense", "tensors": [["weight"]]}}}',
        "9" * 5000,
        "[" * 100_000,
    ],
    ids=lambda header: header[:3] + " and so on" if len(header) > 99 else header or "empty",
)
def test_a_damaged_header_is_refused(tmp_path, header):
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "bad.safetensors", metadata={"sagebench": header})
    with pytest.raises(InputError, match=r"bad\.safetensors: header of packed weights is damaged"):
        load_packed(tmp_path / "bad.safetensors")


def sample_file():
    with tempfile.TemporaryDirectory() as folder:
        save_packed(Path(folder) / "w.safetensors", weights())
        return (Path(folder) / "w.safetensors").read_bytes()


WHOLE = sample_file()
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


def load_damaged(changes):
    """What comes of the file when the bytes at `changes` are replaced: the weights, or None if they are refused."""
    content = bytearray(WHOLE)
    for at, value in changes:
        content[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        path.write_bytes(bytes(content))
        try:
            return load_packed(path)
        except InputError as error:
            assert "w.safetensors" in str(error)
            return None


# Bytes that keep a header parseable are the ones that get far: digits, quotes, brackets, letters of dtypes.
header_bytes = st.sampled_from([*b'0123456789"[]{},: -FUIB8163264', 0, 0x80, 0xFF]) | st.integers(0, 255)


@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), header_bytes), min_size=1, max_size=4))
@settings(max_examples=400)
def test_a_header_with_damaged_bytes_is_refused_or_still_describes_whole_weights(changes):
    for weight in (load_damaged(changes) or {}).values():
        again = type(weight).from_tensors(weight.tensors(), weight.metadata())
        assert again.nbytes() == weight.nbytes()
        try:
            assert weight.decode().shape == weight.shape
        except InputError:
            assert isinstance(weight, CodebookWeight)  # the only layout whose planes are checked when decoded


@given(st.lists(st.tuples(st.integers(HEADER_END, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=120)
def test_damaged_data_is_refused_or_decodes_to_the_same_shape(changes):
    for name, weight in (load_damaged(changes) or {}).items():
        try:
            assert weight.decode().shape == weights()[name].shape
        except InputError:
            assert isinstance(weight, CodebookWeight)
