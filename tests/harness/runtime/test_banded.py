"""Bands of layers, with the interpreter's products and plain copies in place of a second stream."""

import sys
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from harness.catalog import ShapeEntry
from harness.models.blocks import model_linears
from harness.runtime import architecture
from harness.runtime.banded import Bands
from harness.runtime.build import model_weights
from harness.runtime.decoder import Decoder
from harness.runtime.products import PackedProduct
from harness.runtime.synthetic import synthetic_layer, synthetic_weights
from kernels.errors import InputError
from kernels.triton.launch import gpu_matrix
from methods import create_method

CPU = torch.device("cpu")
# Where there is a GPU, kernels are compiled for it and read nothing else; test_cuda.py has its bands.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")


def weights_on_host():
    model = tiny.build("llama")
    method = create_method("rtn", bits=3, group_size=32)
    packed = {name: method.quantize_linear(linear.weight) for name, linear in model_linears(model).items()}

    def make(index, name, parts, biases):
        matrix = gpu_matrix(parts, CPU)
        if matrix is None:  # 32 rows of keys do not fill a block of 64
            from harness.runtime.build import SideBySide

            return SideBySide([PackedProduct(gpu_matrix([part], CPU)) for part in parts])
        return PackedProduct(matrix)

    return model_weights(model, packed, torch.float32, make)


def banded_weights(layers):
    weights, bands = weights_on_host(), Bands(layers, CPU)
    for block in weights.blocks:
        bands.take(block)
    bands.start()
    return weights, bands


def logits(decoder):
    prompt = tiny.tokens(samples=1, context=2)
    return [decoder.prefill(prompt), decoder.step(prompt[:, :1])]


@pytest.fixture(scope="module")
def resident():
    """Logits of resident weights, and their bytes."""
    weights = weights_on_host()
    return logits(Decoder(weights, 1, 8)), weights.linear_bytes


@interpreted
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_bands_give_the_logits_of_resident_weights(layers, resident):
    expected, stored = resident
    weights, bands = banded_weights(layers)
    for mine, theirs in zip(logits(Decoder(weights, 1, 8, bands)), expected, strict=True):
        assert torch.equal(mine, theirs)
    # All codes are on the host, one or two bands of them on the device.
    assert bands.host_bytes < stored
    assert bands.device_bytes == min(2 if layers < 3 else 1, 3) * layers * bands.host_bytes // 3


def test_dense_weights_cannot_be_banded():
    weights = model_weights(tiny.build("llama"), None, torch.float32)
    with pytest.raises(InputError, match="the banded runtime needs packed weights on a CUDA device"):
        Bands(1, CPU).take(weights.blocks[0])


@interpreted
@pytest.mark.parametrize("layers", [1, 2])
def test_no_more_than_a_band_of_codes_lies_on_the_device_while_a_model_is_made(layers, monkeypatch):
    entry = ShapeEntry(block="llama", layers=4, hidden=64, intermediate=64, heads=1, kv_heads=1, vocabulary=32)
    monkeypatch.setattr(architecture, "shapes", lambda: {"small": entry})
    shape = architecture.catalogued("small")
    layer = synthetic_layer(shape, create_method("sage-ptq"), CPU)
    bands, codes, left = Bands(layers, CPU), [], []

    def made(block):
        matrices = [product.matrix for product in block.products.values()]
        codes.append([weakref.ref(words) for matrix in matrices for words in matrix.codes()])
        bands.take(block)
        left.append(sum(any(words() is not None for words in own) for own in codes))

    def make(index, name, parts, biases):
        return PackedProduct(gpu_matrix(parts, CPU))

    weights = synthetic_weights(shape, layer, CPU, torch.float32, make, made)
    bands.start()
    assert left == [1 % layers, 0] * 2
    tokens = torch.tensor([[1, 2]])
    expected = Decoder(synthetic_weights(shape, layer, CPU, torch.float32, make), 1, 8).prefill(tokens)
    assert torch.equal(Decoder(weights, 1, 8, bands).prefill(tokens), expected)
