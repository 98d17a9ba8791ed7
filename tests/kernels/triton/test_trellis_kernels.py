"""The Triton kernels of the trellis layout against `decode()` in float64: interpreted on a CPU, compiled on a GPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
import examples

from kernels.random_weights import random_trellis
from kernels.triton import trellis
from kernels.triton.launch import gpu_matrix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = tuple(range(16))
# Few columns, since the interpreter is slow. Rows: one ragged block, two lengths of segments, SmolLM2's.
CASES = [((33, 40), ALL), ((300, 16), ALL), ((192, 24), (2, 7)), ((576, 12), (1, 5)), ((1536, 6), (3, 9))]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer that a launch asks for is full of NaN."""
    given = torch.empty

    def empty(*size, **options):
        made = given(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(trellis.torch, "empty", empty)


@pytest.mark.parametrize(("shape", "classes"), CASES)
def test_products_are_those_of_the_decoded_weight(shape, classes):
    torch.manual_seed(0)
    weight = random_trellis(shape, 1, classes=classes, rotated=shape[0] != 33)
    matrix = gpu_matrix([weight], DEVICE)
    for dtype, vectors in ((torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 3)):
        inputs = torch.randn(vectors, shape[1]).to(dtype)
        examples.check_product(matrix.multiply(inputs.to(DEVICE)).cpu(), examples.exact_product(weight, inputs))


def test_more_vectors_than_a_program_takes():
    weight = random_trellis((64, 20), 2)
    inputs = torch.randn(10, 20)
    found = gpu_matrix([weight], DEVICE).multiply(inputs.to(DEVICE)).cpu()
    examples.check_product(found, examples.exact_product(weight, inputs))


def test_each_column_alone_is_exact_without_a_rotation():
    weight = random_trellis((70, 16), 3, rotated=False)
    assert torch.equal(gpu_matrix([weight], DEVICE).multiply(torch.eye(16, device=DEVICE)).cpu(), weight.decode().T)


@pytest.mark.parametrize("rotated", [True, False])
def test_prefill_decodes_the_weight(rotated, monkeypatch):
    monkeypatch.setattr(trellis, "_SCRATCH_WEIGHTS", 33 * 20)  # three pieces
    weight = random_trellis((33, 50), 4, rotated=rotated)
    matrix = gpu_matrix([weight], DEVICE)
    torch.testing.assert_close(matrix.decode(torch.float32).cpu(), weight.decode(), rtol=1e-5, atol=1e-6)
    inputs = torch.randn(trellis.MOST_VECTORS + 1, 50, dtype=torch.float16)
    examples.check_product(matrix.multiply(inputs.to(DEVICE)).cpu(), examples.exact_product(weight, inputs))


@pytest.mark.parametrize("splits", [1, 3])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch):
    monkeypatch.setattr(trellis, "_splits", lambda *_: splits)
    weight = random_trellis((33, 50), 5)
    inputs = torch.randn(1, 50)
    found = gpu_matrix([weight], DEVICE).multiply(inputs.to(DEVICE)).cpu()
    examples.check_product(found, examples.exact_product(weight, inputs))


def test_matrices_with_one_input_stand_side_by_side_and_take_a_bias():
    weights = [random_trellis((rows, 20), rows) for rows in (40, 16)]
    inputs, bias = torch.randn(2, 20), torch.randn(56)
    expected = torch.cat([examples.exact_product(weight, inputs) for weight in weights], dim=1) + bias
    found = gpu_matrix(weights, DEVICE).multiply(inputs.to(DEVICE), bias.to(DEVICE)).cpu()
    examples.check_product(found, expected)


def test_a_weight_of_zeros_and_other_layouts_beside():
    zeros = random_trellis((20, 64), 0, classes=(0,))
    for vectors in (1, trellis.MOST_VECTORS + 1):
        assert not gpu_matrix([zeros], DEVICE).multiply(torch.randn(vectors, 64, device=DEVICE)).any()
    assert gpu_matrix([zeros, examples.make("codebook-4", (20, 64))], DEVICE) is None
