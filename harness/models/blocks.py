"""The decoder blocks of a causal language model and the linear layers in them, found by structure, not by name.

What is quantized: every module of exact type nn.Linear inside the decoder blocks. Embeddings, head, norms and biases
stay as they are (as in the GPTQ family; baselines of all methods here agree on it).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kernels.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """prefix: the name of the list of blocks ("model.layers"). blocks: the decoder blocks in order."""

    prefix: str
    blocks: tuple[nn.Module, ...]

    def name(self, index: int, linear: str) -> str:
        """The name of a linear layer in the whole model."""
        return f"{self.prefix}.{index}.{linear}"


def find_blocks(model: nn.Module) -> Blocks:
    """The largest list of equal modules that hold linear layers. Raises InputError if there is none."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(block) for block in module}) > 1 or not block_linears(module[0]):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        # A strict comparison keeps the outer list when one list contains another with the same parameters.
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks with linear layers")
    return Blocks(best[1], tuple(best[2]))


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a block by their name inside it, in module order. Subclasses of nn.Linear are not touched."""
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}


class UnquantizedLinear(nn.Linear):
    """A linear layer of a decoder block that is left as it is; counted with the norms, in 16 bits."""


def quantize_only(model: nn.Module, count: int) -> None:
    """Leave all decoder blocks of `model` but the first `count` unquantized from now on."""
    for block in find_blocks(model).blocks[count:]:
        for linear in block_linears(block).values():
            linear.__class__ = UnquantizedLinear


def model_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers that are quantized, by their name in the model, in order."""
    blocks = find_blocks(model)
    return {
        blocks.name(index, name): linear
        for index, block in enumerate(blocks.blocks)
        for name, linear in block_linears(block).items()
    }
