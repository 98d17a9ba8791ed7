"""Short training through the whole model, once every layer is encoded: row scales and norm gains, no code changes.

Like the end-to-end step of QuIP# (arXiv 2402.04396, section 5): the quantized model learns the unquantized one's
next-token distributions on calibration text. Of the unquantized model only what its head reads is kept. The last part
of the samples is held out, as in the training of blocks: what does not help there is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import InputError, NumericalError
from kernels.layouts import PackedWeight, TrellisWeight
from methods.model import ModelView, QuantizedView, Refinement
from methods.sage_x.tuning import epochs_of, norm_gains, split

# Tokens of one step, in whole samples, at least one, and steps in all, in whole passes over the samples, at least one.
BATCH_TOKENS = 1024
STEPS = 64
# Steps relative to the size of each scale and gain.
RATE = 2e-3
# Logits that are held at once.
_LOGITS = 6_000_000


def head_inputs(view: ModelView) -> Tensor:
    """What the head of the model reads on each of its windows: [samples, tokens, hidden], on the CPU."""
    assert view.windows is not None
    head = _head(view.model)
    with torch.no_grad():
        found = [_head_inputs(view.model, window[None], {}).cpu() for window in view.windows]
        first = view.windows[:1].to(head.weight.device)
        theirs = view.model(first, use_cache=False).logits.float()
        mine = _logits(view.model, head, found[0].to(head.weight.device))
    if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise InputError(
            f"{type(view.model).__name__} does more behind its output head than a soft cap; "
            "tuning='model' cannot train it, tuning='blocks' can"
        )
    return torch.cat(found)


def distill(view: QuantizedView, targets: Tensor) -> Refinement | None:
    """Train towards `targets`, the unquantized model's `head_inputs`. What does not help on held-out samples changes
    nothing; None if there are none."""
    assert view.windows is not None
    train, test = split(len(view.windows))
    if not train or not test:
        return None
    student = _Student(view)
    size = max(1, BATCH_TOKENS // view.windows.shape[1])
    batches = [train[start : start + size] for start in range(0, len(train), size)]
    total = epochs_of(STEPS, len(batches)) * len(batches)
    optimizer = torch.optim.Adam(student.moves(), lr=RATE, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    # Batches of the held-out samples come before and after.
    checks = [test[start : start + size] for start in range(0, len(test), size)]
    done, in_all = 0, total + 2 * len(checks)

    def progressed() -> None:
        nonlocal done
        done += 1
        view.progress(done, in_all)

    with student:
        before = student.loss(targets, checks, progressed)
        for step in range(total):
            optimizer.zero_grad()
            with torch.enable_grad():
                student.learn(targets, batches[step % len(batches)])
            optimizer.step()
            rates.step()
            progressed()
        trained = student.stored()
        after = student.loss(targets, checks, progressed)
    if math.isnan(before):
        raise NumericalError("the quantized model's logits overflow; try --dtype float32 or bfloat16")
    packed, gains = trained if after < before else ({}, {})
    return Refinement(packed, gains, {"held_out_divergence": [before, after]})


class _Student:
    """The quantized model with its row scales and gains under training; a context that puts hooks on its layers."""

    def __init__(self, view: QuantizedView) -> None:
        assert view.windows is not None
        self._model = view.model
        self._windows = view.windows
        self._packed = {name: packed for name, packed in view.packed.items() if isinstance(packed, TrellisWeight)}
        self._gains = {name: gain.float() for name, gain in norm_gains(view.model).items()}
        device = next(view.model.parameters()).device
        # How far each scale and gain has moved, relative to itself.
        self._row_moves = {
            name: torch.zeros(packed.shape[0], device=device, requires_grad=True)
            for name, packed in self._packed.items()
        }
        self._gain_moves = {name: torch.zeros_like(gain, requires_grad=True) for name, gain in self._gains.items()}
        self._hooks = ExitStack()

    def moves(self) -> list[Tensor]:
        """What is trained."""
        return [*self._row_moves.values(), *self._gain_moves.values()]

    def __enter__(self) -> _Student:
        for name, move in self._row_moves.items():
            linear = self._model.get_submodule(name)
            self._hooks.callback(linear.register_forward_hook(_scaled(move)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def learn(self, targets: Tensor, samples: Sequence[int]) -> None:
        """Gradients of the divergence on `samples`."""
        hidden = self._forward(samples)
        below = hidden.detach().requires_grad_(True)
        self._divergence(below, targets[list(samples)].to(below), backward=True)
        hidden.backward(below.grad)

    @torch.no_grad()
    def loss(self, targets: Tensor, batches: Sequence[Sequence[int]], progressed: Callable[[], None]) -> float:
        """Mean divergence over the samples of `batches`, nats per token."""
        total = 0.0
        for samples in batches:
            hidden = self._forward(samples)
            total += len(samples) * self._divergence(hidden, targets[list(samples)].to(hidden), backward=False)
            progressed()
        return total / sum(map(len, batches))

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
        """Weights and gains as they are stored; from now on the model computes with them."""
        packed: dict[str, PackedWeight] = {}
        gains: dict[str, Tensor] = {}
        for name, weight in self._packed.items():
            before, move = weight.row_scales().float(), self._row_moves[name]
            packed[name] = weight.with_row_scales(before * (1 + move.to(before)))
            after = packed[name].row_scales().float()  # type: ignore[attr-defined]
            move.copy_(torch.where(before == 0, 0, after / before - 1))
        for name, gain in self._gains.items():
            # Unquantized parameters count 16 bits each: what they hold must fit in them.
            kind = self._model.get_parameter(name).dtype
            kind = torch.float16 if kind == torch.float32 else kind
            gains[name] = (gain * (1 + self._gain_moves[name])).to(kind)
            self._gain_moves[name].copy_(torch.where(gain == 0, 0, gains[name].float() / gain - 1))
        return packed, gains

    def _forward(self, samples: Sequence[int]) -> Tensor:
        gains = {
            name: (gain * (1 + self._gain_moves[name])).to(self._model.get_parameter(name))
            for name, gain in self._gains.items()
        }
        return _head_inputs(self._model, self._windows[list(samples)], gains)

    def _divergence(self, hidden: Tensor, targets: Tensor, *, backward: bool) -> float:
        """Mean over tokens of KL(unquantized || quantized), from what the head reads: [samples, tokens, hidden] each.

        A part of the tokens at a time: their logits are by far the largest tensors. backward: with gradients, of the
        sum, since the size does not matter to Adam, and those of the mean are too small for float16.
        """
        head = _head(self._model)
        mine, theirs = hidden.flatten(0, 1), targets.flatten(0, 1)
        rows = max(1, _LOGITS // head.weight.shape[0])
        total = 0.0
        for x, y in zip(mine.split(rows), theirs.split(rows), strict=True):
            with torch.no_grad():
                known = _logits(self._model, head, y).log_softmax(-1)
            found = _logits(self._model, head, x).log_softmax(-1)
            part = functional.kl_div(found, known, log_target=True, reduction="sum")
            if backward:
                part.backward()
            total += float(part.detach())
        return total / len(mine)


class _Reached(Exception):
    """Leaves a forward pass in front of the head."""


def _head_inputs(model: nn.Module, ids: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """What the head reads for `ids` [samples, tokens], with `parameters` in place of those of the same name."""
    seen: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = _head(model).register_forward_pre_hook(catch)
    ids = ids.to(next(model.parameters()).device)
    try:
        with suppress(_Reached):
            torch.func.functional_call(model, parameters, (ids,), {"use_cache": False})
    finally:
        handle.remove()
    return seen[0]


def _head(model: nn.Module) -> nn.Linear:
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise InputError(f"{type(model).__name__} has no linear output head; tuning='model' needs one")
    return head


def _logits(model: nn.Module, head: nn.Linear, hidden: Tensor) -> Tensor:
    logits: Tensor = head(hidden).float()
    cap: Any = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _scaled(move: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that scales the rows of a linear layer by 1 + move."""

    def hook(linear: nn.Module, _: Any, output: Tensor) -> Tensor:
        bias: Any = linear.bias
        # In float32: a move may be smaller than 16 bits can tell from none.
        wide = output.float()
        moved = wide * (1 + move) if bias is None else wide + (wide - bias) * move
        return moved.to(output.dtype)

    return hook
