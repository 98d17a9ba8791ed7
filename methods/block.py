"""A whole decoder block, for methods that search over more than one linear layer at a time (AWQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernels.layouts import PackedWeight


@dataclass(frozen=True)
class BlockView:
    """A decoder block and what calibration puts in front of it.

    hidden: [samples, tokens, hidden], the block's inputs. extra, arguments: what its forward pass is
    handed besides them, by position and by keyword. linears: its linear layers by their name inside it. original: the
    block's inputs in the unquantized model, like hidden, where the method asked for both; hidden is then what comes
    through the quantized blocks.
    """

    block: nn.Module
    hidden: Tensor
    extra: tuple[Any, ...]
    arguments: dict[str, Any]
    linears: dict[str, nn.Linear]
    original: Tensor | None = None

    @torch.no_grad()
    def run(self, sample: int) -> Tensor:
        """Output [1, tokens, hidden] of the block for one sample, as its weights are now."""
        device = next(self.block.parameters()).device
        output = self.block(self.hidden[sample : sample + 1].to(device), *self.extra, **self.arguments)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class BlockResult:
    """packed: every linear layer of the block. targets: the weights that they stand for, where folding changed them.
    folded: names (inside the block) of unquantized parameters that were changed in place. original_outputs: of the
    unquantized block on `BlockView.original`, from methods that asked for both streams."""

    packed: Mapping[str, PackedWeight]
    targets: dict[str, Tensor] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    original_outputs: Tensor | None = None
