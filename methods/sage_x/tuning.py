"""Short training inside a block: it makes good what was lost before it.

Like the schedule of QuIP# (arXiv 2402.04396, section 5) and QTIP: before each group of layers is encoded, train the
weights that come next, the row scales of the layers that are encoded, and the gains of the norms, so that the block's
output on the quantized model's activations comes near the unquantized block's on its own. Or train scales and gains
alone, once, when the whole block is encoded: no code changes then. Errors are weighted by the gradients that reach the
output. The last part of the samples is held out: what does not help there is undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from methods.block import BlockView

# Tokens of one step, in whole samples, at least one.
BATCH_TOKENS = 2048
# Steps in all, in whole passes over the samples, at least one: few samples are seen more often than many, but no sample
# more often than EPOCHS times.
STEPS = 28
EPOCHS = 4
# Share of the samples that is held out, at least one.
HELD_OUT = 0.125
# Steps relative to the size of what is trained: root mean square of a weight matrix, or each scale and gain itself.
WEIGHT_RATE = 5e-3
SCALE_RATE = 3e-3


@dataclass
class Trainable:
    """The parts of a block under training. free: weights by layer. rows: row scales [m] by encoded layer, and bases:
    what they multiply, [m, n]. gains: one-dimensional parameters by their name in the block."""

    free: dict[str, Tensor]
    rows: dict[str, Tensor]
    bases: dict[str, Tensor]
    gains: dict[str, Tensor]
    _steps: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def parameters(self) -> list[dict[str, object]]:
        """Groups for the optimizer: steps from where each part stands, in units of its size."""
        kinds = {"free": self.free, "rows": self.rows, "gains": self.gains}
        for kind, parts in kinds.items():
            for name, value in parts.items():
                self._steps[kind, name] = torch.zeros_like(value, requires_grad=True)
        weights = [step for (kind, _), step in self._steps.items() if kind == "free"]
        scales = [step for (kind, _), step in self._steps.items() if kind != "free"]
        groups: list[dict[str, object]] = [{"params": scales, "lr": SCALE_RATE}] if scales else []
        return [*groups, {"params": weights, "lr": WEIGHT_RATE}] if weights else groups

    def now(self, kind: str, name: str) -> Tensor:
        """A part with its step taken."""
        value, step = getattr(self, kind)[name], self._steps[kind, name]
        return value + step * value.square().mean().sqrt() if kind == "free" else value * (1 + step)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters of the block by name, for `BlockView.forward`."""
        found = {f"{name}.weight": self.now("free", name) for name in self.free}
        for name, base in self.bases.items():
            found[f"{name}.weight"] = self.now("rows", name)[:, None] * base
        return {**found, **{name: self.now("gains", name) for name in self.gains}}


def tune(view: BlockView, targets: Tensor, trainable: Trainable, importance: Tensor, token_weights: Tensor) -> float:
    """Train `trainable` in place; returns the held-out loss relative to what it was, 1.0 if nothing helped.

    targets: [samples, tokens, hidden]. importance: [hidden], token_weights: [samples, tokens], of the errors.
    """
    train, test = split(len(view.hidden))
    if not train or not test:
        return 1.0
    groups = trainable.parameters()

    def loss(batch: Sequence[int]) -> Tensor:
        """Mean over the samples of `batch`; the weights are put together once for all of them."""
        tensors = trainable.tensors()
        lost = [_loss(view, targets, tensors, importance, token_weights, sample) for sample in batch]
        return torch.stack(lost).mean()

    def held_out() -> float:
        with torch.no_grad():
            return float(loss(test))

    # Adam does not mind their size; float16 has no room for those of a mean over tokens.
    size_of_gradients = 4096 if next(view.block.parameters()).dtype == torch.float16 else 1
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    size = max(1, BATCH_TOKENS // view.hidden.shape[1])
    batches = [train[start : start + size] for start in range(0, len(train), size)]
    epochs = epochs_of(STEPS, len(batches))
    total = epochs * len(batches)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    before = held_out()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            with torch.enable_grad():
                (size_of_gradients * loss(batch)).backward()
            optimizer.step()
            rates.step()
    after = held_out()
    if not after < before:
        return 1.0
    with torch.no_grad():
        for kind in ("free", "rows", "gains"):
            parts = getattr(trainable, kind)
            parts.update({name: trainable.now(kind, name).detach() for name in parts})
    return after / before if before else 1.0


def split(samples: int) -> tuple[range, range]:
    """Samples to train on, and the last ones, held out; empty where there is one sample alone."""
    held = max(1, round(HELD_OUT * samples)) if samples > 1 else 0
    return range(samples - held), range(samples - held, samples)


def epochs_of(steps: int, batches: float) -> int:
    """Passes over `batches` that come nearest to so many steps, at most EPOCHS."""
    return min(EPOCHS, max(1, round(steps / batches)))


def _loss(
    view: BlockView,
    targets: Tensor,
    tensors: Mapping[str, Tensor],
    importance: Tensor,
    token_weights: Tensor,
    sample: int,
) -> Tensor:
    output = view.forward(view.hidden[sample : sample + 1], tensors)[0].float()
    error = output - targets[sample].to(output)
    return (error.square() @ importance * token_weights[sample].to(output)).mean()


def norm_gains(module: nn.Module) -> dict[str, Tensor]:
    """One-dimensional parameters of a block or a model (gains of norms), by name; biases are left alone."""
    return {
        name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and name.endswith("weight")
    }
