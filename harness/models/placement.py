"""Where the decoder blocks of a model lie: all on the compute device, or there one at a time.

A model that is larger than the device stays in host memory; its embeddings, norm and head go to the device, and each
block is brought there when it runs and sent back when another one does. Slower, but quantization and perplexity of a
model then need the memory of one block (besides the activations). A model that is larger than host memory as well is
read from its files block by block: see streaming.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.memory import available_memory
from harness.models.blocks import Blocks, block_linears, find_blocks
from kernels.layouts import PackedWeight
from kernels.linear import put_decoded

# Share of the device's free memory that weights may take: activations and logits need the rest.
WEIGHT_SHARE = 0.8


class Placement:
    """The whole model is on its device: nothing to bring."""

    name = "whole"

    def bring(self, block: nn.Module) -> None:
        """Make `block` one that can be worked on; it stays so until the next call."""

    def replace(self, block: nn.Module, packed: Mapping[str, PackedWeight], folded: Mapping[str, Tensor]) -> None:
        """Let `block` hold what its quantized weights decode to from now on. Names are those inside the block."""
        put(block, packed, folded)

    def remember(self, block: nn.Module, packed: Mapping[str, PackedWeight], folded: Mapping[str, Tensor]) -> None:
        """The same for a block that holds the decoded weights already; matters only where blocks are let go."""


@torch.no_grad()
def put(block: nn.Module, packed: Mapping[str, PackedWeight], folded: Mapping[str, Tensor]) -> None:
    """Copy decoded weights and folded parameters into `block`."""
    linears = block_linears(block)
    for name, weight in packed.items():
        put_decoded(linears[name], weight)
    parameters = dict(block.named_parameters())
    for name, tensor in folded.items():
        parameters[name].copy_(tensor)


class OneBlockAtATime(Placement):
    """Brings a block to `device` before it runs; the one that was there before goes back `home`."""

    name = "one block at a time"

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, home: torch.device) -> None:
        self._device = device
        self._home = home
        self._there: nn.Module | None = None
        for block in blocks:
            block.register_forward_pre_hook(self._before_forward)

    def bring(self, block: nn.Module) -> None:
        """Make `block` the one on the device."""
        if self._there is block:
            return
        if self._there is not None:
            self._there.to(self._home)
        block.to(self._device)
        self._there = block

    def _before_forward(self, block: nn.Module, _: tuple[Any, ...]) -> None:
        self.bring(block)


def place(model: nn.Module, device: torch.device) -> Placement:
    """Move `model` to `device`, whole if it fits; else all but its blocks, which then come one at a time."""
    if device.type == "cpu" or _bytes(model) < WEIGHT_SHARE * available_memory(str(device)):
        model.to(device)
        return Placement()
    blocks = find_blocks(model)
    _move_all_but_blocks(model, blocks, device)
    return OneBlockAtATime(blocks.blocks, device, torch.device("cpu"))


def _move_all_but_blocks(model: nn.Module, blocks: Blocks, device: torch.device) -> None:
    """Move parameters and buffers one by one: `module.to` on a parent would take the blocks along."""
    inside = {id(module) for block in blocks.blocks for module in block.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
