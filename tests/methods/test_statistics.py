"""What calibration knows: the Hessian of a layer's inputs, in the scale of the released GPTQ code."""

import pytest
import torch

from kernels.errors import InputError
from methods import LayerContext, LayerStatistics, create_method
from methods.hessian import damped


def inputs(samples=5, tokens=33, features=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    return torch.randn(samples, tokens, features, generator=generator) @ mix


def reference(x):
    """2/samples times the sum over samples of X^T X, in float64."""
    return 2 / x.shape[0] * sum(sample.double().T @ sample.double() for sample in x)


def test_hessian_is_the_definition():
    x = inputs()
    statistics = LayerStatistics.from_inputs(x)
    exact = reference(x)
    assert statistics.hessian.dtype == torch.float32
    assert torch.equal(statistics.hessian, statistics.hessian.T)
    assert (statistics.hessian - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_hessian_follows_the_running_mean_of_the_released_code():
    x = inputs()
    hessian = torch.zeros(24, 24)
    for count, sample in enumerate(x, start=1):
        hessian *= (count - 1) / count
        hessian += 2 / count * sample.T @ sample
    torch.testing.assert_close(LayerStatistics.from_inputs(x).hessian, hessian, rtol=1e-5, atol=1e-3)


def test_samples_are_sequences_and_tokens_are_counted():
    x = inputs(samples=3, tokens=7)
    statistics = LayerStatistics.from_inputs(x)
    assert (statistics.samples, statistics.tokens, statistics.in_features) == (3, 21, 24)
    # One long sequence instead of three: the same X^T X, a third of the divisor.
    longer = LayerStatistics.from_inputs(x.reshape(1, 21, 24))
    torch.testing.assert_close(longer.hessian, 3 * statistics.hessian, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_float_dtype_are_summed_in_float32(dtype):
    x = (inputs() / 10).to(dtype)
    exact = reference(x)
    hessian = LayerStatistics.from_inputs(x).hessian
    assert hessian.dtype == torch.float32
    assert (hessian - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_inputs_are_kept_unchanged():
    x = inputs()
    before = x.clone()
    statistics = LayerStatistics.from_inputs(x)
    assert torch.equal(x, before)
    assert torch.equal(statistics.inputs, before)


def test_inputs_from_a_graph_are_accepted():
    x = inputs().requires_grad_()
    assert not LayerStatistics.from_inputs(x).hessian.requires_grad


@pytest.mark.parametrize("shape", [(4, 8), (8,), (1, 2, 3, 4), (0, 4, 8), (2, 0, 8)])
def test_inputs_of_another_form_are_refused(shape):
    with pytest.raises(InputError, match=r"inputs are .*must be \[samples, tokens, in_features\]"):
        LayerStatistics.from_inputs(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    x = inputs()
    x[2, 3, 4] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        LayerStatistics.from_inputs(x)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 4, 4)])
def test_a_hessian_that_is_not_square_is_refused(shape):
    with pytest.raises(InputError, match=r"hessian is .*must be \[in_features, in_features\]"):
        LayerStatistics.from_hessian(torch.zeros(shape))


def test_the_factor_is_computed_once_and_leaves_the_hessian_alone():
    statistics = LayerStatistics.from_inputs(inputs())
    before = statistics.hessian.clone()
    first = statistics.inverse_factor(0.01)
    assert statistics.inverse_factor(0.01) is first
    assert statistics.inverse_factor(0.1).damping == 0.1
    assert torch.equal(statistics.hessian, before)


def test_the_factor_belongs_to_the_damped_hessian():
    statistics = LayerStatistics.from_inputs(inputs())
    upper = statistics.inverse_factor(0.01).upper.double()
    matrix, _ = damped(statistics.hessian, 0.01)
    assert (upper.T @ upper @ matrix.double() - torch.eye(24)).abs().max() < 1e-3


def test_a_method_that_needs_statistics_says_so():
    with pytest.raises(InputError, match=r"q_proj: method 'gptq' needs the layer's inputs"):
        create_method("gptq").quantize_linear(torch.randn(4, 128), None, LayerContext("q_proj"))


def test_statistics_of_another_width_are_refused():
    statistics = LayerStatistics.from_inputs(inputs())
    with pytest.raises(InputError, match=r"q_proj: statistics of 24 input features, weight has in_features=128"):
        create_method("gptq").quantize_linear(torch.randn(4, 128), statistics, LayerContext("q_proj"))
