"""What is exported decodes to the very weights, by the formats' own formulas written down once more, code by code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.exports import compressed_tensors, export_checkpoint, gptq
from harness.checkpoint.exports.grid import Grid, common_grid, words
from harness.checkpoint.read import packed_weights
from harness.cli import main
from kernels.errors import InputError
from kernels.layouts import BinaryWeight, UniformWeight


def uniform(bits=3, *, order=False, symmetric=False, lowest_zero=1, group_size=32, shape=(32, 96), dtype=torch.float16):
    generator = torch.Generator().manual_seed(bits)
    groups = -(-shape[1] // group_size)
    zeros = torch.randint(lowest_zero, 1 << bits, (shape[0], groups), generator=generator)
    return UniformWeight.pack(
        torch.randint(0, 1 << bits, shape, generator=generator),
        torch.rand(shape[0], groups, generator=generator).to(dtype),
        None if symmetric else zeros,
        bits=bits,
        group_size=group_size,
        permutation=torch.randperm(shape[1], generator=generator) if order else None,
    )


def code(stream, number, bits):
    """Code `number` of a bit stream of int32 words, bit by bit."""
    places = range(number * bits, (number + 1) * bits)
    return sum((int(stream[place // 32]) >> (place % 32) & 1) << i for i, place in enumerate(places))


def test_words_are_streams_that_start_anew_in_each_row():
    for bits in range(1, 9):
        codes = torch.randint(0, 1 << bits, (3, 37))
        packed = words(codes, bits)
        assert packed.shape == (3, -(-37 * bits // 32))
        assert [[code(row, n, bits) for n in range(37)] for row in packed] == codes.tolist()


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_decodes_to_the_weight(bits, order, v2):
    weight = uniform(bits, order=order)
    packed, decoded = gptq.pack(weight, "layer", v2=v2), weight.decode()
    for row, column in [(0, 0), (31, 95), (7, 31), (8, 32), (30, 64), (19, 50)]:
        group = int(packed["g_idx"][column])
        value = code(packed["qweight"][:, row], column, bits)
        zero = code(packed["qzeros"][group], row, bits) + (not v2)
        assert float(packed["scales"][group, row]) * (value - zero) == pytest.approx(float(decoded[row, column]))
    assert packed["qweight"].shape == (96 * bits // 32, 32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_compressed_tensors_decode_to_the_weight(bits, symmetric):
    weight = uniform(bits, symmetric=symmetric, lowest_zero=0)
    packed, decoded, middle = compressed_tensors.pack(weight, "layer"), weight.decode(), 1 << (bits - 1)
    for row, column in [(0, 0), (31, 95), (7, 31), (8, 32), (30, 64)]:
        value = code(packed["weight_packed"][row], column, bits) - middle
        zero = 0 if symmetric else code(packed["weight_zero_point"][:, column // 32], row, bits) - middle
        found = float(packed["weight_scale"][row, column // 32]) * (value - zero)
        assert found == pytest.approx(float(decoded[row, column]))
    assert packed["weight_shape"].tolist() == [32, 96]


def test_a_zero_point_that_version_1_cannot_store_is_refused():
    weight = uniform(lowest_zero=0)
    assert int(weight.zeros().min()) == 0
    gptq.pack(weight, "layer", v2=True)
    with pytest.raises(InputError, match="layer has a zero point of 0, which GPTQ version 1 cannot store; use gptq_v2"):
        gptq.pack(weight, "layer", v2=False)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": BinaryWeight.pack(torch.eye(32).bool(), torch.ones(32, 1).half(), None, group_size=32)}, "as binary"),
        ({"a": uniform(3), "b": uniform(4)}, "layer b has Grid"),
        ({"a": uniform(dtype=torch.float32)}, "scales in float32; quantize with scale_dtype=float16"),
        ({}, "no packed layers"),
    ],
)
def test_what_has_no_common_grid_is_refused(weights, said):
    with pytest.raises(InputError, match=said):
        common_grid(weights)


def test_shapes_and_widths_that_a_format_lacks_are_refused():
    with pytest.raises(InputError, match="bits=5 cannot be stored in the GPTQ format"):
        gptq.configuration(Grid(5, 32, False, False), "gptq", "1")
    with pytest.raises(InputError, match="33 x 96; the GPTQ format needs multiples of 32"):
        gptq.pack(uniform(shape=(33, 96)), "layer", v2=True)
    with pytest.raises(InputError, match="act_order"):
        compressed_tensors.configuration(Grid(4, 32, False, True), [])
    with pytest.raises(InputError, match="groups of 64 do not divide 96 columns"):
        compressed_tensors.pack(uniform(group_size=64), "layer")


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_folder_is_written_for_new_and_old_readers(pristine, tmp_path, format, capsys):
    out = tmp_path / "out"
    assert main(["export", str(pristine.folder), "--format", format, "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == format.removesuffix("_v2")
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tensors = load_file(out / "model.safetensors")
    layers = dict(packed_weights(pristine.folder))
    scales = {name.rpartition(".")[0]: t for name, t in tensors.items() if name.endswith(("scales", "weight_scale"))}
    assert scales.keys() == layers.keys()
    assert main(["export", str(pristine.folder), "--format", format, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_unknown_format_is_refused(pristine, tmp_path):
    with pytest.raises(InputError, match="unknown format 'gtpq'; did you mean 'gptq'"):
        export_checkpoint(pristine.folder, tmp_path / "out", "gtpq")
