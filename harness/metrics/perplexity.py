"""Perplexity, the protocol of the GPTQ family: non-overlapping windows over the whole text.

The joined text is tokenized once and cut into windows of `context` tokens; the last partial window is dropped. The
loss of a window is the mean cross-entropy over its context - 1 shifted targets, in float32; perplexity is exp of the
mean over windows. Nothing is carried from window to window. This is the one place where a text to
be measured is cut into windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.nll import perplexity_of
from kernels.errors import InputError, NumericalError

# Rows of logits whose loss is computed at once: the temporaries stay in cache, and are small for large vocabularies.
_ROWS = 256


@dataclass(frozen=True)
class Perplexity:
    """value: perplexity. nll: mean negative log-likelihood in nats a token; nll_stderr: its standard error over
    windows, None for a single one. tokens: targets scored. dtype: of the logits; the loss is float32 in any case.
    window_nll: the loss of each window, for paired comparisons."""

    value: float
    nll: float
    nll_stderr: float | None
    tokens: int
    windows: int
    windows_available: int
    context: int
    stride: int
    dtype: str
    bos: bool
    window_nll: list[float]

    def as_record(self) -> dict[str, Any]:
        return {"metric": "perplexity", **asdict(self)}


def cut_windows(ids: Tensor, context: int, limit: int | None = None) -> Tensor:
    """The first `limit` windows (all for None) of `ids` [tokens]: [windows, context].

    Raises InputError if the text is shorter than one window.
    """
    available = ids.numel() // context
    if available == 0:
        raise InputError(f"the text has {ids.numel()} tokens, less than one window of {context}")
    count = available if limit is None else min(limit, available)
    return ids[: count * context].view(count, context)


@torch.inference_mode()
def window_loss(logits: Tensor, window: Tensor) -> float:
    """Mean cross-entropy in nats of `logits` [tokens, vocabulary] against the shifted `window` [tokens]."""
    targets = window[1:]
    total = 0.0
    for start in range(0, targets.numel(), _ROWS):
        part = logits[start : start + _ROWS][: targets.numel() - start].float()
        total += float(nn.functional.cross_entropy(part, targets[start : start + _ROWS], reduction="sum"))
    return total / targets.numel()


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    context: int,
    limit: int | None = None,
    bos: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of `model` on `ids` [tokens], on the first `limit` windows or on all of them."""
    windows = cut_windows(ids, context, limit)
    device = next(model.parameters()).device
    losses: list[float] = []
    dtype = ""
    for window in windows:
        window = window.to(device)
        logits = model(window[None], use_cache=False).logits[0]
        dtype = str(logits.dtype).removeprefix("torch.")
        losses.append(window_loss(logits, window))
        del logits  # before the next window's logits are made
        progress(len(losses), len(windows))
    if not math.isfinite(sum(losses)):
        raise NumericalError("the model's loss is not finite: its logits overflow; try --dtype float32 or bfloat16")
    return Perplexity(
        **_of_windows(losses, context),
        windows_available=ids.numel() // context,
        context=context,
        stride=context,
        dtype=dtype,
        bos=bos,
    )


def shorten(entry: Mapping[str, Any], windows: int | None) -> dict[str, Any]:
    """The entry of a record as it would be had only its first `windows` been measured; all of them for None."""
    return {**entry, **_of_windows(entry["window_nll"][:windows], entry["context"])}


def _of_windows(losses: list[float], context: int) -> dict[str, Any]:
    """What follows from the loss of each window."""
    mean = sum(losses) / len(losses)
    variance = sum((loss - mean) ** 2 for loss in losses) / max(len(losses) - 1, 1)
    return {
        "value": perplexity_of(mean),
        "nll": mean,
        "nll_stderr": math.sqrt(variance / len(losses)) if len(losses) > 1 else None,
        "tokens": len(losses) * (context - 1),
        "windows": len(losses),
        "window_nll": losses,
    }
