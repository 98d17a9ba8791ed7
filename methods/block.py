"""A whole decoder block, for methods that look at more than one of its linear layers at a time, such as AWQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.layouts import PackedWeight
from methods.statistics import LayerStatistics


@dataclass(frozen=True)
class BlockView:
    """A decoder block and what calibration puts in front of it.

    hidden: [samples, tokens, hidden], the block's inputs. extra, arguments: what its forward pass is
    handed besides them, by position and by keyword. linears: its linear layers by their name inside it. collect: gives
    the statistics of its layers' inputs, as its weights are now. targets: [samples, tokens, hidden], the outputs that
    the unquantized model has here, and unquantized, the inputs; both None unless the method's `stream` is "both".
    """

    block: nn.Module
    hidden: Tensor
    extra: tuple[Any, ...]
    arguments: dict[str, Any]
    linears: dict[str, nn.Linear]
    collect: Callable[[Literal["hessian", "inputs"]], dict[str, LayerStatistics]] | None = None
    targets: Tensor | None = None
    unquantized: Tensor | None = None

    @torch.no_grad()
    def run(self, sample: int) -> Tensor:
        """Output [1, tokens, hidden] of the block for one sample, as its weights are now."""
        return self.forward(self.hidden[sample : sample + 1], {})

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Output [samples, tokens, hidden] on `hidden`, with `weights` (parameters by name) in place of its own.

        Gradients reach `weights`, unless the caller switched them off.
        """
        hidden = hidden.to(next(self.block.parameters()).device)
        given = {name: tensor.to(self.block.get_parameter(name).dtype) for name, tensor in weights.items()}
        output = torch.func.functional_call(self.block, given, (hidden, *self.extra), self.arguments)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class BlockResult:
    """packed: every linear layer of the block. targets: the weights that they stand for, where folding changed them.
    folded: names (inside the block) of unquantized parameters that were changed in place. hessians: X^T X [n, n] of the
    inputs that the targets see, up to a factor, from which the harness takes each layer's proxy loss."""

    packed: Mapping[str, PackedWeight]
    targets: dict[str, Tensor] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    hessians: dict[str, Tensor] = field(default_factory=dict)
