"""APTQ (reconstruction): bits by sensitivity over the whole model, and the Hessian of the attention's output."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import BlockView, LayerContext, LayerStatistics, LayerSurvey, create_method
from methods.aptq import attention_hessians


def survey():
    return {
        "a": LayerSurvey(10, 10, 500.0),  # 5 a weight
        "b": LayerSurvey(10, 20, 200.0),  # 1
        "c": LayerSurvey(10, 10, 300.0),  # 3
        "d": LayerSurvey(10, 10, 50.0),  # 0.5
    }


@pytest.mark.parametrize(
    ("average", "high"), [(2.0, ""), (2.4, "a"), (2.8, "ac"), (3.0, "ac"), (3.6, "abc"), (4.0, "abcd")]
)
def test_the_most_sensitive_layers_get_four_bits_as_far_as_the_average_goes(average, high):
    plan = create_method("aptq", average_bits=average).plan_model(survey())
    assert "".join(name for name in "abcd" if plan[name] == 4) == high
    assert set(plan.values()) <= {2, 4}
    sizes = {name: layer.out_features * layer.in_features for name, layer in survey().items()}
    assert sum(sizes[name] * bits for name, bits in plan.items()) <= average * sum(sizes.values()) + 1e-9


@pytest.mark.parametrize("bits", [2, 4])
def test_a_layer_is_quantized_by_gptq_with_the_bits_of_its_plan(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    statistics = LayerStatistics.from_inputs(torch.randn(4, 64, 64, generator=generator))
    packed = create_method("aptq", group_size=32).quantize_linear(weight, statistics, LayerContext(plan=bits))
    plain = create_method("gptq", bits=bits, group_size=32).quantize_linear(weight, statistics)
    assert torch.equal(packed.decode(), plain.decode())
    assert create_method("aptq").nominal_bits(packed).weight == bits


class Attention(nn.Module):
    """One head, no mask."""

    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.softmax(q @ k.transpose(1, 2) / x.shape[-1] ** 0.5, dim=-1) @ v), None


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self_attn = Attention(width)
        self.mlp = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.mlp(x + self.self_attn(x)[0])


def view_of(samples=300, tokens=3, width=4):
    torch.manual_seed(0)
    block = Block(width).requires_grad_(False)
    # The same sample over and over, so that the average over draws can be told from the average over samples.
    hidden = 2 * torch.randn(1, tokens, width).expand(samples, tokens, width).contiguous()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return BlockView(block, hidden, (), {}, linears)


def test_token_weights_are_those_of_the_jacobian_of_the_attention_output():
    view = view_of()
    attention, x = view.block.self_attn, view.hidden[:1]
    hessians = attention_hessians(view, seed=0)
    assert set(hessians) == {f"self_attn.{name}_proj" for name in "qkvo"}

    def output_of_queries(q):
        k, v = attention.k_proj(x), attention.v_proj(x)
        return attention.o_proj(torch.softmax(q @ k.transpose(1, 2) / 2.0, dim=-1) @ v)

    jacobian = torch.autograd.functional.jacobian(output_of_queries, attention.q_proj(x))
    weights = jacobian.square().sum(dim=(0, 1, 2)).sum(dim=-1).view(-1)  # a token: |d output / d q_t|^2
    weighted = (x[0].T * (weights / weights.mean())) @ x[0]
    found = hessians["self_attn.q_proj"]
    assert torch.allclose(found / found.trace(), weighted / weighted.trace(), atol=0.05)
    plain = x[0].T @ x[0]
    assert not torch.allclose(found / found.trace(), plain / plain.trace(), atol=0.05)


def test_the_layer_that_ends_the_attention_keeps_its_ordinary_hessian():
    view = view_of()
    seen = []
    handle = view.block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    view.run(0)
    handle.remove()
    plain = seen[0][0].T @ seen[0][0]
    found = attention_hessians(view, seed=0)["self_attn.o_proj"]
    assert torch.allclose(found / found.trace(), plain / plain.trace(), atol=0.05)


def test_samples_with_large_gradients_count_for_more():
    view = view_of(samples=200)
    # Keys of the second kind of sample hardly differ, so that its queries hardly matter.
    kinds = view.hidden[:1], view.hidden[:1].mean(dim=1, keepdim=True) + 0.01 * torch.randn(1, 3, 4)
    first, second = (kind.expand(100, 3, 4) for kind in kinds)
    found = [
        attention_hessians(replace(view, hidden=torch.cat(pair)), seed=0)["self_attn.q_proj"]
        for pair in ((first, first), (first, second), (second, second))
    ]
    first, both, second = (hessian / hessian.norm() for hessian in found)
    assert (both * first).sum() > 0.99
    assert (both * second).sum() < 0.9


def test_a_block_without_attention_has_no_attention_hessians():
    block = nn.Sequential(nn.Linear(4, 4))
    view = BlockView(block, torch.randn(2, 3, 4), (), {}, {"0": block[0]})
    assert attention_hessians(view, seed=0) == {}
