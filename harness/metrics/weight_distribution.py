"""How far the weights of a layer are from the Gaussian fitted to them: the facts behind figures 5 to 7 of SAGE-PTQ.

SAGE-PTQ draws its thresholds from that Gaussian (equations 2 and 4). What a figure needs is kept in the record of the
unquantized model: a histogram in units of the standard deviation, and the KL divergence.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

# Bins of 0.2 standard deviations from -SPAN to +SPAN; what lies outside is counted in two bins of its own.
SPAN = 5.0
BINS = 50
_CHUNK = 1 << 23


def weight_distribution(weight: Tensor) -> dict[str, Any]:
    """The distribution of `weight` [out_features, in_features], any float dtype.

    mean, std: of all entries. counts: weights in each of the BINS bins. below, above: weights beyond the last bins.
    kl: KL(weights || Gaussian) over all bins and both tails, in nats; None for a matrix of equal entries.
    excess_kurtosis: 0 for a Gaussian.
    """
    values = weight.detach().to(torch.float32).flatten()
    mean = float(values.mean(dtype=torch.float64))
    standard = values - mean
    std = float(standard.square().mean(dtype=torch.float64)) ** 0.5
    if std == 0.0 or not math.isfinite(std):  # what is not finite is refused by every method, by name
        counts, below, above, kurtosis = [0] * BINS, 0, 0, None
        counts[BINS // 2] = values.numel()
    else:
        standard /= std
        counts = [0] * BINS
        for part in standard.split(_CHUNK):  # histc counts in float32, which is exact up to 2^24
            counts = [
                sum(pair) for pair in zip(counts, torch.histc(part, BINS, -SPAN, SPAN).int().tolist(), strict=True)
            ]
        below, above = int((standard < -SPAN).sum()), int((standard > SPAN).sum())
        kurtosis = float(standard.square().square().mean(dtype=torch.float64)) - 3.0
    return {
        "mean": mean,
        "std": std,
        "counts": counts,
        "below": below,
        "above": above,
        "kl": None if kurtosis is None else _divergence(np.array([below, *counts, above])),
        "excess_kurtosis": kurtosis,
    }


def _divergence(counts: np.ndarray) -> float:
    """KL of the shares `counts` / total from those of the standard normal in the same bins."""
    edges = np.linspace(-SPAN, SPAN, BINS + 1)
    expected = np.diff(ndtr(np.concatenate([[-np.inf], edges, [np.inf]])))
    shares = counts / counts.sum()
    there = shares > 0
    return float((shares[there] * np.log(shares[there] / expected[there])).sum())
