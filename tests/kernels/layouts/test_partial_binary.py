"""Partial binary: what decodes, what is stored, what is refused; and the plain binary layout that shares its signs."""

import pytest
import torch
from safetensors.torch import load_file

from kernels.errors import InputError
from kernels.layouts import BinaryWeight, PartialBinaryWeight, load_packed, save_packed


def example(rows, columns, *, group_size=None, bits=8, share=0.1, dtype=torch.float16, seed=0):
    """A random weight with the parts it was packed from."""
    torch.manual_seed(seed)
    group_size = group_size or columns
    groups = -(-columns // group_size)
    parts = {
        "mask": torch.rand(rows, columns) < share,
        "negative": torch.rand(rows, columns) < 0.5,
        "codes": torch.randint(0, 1 << bits, (rows, columns)),
        "means": (0.01 * torch.randn(rows, groups)).to(dtype),
        "scales": torch.rand(rows, groups).to(dtype),
        "salient_scales": (0.01 * torch.rand(rows)).to(dtype),
        "salient_zeros": torch.randint(0, 1 << bits, (rows,)),
    }
    return PartialBinaryWeight.pack(**parts, group_size=group_size, salient_bits=bits), parts


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "bits", "share"),
    [
        (3, 5, None, 8, 0.3),
        (7, 129, 128, 8, 0.1),
        (4, 576, 128, 4, 0.1),
        (2, 1, None, 3, 0.5),
        (5, 40, 16, 1, 0.2),
        (6, 33, 7, 8, 0.0),
        (6, 33, 7, 8, 1.1),
    ],
)
def test_decode_follows_the_definition_weight_by_weight(rows, columns, group_size, bits, share):
    packed, parts = example(rows, columns, group_size=group_size, bits=bits, share=share)
    decoded = packed.decode()
    for i in range(rows):
        for j in range(columns):
            if parts["mask"][i, j]:
                steps = float(parts["codes"][i, j]) - float(parts["salient_zeros"][i])
                expected = steps * parts["salient_scales"][i].float()
            else:
                group = j // packed.group_size
                sign = -1 if parts["negative"][i, j] else 1
                expected = parts["means"][i, group].float() + sign * parts["scales"][i, group].float()
            assert decoded[i, j] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saved_and_loaded_weight_decodes_to_the_same_bits(tmp_path, dtype):
    packed, _ = example(9, 577, group_size=128, dtype=dtype)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    loaded = load_packed(tmp_path / "w.safetensors")["layer"]
    assert isinstance(loaded, PartialBinaryWeight)
    assert torch.equal(loaded.decode(), packed.decode())
    assert {name: tensor.dtype for name, tensor in loaded.tensors().items()} == {
        name: tensor.dtype for name, tensor in packed.tensors().items()
    }


def test_bytes_of_a_small_weight_counted_by_hand(tmp_path):
    # 4 x 32 weights, 16 of them salient with 4 bits, groups of 16.
    mask = torch.zeros(4, 32, dtype=torch.bool)
    mask[:, :4] = True
    packed = PartialBinaryWeight.pack(
        mask,
        torch.zeros(4, 32, dtype=torch.bool),
        torch.zeros(4, 32, dtype=torch.uint8),
        means=torch.zeros(4, 2, dtype=torch.float16),
        scales=torch.ones(4, 2, dtype=torch.float16),
        salient_scales=torch.ones(4, dtype=torch.float16),
        salient_zeros=torch.zeros(4, dtype=torch.uint8),
        group_size=16,
        salient_bits=4,
    )
    assert packed.bytes_by_role() == {
        "mask": 128 // 8,
        "sign": 112 // 8,
        "code": 16 * 4 // 8,
        "scale": 2 * (4 * 2) * 2 + 4 * 2,  # mean and scale of 8 groups, then a scale a row
        "zero": 4 * 4 // 8,
    }
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    stored = load_file(tmp_path / "w.safetensors").values()
    assert packed.nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in stored)


def test_payload_is_the_formula_of_codes_bitmap_and_constants():
    rows, columns, group = 64, 256, 128
    packed, parts = example(rows, columns, group_size=group)
    f = float(parts["mask"].double().mean())
    formula = (1 - f) + 8 * f + 1 + 32 / group + (16 + 8) / columns
    # Only the sign stream may end inside a byte.
    assert 0 <= packed.payload_bits() - formula < 8 / (rows * columns)


def test_damaged_tensors_are_refused():
    packed, _ = example(8, 64, group_size=32)
    tensors, metadata = packed.tensors(), packed.metadata()
    rebuild = PartialBinaryWeight.from_tensors
    for name in tensors:
        with pytest.raises(InputError, match=name):
            rebuild({key: value for key, value in tensors.items() if key != name}, metadata)
        with pytest.raises(InputError, match=name):
            rebuild({**tensors, name: tensors[name][:-1]}, metadata)
        with pytest.raises(InputError, match=name):
            rebuild({**tensors, name: tensors[name].to(torch.int32)}, metadata)
    with pytest.raises(InputError, match="does not know"):
        rebuild({**tensors, "more": tensors["mask"]}, metadata)
    with pytest.raises(InputError, match="marks"):
        rebuild({**tensors, "mask": tensors["mask"].bitwise_not()}, metadata)


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 0},
        {"group_size": 65},
        {"group_size": 32.0},
        {"salient_bits": 9},
        {"salient_bits": True},
        {"salient": -1},
        {"salient": 513},
        {"shape": [8]},
    ],
)
def test_metadata_out_of_range_is_refused(change):
    packed, _ = example(8, 64, group_size=32)
    with pytest.raises(InputError):
        PartialBinaryWeight.from_tensors(packed.tensors(), {**packed.metadata(), **change})


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(3, 5, 5), (4, 576, 128), (64, 256, 64)])
def test_binary_weight_round_trip_and_bytes(tmp_path, rows, columns, group_size, with_means):
    torch.manual_seed(0)
    groups = -(-columns // group_size)
    negative = torch.rand(rows, columns) < 0.5
    scales = torch.rand(rows, groups).half()
    means = torch.randn(rows, groups).half() if with_means else None
    packed = BinaryWeight.pack(negative, scales, means, group_size=group_size)
    expected = torch.where(negative, -1.0, 1.0) * scales.float().repeat_interleave(group_size, 1)[:, :columns]
    if means is not None:
        expected = expected + means.float().repeat_interleave(group_size, 1)[:, :columns]
    assert torch.equal(packed.decode(), expected)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    assert torch.equal(load_packed(tmp_path / "w.safetensors")["layer"].decode(), expected)
    assert packed.nbytes() == (rows * columns + 7) // 8 + 2 * rows * groups * (1 + with_means)


def test_damaged_binary_weight_is_refused():
    packed = BinaryWeight.pack(torch.rand(4, 8) < 0.5, torch.rand(4, 2), torch.rand(4, 2), group_size=4)
    tensors, metadata = packed.tensors(), packed.metadata()
    for name in ("signs", "scales"):
        with pytest.raises(InputError, match=name):
            BinaryWeight.from_tensors({key: value for key, value in tensors.items() if key != name}, metadata)
    with pytest.raises(InputError, match="means"):
        BinaryWeight.from_tensors({**tensors, "means": tensors["means"].half()}, metadata)
    with pytest.raises(InputError, match="group_size=9"):
        BinaryWeight.from_tensors(tensors, {**metadata, "group_size": 9})
