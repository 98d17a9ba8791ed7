"""Products of trellis weights on a CPU against `decode()` in float64, for every instruction set that this CPU has."""

import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu import build, cpu_matrix, trellis
from kernels.layouts.trellis_tables import WIDTHS
from kernels.linear import PackedLinear, decode_and_multiply, pick_product
from kernels.products import kernel_product
from kernels.random_weights import random_trellis

sys.path.insert(0, str(Path(__file__).parents[1]))
import examples

# Few rows, streams that end inside a byte, several segments (of two lengths), SmolLM2's shapes, more than one slab.
SHAPES = [(16, 40), (33, 70), (192, 64), (300, 40), (520, 31), (576, 300), (1536, 24)]
SETS = [name for name in build.supported() if build.library_path(name, trellis._SOURCE) is not None]
needs_compiler = pytest.mark.skipif(not SETS, reason="no C++ compiler")


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CPU", request.param)
    return request.param


@needs_compiler
@pytest.mark.parametrize("rotated", [True, False])
def test_products_are_those_of_the_decoded_weight(rotated, instruction_set):
    torch.manual_seed(0)
    for seed, shape in enumerate(SHAPES):
        weight = random_trellis(shape, seed, rotated=rotated)
        matrix = cpu_matrix([weight])
        dense = weight.decode().double()
        for dtype, vectors in zip((*examples.TOLERANCE, torch.float32), (1, 3, 1, 6), strict=True):
            inputs = torch.randn(vectors, shape[1]).to(dtype)
            examples.check_product(matrix.multiply(inputs), inputs.double() @ dense.T)


@needs_compiler
@pytest.mark.parametrize("rate_class", range(1, len(WIDTHS)))
def test_each_column_of_a_class_alone_is_exact(rate_class, instruction_set):
    """Without a rotation a product with one input is a table value times two scales: one bit or row off shows."""
    weight = random_trellis((269, 6), rate_class, classes=(rate_class,), rotated=False)
    assert torch.equal(cpu_matrix([weight]).multiply(torch.eye(6)), weight.decode().T)


@needs_compiler
def test_matrices_with_one_input_stand_side_by_side(instruction_set):
    weights = [random_trellis((rows, 300), rows) for rows in (576, 192, 192)]
    for vectors in (1, 5):
        inputs = torch.randn(vectors, 300)
        found = cpu_matrix(weights).multiply(inputs)
        for part, weight in zip(found.split((576, 192, 192), dim=1), weights, strict=True):
            examples.check_product(part, examples.exact_product(weight, inputs))


@needs_compiler
def test_a_weight_of_zeros_and_other_layouts_beside():
    zeros = random_trellis((20, 64), 0, classes=(0,))
    assert not cpu_matrix([zeros]).multiply(torch.randn(2, 64)).any()
    assert cpu_matrix([zeros, examples.make("codebook-4", (20, 64))]) is None


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads_or_on_other_vectors():
    matrix = cpu_matrix([random_trellis((576, 600), 0)])
    inputs = torch.randn(5, 600)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = matrix.multiply(inputs)
        torch.set_num_threads(2)
        assert torch.equal(matrix.multiply(inputs), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([matrix.multiply(x[None]) for x in inputs]), alone)
    assert torch.equal(matrix.copy().multiply(inputs), alone)


@needs_compiler
def test_a_packed_layer_multiplies_by_the_kernel():
    weight = random_trellis((64, 96), 0)
    bias = torch.randn(64)
    layer = PackedLinear.from_packed(weight, bias)
    inputs = torch.randn(2, 3, 96)
    assert pick_product(inputs, layer.packed) is kernel_product
    examples.check_product(layer(inputs), examples.exact_product(weight, inputs) + bias)
    assert pick_product(torch.randn(100, 96), layer.packed) is decode_and_multiply


def test_without_a_library_there_is_no_matrix(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CPU", "torch")
    assert cpu_matrix([random_trellis((16, 8), 0)]) is None
