"""Orthogonal transforms with entries +-1."""

import pytest
import torch

from kernels.hadamard import factors, hadamard, rotate

# Orders by Sylvester, by Paley's two constructions, and by their products; what SmolLM2 and larger models need.
ORDERS = (1, 2, 12, 16, 20, 28, 36, 44, 60, 76, 108, 140, 148, 192, 576, 768, 1536, 2560, 9728)


@pytest.mark.parametrize("order", [order for order in ORDERS if order < 1000])
def test_a_hadamard_matrix_has_entries_of_one_and_orthogonal_rows(order):
    ((core, power),) = factors(order)
    matrix = hadamard(core, power)
    assert matrix.shape == (order, order)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (576, ((36, 16),)),
        (1536, ((12, 128),)),
        (14336, ((28, 512),)),
        (4096, ((1, 4096),)),
        (11008, ((1, 8192), (1, 2048), (1, 512), (1, 256))),  # 4 x 43 and 8 x 43 are no Paley orders
        (33, ((1, 32), (1, 1))),
    ],
)
def test_a_length_is_one_piece_wherever_a_construction_reaches_it(length, pieces):
    assert factors(length) == pieces


@pytest.mark.parametrize("length", [1, 7, 33, 36, 64, 80, 192, 576])
def test_the_fast_transform_is_the_dense_product_and_its_inverse_undoes_it(length):
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
    dense = torch.block_diag(*(hadamard(*piece) / (piece[0] * piece[1]) ** 0.5 for piece in factors(length)))
    assert torch.allclose(rotate(x).double(), x.double() @ dense.T, atol=1e-5)
    assert torch.allclose(rotate(rotate(x), inverse=True), x, atol=1e-5)
    assert torch.allclose(rotate(rotate(x, inverse=True)), x, atol=1e-5)


def test_the_result_does_not_depend_on_the_batch_or_on_threads():
    x = torch.randn(40, 576, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x)[7], rotate(x[7:8])[0])
    before = x.clone()
    rotate(x, inverse=True)
    assert torch.equal(x, before)
