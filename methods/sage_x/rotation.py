"""Output rotation: every column of the weight becomes nearly Gaussian, and its error spreads evenly over the rows.

    R = H diag(1 / row_scale) W,   |row_scale[i]| ~ (||w_i||^2 / g_i)^(1/4),   random signs

H: randomized Hadamard (QuIP#, Tseng et al. 2024, arXiv 2402.04396). The rotation spreads a column's error evenly over
the balanced rows, so that row i gets an error in proportion to row_scale[i]^2; with importances g_i the loss sum g_i
e_i is least for the fourth root (between balancing the energy of the rows and leaving them alone). The scales are
rounded to the dtype they are stored in before they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hadamard import rotate
from methods.rounding import store
from methods.sage_x.recipe import Recipe

# How far the scale of a column may lie above the largest column of the weight: error feedback makes targets grow at
# low rates.
_HEADROOM = 8.0


def row_scales(weight: Tensor, recipe: Recipe, importance: Tensor | None = None) -> Tensor:
    """Signed scales [m] for `weight` [m, n], as they are stored; 0 for a row of zeros. importance: [m] or None."""
    energy = weight.square().sum(dim=1)
    if importance is not None:
        energy = energy / importance.clamp_min(1e-3 * float(importance.mean())).clamp_min(1e-30)
    scales = energy.sqrt().sqrt()
    generator = torch.Generator().manual_seed(recipe.seed)
    signs = torch.randint(0, 2, scales.shape, generator=generator).to(scales) * 2 - 1
    # Column scales are at most 1: the size of the largest column goes into the row scales.
    balanced = weight / torch.where(scales == 0, 1.0, scales)[:, None]
    largest = float(balanced.square().mean(dim=0).max().sqrt())
    return store(scales * signs * _HEADROOM * largest, recipe.scale_dtype)


def rotated(weight: Tensor, scales: Tensor, recipe: Recipe) -> Tensor:
    """R [m, n], float32, for `weight` [m, n] and its stored `scales` [m]."""
    balanced = weight * torch.where(scales == 0, 0.0, 1 / scales.float())[:, None]
    return balanced if "rotation" in recipe.without else rotate(balanced.T.contiguous()).T.contiguous()
