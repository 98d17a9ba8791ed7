"""SliM-LLM+: learned clipping, on a layer alone and on a decoder block."""

import pytest
import torch

from methods import LayerContext, LayerStatistics, create_method
from methods.hessian import proxy_loss


def layer(rows=32, columns=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4, 96, columns, generator=generator) @ mix
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    weight[::5, ::13] *= 6
    return weight, LayerStatistics.from_inputs(x)


def plus(weight, statistics, context=None, **options):
    options = {"group_size": 32, **options}
    return create_method("slim-llm-plus", **options).quantize_linear(weight, statistics, context)


@pytest.mark.parametrize("bits", [2, 3])
def test_clipping_that_was_learned_loses_less_than_the_range_it_began_with(bits):
    weight, statistics = layer()
    few, many = (
        proxy_loss(
            weight, plus(weight, statistics, bits=bits, epochs=epochs, learning_rate=0.05).decode(), statistics.hessian
        )
        for epochs in (1, 60)
    )
    assert many < 0.95 * few


def test_its_widths_are_those_of_slim_llm():
    weight, statistics = layer()
    contexts = LayerContext(), LayerContext()
    plus(weight, statistics, contexts[0], epochs=1)
    create_method("slim-llm", group_size=32).quantize_linear(weight, statistics, contexts[1])
    assert contexts[0].facts["widths"] == contexts[1].facts["widths"]
    assert set(contexts[0].facts["widths"]) == {1, 2, 3}


def test_one_bit_groups_lose_their_mean_in_the_released_code_alone():
    weight, statistics = layer()
    context = LayerContext()
    corrected = plus(weight, statistics, context, epochs=1)
    low = context.facts["widths"].index(1)
    group = slice(32 * low, 32 * low + 32)
    shifted = weight.clone()
    shifted[:, group] += 0.02
    context = LayerContext()
    corrected, faithful = (
        plus(shifted, statistics, context, epochs=1, faithful=flag, scale_dtype="float32") for flag in (False, True)
    )
    assert int(faithful.column_widths()[group].min()) == int(corrected.column_widths()[group].min()) == 1
    mean = shifted[:, group].mean(dim=1)
    levels = [(packed.decode()[:, group].amin(dim=1) + packed.decode()[:, group].amax(dim=1)) / 2
              for packed in (corrected, faithful)]  # fmt: skip
    assert torch.allclose(levels[0], mean, atol=1e-6)
    assert torch.allclose(levels[1], torch.zeros_like(mean), atol=1e-6)


def test_gradients_end_at_the_zero_point_in_the_released_code_alone():
    from methods.slim_llm.plus import _ClippedWeight

    # Ends -1.02 and 1, two bits: the zero point is 2 (1.515 rounded), and the largest weight is clipped to code 3.
    weight, low, zero = torch.tensor([[-1.02, -0.9, 0.2, 1.0]]), -1.02, 1.02 * 3 / 2.02
    gradients = []
    for faithful in (False, True):
        clipped = _ClippedWeight(weight, [2], 4, torch.float32, faithful=faithful)
        clipped.rounded()[0, 3].backward()
        gradients.append(clipped.logits.grad.flatten())
    of_sigmoid = torch.sigmoid(torch.tensor(4.0)) * torch.sigmoid(torch.tensor(-4.0))
    of_scale = of_sigmoid * torch.tensor([1.0, -low]) / 3  # for the logits of the upper and the lower end
    # Decoded: (3 - zero) * scale. The zero point is -low / scale, and counts as such where gradients pass through it.
    assert torch.allclose(gradients[1], (3 - 2) * of_scale, rtol=1e-4)
    assert torch.allclose(gradients[0], (3 - 2 + zero) * of_scale + of_sigmoid * torch.tensor([0.0, low]), rtol=1e-4)


def test_the_weight_that_was_learned_with_is_the_one_that_is_stored():
    """Rounding while learning and packing agree, but for constants that are rounded when stored."""
    from methods.slim_llm.plus import _ClippedWeight

    weight, _ = layer()
    for faithful in (False, True):
        clipped = _ClippedWeight(weight, [2, 1, 3, 2, 4], 32, torch.float32, faithful=faithful)
        with torch.no_grad():
            clipped.logits.copy_(1 + torch.rand(2, 32, 5, generator=torch.Generator().manual_seed(1)))
        assert torch.allclose(clipped.pack().decode(), clipped.rounded().detach(), rtol=1e-5, atol=1e-7)


def test_a_matrix_of_zeros_stays_zero_in_one_bit_groups_too():
    weight, statistics = layer()
    context = LayerContext()
    for method in ("slim-llm", "slim-llm-plus"):
        packed = create_method(method, group_size=32).quantize_linear(torch.zeros_like(weight), statistics, context)
        assert 1 in context.facts["widths"]
        assert not packed.decode().any()
