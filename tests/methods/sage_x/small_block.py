"""A decoder block small enough to reason about: two gated layers that read one tensor, one behind them, a norm."""

import torch
from torch import nn

from methods import BlockView

HIDDEN, INNER = 32, 48


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(HIDDEN)
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


def view(samples=8, tokens=64, noise=0.3):
    """The block, with inputs of the quantized model that differ from those of the unquantized one by `noise`."""
    block = Block()
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    original = torch.randn(samples, tokens, HIDDEN, generator=generator) @ mix
    hidden = original + noise * torch.randn(original.shape, generator=generator) @ mix
    linears = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    return BlockView(block, hidden, (), {}, linears, targets=block(original), unquantized=original)
