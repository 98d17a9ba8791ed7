"""Divergence of a model from the unquantized one: how far its next-token distributions are from the reference's.

Per token KL(P_ref || P), in nats, over the context - 1 positions of each window that predict a target (the windows of
the perplexity protocol); the share of tokens whose most likely next token is the same; the root mean square of the
difference of the target's probability. Computed in float64 from the logits, whatever their dtype, window by window, a
few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.metrics.perplexity import cut_windows
from harness.reference import Reference
from kernels.errors import InputError

# Rows compared at once: float64 over a vocabulary of 150,000 takes 150 MB a tensor.
_ROWS = 128


@dataclass(frozen=True)
class Divergence:
    """value: mean KL in nats a token; stderr: its standard error over windows, None for a single one.

    kl_median, kl_p99: over tokens. same_top: share of tokens in [0, 1]. rms_target: of P(target) - P_ref(target).
    window_kl: mean KL of each window, for paired comparisons. dtype: of the model's logits; reference_dtype: of the
    reference's.
    """

    value: float
    stderr: float | None
    kl_median: float
    kl_p99: float
    same_top: float
    rms_target: float
    tokens: int
    windows: int
    windows_available: int
    context: int
    dtype: str
    reference_dtype: str
    window_kl: list[float]

    def as_record(self) -> dict[str, Any]:
        return {"metric": "divergence", **asdict(self)}


@torch.inference_mode()
def divergence(
    model: nn.Module,
    ids: Tensor,
    reference: Reference,
    *,
    context: int,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Divergence:
    """Divergence of `model` from `reference` on `ids` [tokens]; the reference was made on the same windows."""
    windows = cut_windows(ids, context, limit)
    if reference.windows != len(windows):
        raise InputError(f"the reference has {reference.windows} windows, the text {len(windows)}; make it again")
    device = next(model.parameters()).device
    per_token: list[Tensor] = []
    same, squares, dtype = 0, 0.0, ""
    for index, window in enumerate(windows):
        window = window.to(device)
        logits = model(window[None], use_cache=False).logits[0]
        dtype = str(logits.dtype).removeprefix("torch.")
        compared = compare_logits(reference.logits(index, device), logits, window)
        del logits  # before the next window's logits are made
        per_token.append(compared.kl)
        same += compared.same_top
        squares += compared.squares
        progress(index + 1, len(windows))
    kl = torch.stack(per_token).numpy()  # [windows, context - 1]
    if not np.isfinite(kl).all():
        raise InputError("the divergence is not finite: logits overflow; try --dtype float32 or bfloat16")
    by_window = kl.mean(axis=1)
    median, p99 = np.percentile(kl, [50, 99])
    return Divergence(
        value=float(kl.mean()),
        stderr=float(by_window.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else None,
        kl_median=float(median),
        kl_p99=float(p99),
        same_top=same / kl.size,
        rms_target=math.sqrt(squares / kl.size),
        tokens=kl.size,
        windows=len(kl),
        windows_available=ids.numel() // context,
        context=context,
        dtype=dtype,
        reference_dtype=reference.dtype,
        window_kl=[float(value) for value in by_window],
    )


@dataclass(frozen=True)
class Compared:
    """One window. kl: [context - 1] float64, on the CPU. same_top: tokens. squares: sum of squared differences."""

    kl: Tensor
    same_top: int
    squares: float


@torch.inference_mode()
def compare_logits(reference: Tensor, logits: Tensor, window: Tensor) -> Compared:
    """Compare two models' logits [context, vocabulary] on the targets of `window` [context]."""
    targets = window[1:]
    kl = torch.empty(targets.numel(), dtype=torch.float64)
    same, squares = 0, 0.0
    for start in range(0, targets.numel(), _ROWS):
        aim = targets[start : start + _ROWS]
        rows = slice(start, start + aim.numel())
        known = reference[rows].double().log_softmax(dim=-1)
        found = logits[rows].double().log_softmax(dim=-1)
        chance = known.exp()
        # Rounding can leave -1e-17 where the two agree.
        kl[rows] = (chance * (known - found)).sum(dim=-1).clamp(min=0).cpu()
        same += int((known.argmax(dim=-1) == found.argmax(dim=-1)).sum())
        of_target = found.gather(1, aim[:, None]).exp() - chance.gather(1, aim[:, None])
        squares += float(of_target.square().sum())
    return Compared(kl, same, squares)
