"""One decoder block in the order in which its layers run: each group of layers is encoded against what the layers
before it have become, toward what they were.

x: the inputs of a group in the unquantized model, y: in the quantized one. The best weight to encode is then not W but

    W* = argmin E ||W x - Q y||^2 = W S G^-1,   G = E[y y^T],  S = E[x y^T],

and for any Q the loss is tr((Q - W*) G (Q - W*)^T) plus a constant: errors of earlier layers are made good by the later
ones, with the same encoder. (GPTAQ, arXiv 2504.02692, and QEP, 2504.09629, derive column-wise forms of it.) W* overfits
the calibration text, so the target goes only part of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.errors import InputError
from methods.block import BlockView
from methods.hessian import accumulate, damped

# How far the target goes from W to W*; QEP's default too.
STRENGTH = 0.5


class _Stop(Exception):
    """Leaves a forward pass once the inputs wanted have been seen."""


@dataclass(frozen=True)
class Original:
    """The block in the unquantized model. groups: layers that read the same tensor, in the order in which they run.
    inputs: for each group one [tokens, n] a sample. outputs: [samples, tokens, hidden]."""

    groups: tuple[tuple[str, ...], ...]
    inputs: tuple[list[Tensor], ...]
    outputs: Tensor

    @classmethod
    def of(cls, view: BlockView) -> Original:
        assert view.unquantized is not None and view.targets is not None
        unquantized = replace(view, hidden=view.unquantized)
        seen: list[tuple[str, Tensor]] = []
        with watching(view.linears, lambda name, x: seen.append((name, x))):
            inputs: list[list[Tensor]] = []
            groups: list[tuple[str, ...]] = []
            for sample in range(len(view.unquantized)):
                seen.clear()
                unquantized.run(sample)
                groups = _grouped(seen)
                first = dict(seen)
                inputs = inputs or [[] for _ in groups]
                for kept, names in zip(inputs, groups, strict=True):
                    kept.append(_flat(first[names[0]]))
        _check_all_tokens(view, groups, inputs)
        return cls(tuple(groups), tuple(inputs), view.targets)


@dataclass
class GroupMoments:
    """hessian: G [n, n], mean over tokens of weight * y y^T. cross: S [n, n], of weight * x y^T."""

    hessian: Tensor
    cross: Tensor

    def target(self, weight: Tensor, damping: float, strength: float) -> Tensor:
        """`weight` [m, n] on its way to W*: W + strength W (S - G) (G + damping)^-1, [m, n], float32."""
        matrix, dead = damped(self.hessian, damping)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed or strength == 0:
            return weight
        pull = weight @ (self.cross - self.hessian)
        pull[:, dead] = 0
        return weight + strength * torch.cholesky_solve(pull.T, lower).T


def group_moments(view: BlockView, original: Original, index: int, token_weights: Tensor | None) -> GroupMoments:
    """Moments of group `index`, with the block's weights as they are now. token_weights: [samples, tokens], mean 1."""
    name = original.groups[index][0]
    found: list[Tensor] = []

    def stop(_: str, y: Tensor) -> None:
        found.append(_flat(y))
        raise _Stop

    size = original.inputs[index][0].shape[1]
    device = view.linears[name].weight.device
    hessian, cross = (torch.zeros(size, size, device=device) for _ in range(2))
    tokens = 0
    with watching({name: view.linears[name]}, stop):
        for sample in range(len(view.hidden)):
            with suppress(_Stop):
                view.run(sample)
            x, y = original.inputs[index][sample].to(device).float(), found.pop().float()
            if token_weights is not None:
                root = token_weights[sample].to(device).sqrt()[:, None]
                x, y = x * root, y * root
            accumulate(hessian, y)
            cross.addmm_(x.T, y)
            tokens += len(y)
    return GroupMoments(hessian / tokens, cross / tokens)


class watching:
    """Calls `see(name, input)` whenever one of `linears` runs."""

    def __init__(self, linears: dict[str, nn.Linear], see: Callable[[str, Tensor], None]) -> None:
        self._linears = linears
        self._see = see
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, linear in self._linears.items():
            hook = lambda _, args, name=name: self._see(name, args[0])  # noqa: E731
            self._handles.append(linear.register_forward_pre_hook(hook))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _grouped(seen: list[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """Names by the very tensor that they read, in order."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in seen:
        known = next((names for tensor, names in groups if tensor is x), None)
        if known is None:
            groups.append((x, [name]))
        else:
            known.append(name)
    return [tuple(names) for _, names in groups]


def _check_all_tokens(view: BlockView, groups: list[tuple[str, ...]], inputs: list[list[Tensor]]) -> None:
    """Raise InputError for a block whose layers do not all see every token once (a mixture of experts)."""
    odd = set(view.linears) - {name for names in groups for name in names}
    samples, tokens = view.hidden.shape[:2]
    for names, kept in zip(groups, inputs, strict=True):
        if [len(x) for x in kept] != [tokens] * samples:
            odd.update(names)
    if odd:
        raise InputError(f"method 'sage-x' needs layers that see every token once; {sorted(odd)[0]} does not")


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])
