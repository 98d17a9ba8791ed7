"""How matrices are encoded: what all ingredients must agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# What can be left out: the rotation of the outputs, a rate for each column, visiting columns by their Hessian
# diagonal, error feedback, a budget for each matrix, the bounds of these budgets below 2 bits, weighting tokens and
# outputs by the gradients that reach them, targets that make good the errors of earlier layers, and, without data, norm
# gains as the size of inputs.
Ingredient = Literal["rotation", "rates", "order", "feedback", "allocation", "cap", "weighting", "targets", "gains"]

# What is trained: nothing; block by block the continuous parameters of a block whose codes stand, row scales and norm
# gains; those and, before they are encoded, the weights; or all that and, at last, the continuous parameters of the
# whole model together.
Tuning = Literal["none", "scales", "blocks", "model"]


@dataclass(frozen=True)
class Recipe:
    """without: ingredients left out, to see what each is worth."""

    scale_dtype: torch.dtype = torch.float16
    seed: int = 0
    damping: float = 0.01
    without: frozenset[Ingredient] = frozenset()
