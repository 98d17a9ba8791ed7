"""Sizes of inputs from the norms in front of layers."""

import torch
from torch import nn

from methods import ModelView
from methods.sage_x.norms import input_energies

SIZE = 16


class Shifted(nn.Module):
    """A norm whose gain is stored less 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, SIZE)
        self.first, self.second, self.third = nn.RMSNorm(SIZE, eps=1e-6), nn.LayerNorm(SIZE, eps=1e-6), Shifted()
        names = ("query", "key", "output", "up", "down", "head")
        self.linears = nn.ModuleDict({name: nn.Linear(SIZE, SIZE, bias=name == "up") for name in names})
        with torch.no_grad():
            for norm in (self.first, self.second, self.third):
                for parameter in norm.parameters():
                    parameter.add_(torch.randn(SIZE))

    def forward(self, ids, use_cache=False):
        x, layers = self.embed(ids), self.linears
        y = self.first(x)
        x = x + layers["output"](layers["query"](y) * layers["key"](y))
        # Some models flatten tokens in front of a layer.
        y = layers["up"](self.second(x).reshape(-1, SIZE)).relu()
        x = x + layers["down"](y).view(x.shape)
        return layers["head"](self.third(x))


def found(model):
    return input_energies(ModelView(model, dict(model.linears.items()), None))


def test_layers_behind_a_norm_have_the_squares_of_its_gain_and_bias():
    model = Model()
    energies = found(model)
    assert list(energies) == ["query", "key", "up", "head"]
    gain, bias = model.second.weight, model.second.bias
    assert torch.allclose(energies["query"], model.first.weight.square(), rtol=1e-4)
    assert torch.equal(energies["key"], energies["query"])
    assert torch.allclose(energies["up"], gain.square() + bias.square(), rtol=1e-4)
    assert torch.allclose(energies["head"], (1 + model.third.weight).square(), rtol=1e-4)


def test_they_are_mean_squares_of_inputs_that_are_alike_before_the_norm():
    model = Model()
    x = torch.randn(20_000, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        measured = model.second(x).square().mean(dim=0)
    assert torch.allclose(found(model)["up"], measured, rtol=0.05)


def test_the_model_is_left_without_hooks():
    model = Model()
    found(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
