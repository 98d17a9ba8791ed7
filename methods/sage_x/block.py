"""One decoder block: its groups of layers encoded in the order in which they run, with training in between or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels.layouts import TrellisWeight
from methods.block import BlockResult, BlockView
from methods.sage_x.encoder import Pivots
from methods.sage_x.moments import STRENGTH, Original, group_moments
from methods.sage_x.recipe import Recipe, Tuning
from methods.sage_x.sensitivity import Sensitivity
from methods.sage_x.tuning import Trainable, norm_gains, tune

# (name inside the block, target weight, pivots of its inputs) -> the packed weight.
Encode = Callable[[str, Tensor, Pivots], TrellisWeight]


class BlockEncoder:
    """Encodes the block of `view`; its decoded weights are left in the block.

    weights: the unquantized weights by layer, float32. sensitivity: by layer, may be empty.
    """

    def __init__(
        self, view: BlockView, weights: dict[str, Tensor], sensitivity: Mapping[str, Sensitivity], recipe: Recipe
    ) -> None:
        self._view = view
        self._weights = dict(weights)
        self._sensitivity = sensitivity
        self._recipe = recipe
        self._original = Original.of(view)
        self._packed: dict[str, TrellisWeight] = {}
        self._tuned: list[float] = []

    def run(self, encode: Encode, tuning: Tuning) -> BlockResult:
        """Encode every group. Scales and gains are trained at the end, or with the weights before each group too."""
        originals = dict(self._weights)
        for index, names in enumerate(self._original.groups):
            moments = group_moments(self._view, self._original, index, self._token_weights(names))
            strength = 0.0 if "targets" in self._recipe.without else STRENGTH
            for name in names:
                self._weights[name] = moments.target(self._weights[name], self._recipe.damping, strength)
            if tuning in ("blocks", "model"):
                self._train(names)
            pivots = Pivots.of(moments.hessian, self._recipe)
            for name in names:
                self._packed[name] = encode(name, self._weights[name], pivots)
            self._install()
        if tuning != "none":
            self._train(())
            self._install()
        folded = tuple(norm_gains(self._view.block)) if tuning != "none" else ()
        packed = {name: self._packed[name] for name in self._view.linears}
        return BlockResult(packed, originals, folded)

    @property
    def tuned(self) -> list[float]:
        """For each training the loss on held-out samples relative to that before it."""
        return self._tuned

    def _install(self) -> None:
        """Put the weights as they are now into the block: decoded where they are encoded."""
        with torch.no_grad():
            for name, linear in self._view.linears.items():
                packed = self._packed.get(name)
                linear.weight.copy_(self._weights[name] if packed is None else packed.decode(linear.weight.dtype))

    def _token_weights(self, names: tuple[str, ...]) -> Tensor | None:
        """Layers that share their inputs share their Hessian, so their tokens' weights are averaged."""
        known = [self._sensitivity[name].token_weights for name in names if name in self._sensitivity]
        return torch.stack(known).mean(dim=0) if known else None

    def _train(self, free: tuple[str, ...]) -> None:
        rows = {name: packed.row_scales().float() for name, packed in self._packed.items()}
        bases = {name: packed.unscaled_rows() for name, packed in self._packed.items()}
        device = next(self._view.block.parameters()).device
        trainable = Trainable(
            free={name: self._weights[name].to(device) for name in free},
            rows={name: scales.to(device) for name, scales in rows.items()},
            bases={name: base.to(device) for name, base in bases.items()},
            gains={name: gain.float() for name, gain in norm_gains(self._view.block).items()},
        )
        targets = self._original.outputs
        # What reaches the output of the block reaches the residual stream as the output of its last layer does.
        last = self._sensitivity.get(self._original.groups[-1][-1])
        importance = torch.ones(targets.shape[-1]) if last is None else last.importance / last.importance.mean()
        token_weights = torch.ones(targets.shape[:2]) if last is None else last.token_weights
        self._tuned.append(tune(self._view, targets, trainable, importance.to(device), token_weights))
        self._weights.update(trainable.free)
        for name, scales in trainable.rows.items():
            self._packed[name] = self._packed[name].with_row_scales(scales)
        parameters = dict(self._view.block.named_parameters())
        with torch.no_grad():
            for name, gain in trainable.gains.items():
                # Unquantized parameters count 16 bits each: what they hold must fit in them.
                parameters[name].copy_(gain.half())
        self._install()
