"""What norms tell of the inputs behind them when there is no data.

A norm leaves its inputs with mean square 1 and multiplies them by its gain (and adds its bias): taken all alike before
that, input j of a layer behind it has mean square gain_j^2 + bias_j^2. Which layers read which norm, and what a norm
computes (Gemma's gains are stored less 1), is seen by running them: no model family needs a list of names. The tokens
that are run carry no information; only who reads whom is looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from methods.model import ModelView


@torch.no_grad()
def input_energies(view: ModelView) -> dict[str, Tensor]:
    """Mean square of each input of the layers of `view` that read a norm: [in_features], float32, by layer name.

    Layers that read anything else (attention's output, the activations of a feed-forward layer) have no entry.
    """
    written: list[tuple[nn.Module, Tensor]] = []
    found: dict[str, Tensor] = {}

    def write(norm: nn.Module, output: object) -> None:
        if isinstance(output, Tensor):
            written.append((norm, output))

    def read(name: str, x: Tensor) -> None:
        # A reshaped tensor is another object with the same memory, which `written` keeps from being used again.
        for norm, output in written:
            if (x.data_ptr(), x.numel()) == (output.data_ptr(), output.numel()):
                found[name] = _mean_square(norm, output)

    handles: list[Any] = []
    try:
        for norm in filter(_is_norm, view.model.modules()):
            handles.append(norm.register_forward_hook(lambda norm, _, output: write(norm, output)))
        for name, linear in view.linears.items():
            handles.append(linear.register_forward_pre_hook(lambda _, args, name=name: read(name, args[0])))
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(view.model.parameters()).device)
        view.model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether all that `module` has is one-dimensional: a gain, and perhaps a bias."""
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.dim() == 1 for parameter in parameters) and not list(module.children())


def _mean_square(norm: nn.Module, output: Tensor) -> Tensor:
    """Mean square of each output of `norm` on inputs of size 1, mean 0 and either sign: [n], float32."""
    signs = torch.ones(1, output.shape[-1], dtype=output.dtype, device=output.device)
    signs[:, 1::2] = -1
    # `forward` alone: the hooks need not hear of it.
    plus, minus = (norm.forward(x)[0].float().square() for x in (signs, -signs))
    return (plus + minus) / 2
