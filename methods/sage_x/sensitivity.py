"""What an error in each layer costs the whole model: its output gradients on calibration text.

With labels drawn from the model's own predictions the mean outer product of the log-likelihood's gradients is the
Fisher information, and an error E of a layer's weight costs 1/2 sum over tokens of E[(g_t . E x_t)^2] nats of KL
divergence. In the manner of GuidedQuant (Kim et al. 2025, arXiv 2505.07004, with one group) and K-FAC, g_t g_t^T is
replaced by a weight a token times a diagonal over the outputs: cost = 1/2 tr(diag(importance) E H E^T), H = mean over
tokens of weight_t x_t x_t^T. weight_t is the size of g_t and not its square, as there: squares let a few tokens rule
H, and what is known of so few says little of other text. The price is that a token with a large input and a small
gradient (an attention sink) counts for more than its share of the divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.errors import InputError, NumericalError
from methods.hessian import accumulate
from methods.model import ModelView


@dataclass
class Sensitivity:
    """hessian: [n, n], mean over tokens, weighted. importance: [m], mean squared gradient of each output.
    token_weights: [samples, tokens], mean 1."""

    hessian: Tensor
    importance: Tensor
    token_weights: Tensor


def measure(view: ModelView, seed: int) -> dict[str, Sensitivity]:
    """The sensitivity of every layer of `view`, from one forward and one backward pass over each of its windows."""
    assert view.windows is not None
    generator = torch.Generator().manual_seed(seed)
    probe = _Probe(view.linears)
    with probe, torch.enable_grad():
        for window in view.windows:
            _backward(view.model, window[None], generator)
    return probe.result()


def _backward(model: nn.Module, window: Tensor, generator: torch.Generator) -> None:
    """Gradients of sum over tokens of log p(drawn successor)."""
    device = next(model.parameters()).device
    # Parameters are frozen: the graph begins at the embeddings.
    embed: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embed.register_forward_hook(lambda module, args, output: output.detach().requires_grad_(True))
    try:
        logits = model(window.to(device), use_cache=False).logits[0]
    finally:
        handle.remove()
    with torch.no_grad():
        chances = logits.float().softmax(-1).cpu()
        if not torch.isfinite(chances).all():
            raise NumericalError("the model's logits overflow on calibration text; try --dtype float32 or bfloat16")
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(device)
    nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()


class _Probe:
    """Hooks that meet each layer's input with the gradient of its output."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._linears = linears
        self._handles: list[Any] = []
        self._hessians: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] = {}
        self._weights: dict[str, list[Tensor]] = {name: [] for name in linears}

    def __enter__(self) -> _Probe:
        for name, linear in self._linears.items():
            hook = lambda _, args, output, name=name: self._watch(name, args[0], output)  # noqa: E731
            self._handles.append(linear.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str, x: Tensor, output: Tensor) -> None:
        x = x.detach()
        output.register_hook(lambda gradient: self._add(name, x, gradient))

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        # One sample, whose tokens some models (OPT) hand on without their leading axis.
        squared = gradient.detach().float().flatten(0, -2).square()
        weights = squared.mean(dim=1).sqrt()
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            self._importance[name] = torch.zeros(squared.shape[1], device=x.device)
        accumulate(self._hessians[name], x.float().flatten(0, -2) * weights.sqrt()[:, None])
        self._importance[name] += squared.sum(dim=0)
        self._weights[name].append(weights)

    def result(self) -> dict[str, Sensitivity]:
        found = {}
        for name, weights in self._weights.items():
            if not weights:
                raise InputError(f"layer {name} received no calibration tokens; use more --calibration-samples")
            token_weights = torch.stack(weights)
            total = float(token_weights.sum()) or 1.0
            found[name] = Sensitivity(
                hessian=self._hessians[name] / total,
                importance=self._importance[name] / token_weights.numel(),
                token_weights=token_weights * (token_weights.numel() / total),
            )
        return found
