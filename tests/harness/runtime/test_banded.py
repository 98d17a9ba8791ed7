"""Bands of layers, with the interpreter's products and plain copies in place of a second stream."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from harness.models.blocks import model_linears
from harness.runtime.banded import Bands
from harness.runtime.build import model_weights
from harness.runtime.decoder import Decoder
from harness.runtime.products import PackedProduct
from kernels.errors import InputError
from kernels.triton.launch import gpu_matrix
from methods import create_method

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_bands_give_the_logits_of_resident_weights(layers):
    prompt = tiny.tokens(samples=1, context=2)
    weights = weights_on_host()
    decoder = Decoder(weights, 1, 8)
    expected = [decoder.prefill(prompt), decoder.step(prompt[:, :1])]
    stored = weights.linear_bytes
    bands = Bands(weights.blocks, layers, CPU)
    banded = Decoder(weights, 1, 8, bands)
    found = [banded.prefill(prompt), banded.step(prompt[:, :1])]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    # All codes are on the host, one or two bands of them on the device.
    assert bands.host_bytes < stored
    assert bands.device_bytes == min(2 if layers < 3 else 1, 3) * layers * bands.host_bytes // 3


def test_dense_weights_cannot_be_banded():
    weights = model_weights(tiny.build("llama"), None, torch.float32)
    with pytest.raises(InputError, match="the banded runtime needs packed weights on a CUDA device"):
        Bands(weights.blocks, 1, CPU)
