"""Accumulation, damping and the factor of the inverse: each against its definition."""

import pytest
import torch

from kernels.errors import NumericalError
from methods.hessian import accumulate, damped, factorize, proxy_loss


def correlated(features=32, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return x.T @ x / tokens


@pytest.mark.parametrize("shape", [(1, 5), (17, 5), (3, 7, 5), (2, 3, 4, 5)])
def test_accumulate_adds_the_gram_matrix(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    total = torch.eye(5)
    accumulate(total, x)
    flat = x.reshape(-1, 5).double()
    torch.testing.assert_close(total.double(), torch.eye(5).double() + flat.T @ flat, rtol=1e-5, atol=1e-5)
    assert torch.equal(total, total.T)


def test_accumulate_reads_inputs_in_any_memory_order():
    x = torch.randn(5, 40).T
    total = torch.zeros(5, 5)
    accumulate(total, x)
    torch.testing.assert_close(total, x.T @ x, rtol=1e-5, atol=1e-5)


def test_accumulate_of_no_tokens_adds_nothing():
    total = torch.eye(5)
    accumulate(total, torch.zeros(0, 5))  # an expert that no token was routed to
    assert torch.equal(total, torch.eye(5))


def test_damping_is_a_share_of_the_mean_diagonal():
    hessian = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    before = hessian.clone()
    matrix, dead = damped(hessian, 0.1)
    torch.testing.assert_close(matrix.diagonal(), torch.tensor([1.3, 2.3, 6.3]))
    assert not dead.any()
    assert torch.equal(hessian, before)


def test_dead_inputs_get_a_diagonal_of_one_before_the_mean_is_taken():
    hessian = torch.diag(torch.tensor([4.0, 0.0, 7.0]))
    matrix, dead = damped(hessian, 0.5)
    assert dead.tolist() == [False, True, False]
    torch.testing.assert_close(matrix.diagonal(), torch.tensor([6.0, 3.0, 9.0]))  # 0.5 * mean(4, 1, 7) = 2


def test_the_factor_is_upper_triangular_and_gives_the_inverse():
    hessian = correlated()
    factor = factorize(hessian, 0.01)
    matrix, _ = damped(hessian, 0.01)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    assert torch.equal(factor.diagonal(), factor.upper.diagonal())
    inverse = torch.linalg.inv(matrix.double())
    assert ((factor.upper.T @ factor.upper) - inverse).abs().max() < 1e-4 * inverse.abs().max()


def test_the_factor_is_exact_to_float32_also_of_an_ill_conditioned_hessian():
    hessian = correlated(features=96, tokens=200)
    exact = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, 1e-5)[0].double()), upper=True)
    difference = (factorize(hessian, 1e-5).upper - exact).abs().max()
    assert difference < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("j", torch.randint(0, 32, (3,), generator=torch.Generator().manual_seed(5)).tolist())
def test_squared_diagonal_is_the_obs_pivot_of_the_columns_not_yet_frozen(j):
    hessian = correlated()
    matrix, _ = damped(hessian, 0.01)
    pivot = torch.linalg.inv(matrix[j:, j:].double())[0, 0]
    assert float(factorize(hessian, 0.01).diagonal()[j]) ** 2 == pytest.approx(float(pivot), rel=1e-4)


def test_dead_inputs_do_not_touch_the_others():
    hessian = correlated()
    hessian[5, :] = hessian[:, 5] = 0
    factor = factorize(hessian, 0.01)
    assert factor.dead.nonzero().view(-1).tolist() == [5]
    off_diagonal = factor.upper.clone()
    off_diagonal[5, 5] = 0
    assert not off_diagonal[5, :].any()
    assert not off_diagonal[:, 5].any()


def test_a_rank_deficient_hessian_is_handled_by_the_damping_asked_for():
    x = torch.randn(3, 64)  # 3 tokens for 64 features
    factor = factorize(x.T @ x, 0.01)
    assert factor.damping == 0.01
    assert torch.isfinite(factor.upper).all()


def test_damping_is_raised_tenfold_until_the_hessian_is_positive_definite():
    # Eigenvalues 2.05 and -0.05: a share of 0.01 is too little, 0.1 is enough.
    factor = factorize(torch.tensor([[1.0, 1.05], [1.05, 1.0]]), 0.01)
    assert factor.damping == pytest.approx(0.1)
    expected = torch.linalg.inv(torch.tensor([[1.1, 1.05], [1.05, 1.1]]))
    torch.testing.assert_close(factor.upper.T @ factor.upper, expected, rtol=1e-4, atol=1e-4)


def test_a_hopeless_hessian_is_reported():
    with pytest.raises(NumericalError, match="not positive definite even with damping=1000; calibrate on more text"):
        factorize(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_reported(bad):
    hessian = correlated()
    hessian[3, 4] = bad
    with pytest.raises(NumericalError, match="the Hessian holds NaN or infinity"):
        factorize(hessian, 0.01)


def test_proxy_loss_is_the_share_of_the_output_energy_that_is_lost():
    torch.manual_seed(0)
    x, weight = torch.randn(500, 12), torch.randn(5, 12)
    quantized = weight + 0.1 * torch.randn(5, 12)
    lost = ((x @ weight.T - x @ quantized.T).square().sum() / (x @ weight.T).square().sum()).item()
    assert proxy_loss(weight, quantized, x.T @ x) == pytest.approx(lost, rel=1e-4)
    assert proxy_loss(weight, weight, x.T @ x) == 0
    assert proxy_loss(weight, torch.zeros_like(weight), x.T @ x) == pytest.approx(1)
    assert proxy_loss(torch.zeros(5, 12), torch.zeros(5, 12), x.T @ x) == 0
