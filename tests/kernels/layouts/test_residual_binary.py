"""Residual binary: what decodes, what is stored, what is refused."""

import pytest
import torch
from safetensors.torch import load_file

from kernels.errors import InputError
from kernels.layouts import ResidualBinaryWeight, load_packed, save_packed


def example(rows, columns, *, block_size=128, salient=0.1, dtype=torch.float16, seed=0):
    """A random weight with the parts it was packed from."""
    torch.manual_seed(seed)
    blocks = -(-columns // block_size)
    parts = {
        "negative": torch.rand(rows, columns) < 0.5,
        "residual_negative": torch.rand(rows, columns) < 0.5,
        "sparse": torch.rand(rows, columns) < 0.2,
        "salient_columns": torch.rand(columns) < salient,
        "means": (0.1 * torch.randn(rows, blocks, 3)).to(dtype),
        "scales": torch.rand(rows, blocks, 4).to(dtype),
    }
    return ResidualBinaryWeight.pack(**parts, block_size=block_size), parts


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "salient"),
    [(3, 5, 2, 0.4), (2, 576, 128, 0.1), (7, 129, 128, 0.1), (1, 1, 1, 0.0), (5, 30, 8, 0.0), (5, 30, 8, 1.1)],
)
def test_decode_follows_the_definition_weight_by_weight(rows, columns, block_size, salient):
    packed, parts = example(rows, columns, block_size=block_size, salient=salient)
    decoded = packed.decode()
    means, scales = parts["means"].float(), parts["scales"].float()
    for i in range(rows):
        for j in range(columns):
            block = j // block_size
            sign = -1 if parts["negative"][i, j] else 1
            if parts["salient_columns"][j]:
                residual_sign = -1 if parts["residual_negative"][i, j] else 1
                expected = means[i, block, 2] + sign * scales[i, block, 2] + residual_sign * scales[i, block, 3]
            else:
                group = int(parts["sparse"][i, j])
                expected = means[i, block, group] + sign * scales[i, block, group]
            assert decoded[i, j] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saved_and_loaded_weight_decodes_to_the_same_bits(tmp_path, dtype):
    packed, _ = example(9, 577, dtype=dtype)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    loaded = load_packed(tmp_path / "w.safetensors")["layer"]
    assert isinstance(loaded, ResidualBinaryWeight)
    assert torch.equal(loaded.decode(), packed.decode())


def test_bytes_of_a_small_weight_counted_by_hand(tmp_path):
    # 8 x 24 weights in blocks of 16 (so one and a half), columns 0, 1 and 20 salient.
    salient = torch.zeros(24, dtype=torch.bool)
    salient[[0, 1, 20]] = True
    plane = torch.zeros(8, 24, dtype=torch.bool)
    packed = ResidualBinaryWeight.pack(
        plane,
        plane,
        plane,
        salient,
        means=torch.zeros(8, 2, 3, dtype=torch.float16),
        scales=torch.ones(8, 2, 4, dtype=torch.float16),
        block_size=16,
    )
    assert packed.bytes_by_role() == {
        "sign": 8 * 24 // 8 + 8 * 3 // 8,  # one each, and a residual one in salient columns
        "mask": 8 * 21 // 8 + 24 // 8,  # a group for the others, and the columns
        "scale": 8 * 2 * 7 * 2,
    }
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    stored = load_file(tmp_path / "w.safetensors").values()
    assert packed.nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in stored)


@pytest.mark.parametrize(("columns", "blocks"), [(256, 2), (576, 5)])
def test_payload_is_the_formula_of_signs_groups_constants_and_columns(columns, blocks):
    rows = 64
    packed, parts = example(rows, columns)
    r = float(parts["salient_columns"].double().mean())
    formula = (1 + r) + (1 - r) + 7 * 16 * blocks / columns + 1 / rows
    assert packed.payload_bits() == pytest.approx(formula, rel=1e-12)


def test_damaged_tensors_are_refused():
    packed, _ = example(8, 64, block_size=32)
    tensors, metadata = packed.tensors(), packed.metadata()
    rebuild = ResidualBinaryWeight.from_tensors
    for name in tensors:
        with pytest.raises(InputError, match=name):
            rebuild({key: value for key, value in tensors.items() if key != name}, metadata)
        with pytest.raises(InputError, match=name):
            rebuild({**tensors, name: tensors[name][:-1]}, metadata)
        with pytest.raises(InputError, match=name):
            rebuild({**tensors, name: tensors[name].to(torch.int32)}, metadata)
    with pytest.raises(InputError, match="does not know"):
        rebuild({**tensors, "more": tensors["signs"]}, metadata)
    with pytest.raises(InputError, match="marks"):
        rebuild({**tensors, "salient_columns": tensors["salient_columns"].bitwise_not()}, metadata)


@pytest.mark.parametrize(
    "change",
    [{"block_size": 0}, {"block_size": 65}, {"block_size": None}, {"salient": -1}, {"salient": 65}, {"shape": [8, 0]}],
)
def test_metadata_out_of_range_is_refused(change):
    packed, _ = example(8, 64, block_size=32)
    with pytest.raises(InputError):
        ResidualBinaryWeight.from_tensors(packed.tensors(), {**packed.metadata(), **change})
