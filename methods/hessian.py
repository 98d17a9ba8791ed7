"""The Hessian of a linear layer: accumulation, damping, and the Cholesky factor of its inverse.

The only place where Hessians are damped and factorized. Source: GPTQ (arXiv 2210.17323, section 3.3 and algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import NumericalError
from kernels.finite import all_finite

# When the factorization fails the damping is raised tenfold, at most this often; the released code stops instead.
_MAX_RETRIES = 5

# Columns multiplied at once when a Hessian is accumulated.
_BLOCK = 384


@dataclass(frozen=True)
class InverseFactor:
    """U, the upper triangular factor of the inverse damped Hessian: H^-1 = U^T U.

    U_jj^2 is the exact OBS pivot of column j once the columns before it are frozen. upper: [n, n], float32.
    dead: [n], bool, inputs that were zero throughout calibration (their diagonal was set to 1). damping: relative to
    the mean diagonal, as finally used; larger than asked for when the factorization had to be retried.
    """

    upper: Tensor
    dead: Tensor
    damping: float

    def diagonal(self) -> Tensor:
        """U_jj, [n]."""
        return self.upper.diagonal()


def accumulate(total: Tensor, x: Tensor) -> None:
    """total += x^T x in float32. total: [n, n], float32, symmetric. x: [..., n], any float dtype.

    Only the blocks on and below the diagonal are multiplied, the others are copied: half the work. (A BLAS rank-k
    update is faster by itself, but SciPy's BLAS has a thread pool of its own, and the two pools fight over the cores.)
    """
    flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
    for start in range(0, flat.shape[1], _BLOCK):
        stop = min(start + _BLOCK, flat.shape[1])
        total[start:stop, :stop].addmm_(flat[:, start:stop].T, flat[:, :stop])
        total[:start, start:stop] = total[start:stop, :start].T


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A damped copy of `hessian` and the mask of dead inputs.

    Dead inputs (zero diagonal) get diagonal 1 first; then damping * mean(diagonal) is added to the diagonal.
    """
    result = hessian.to(torch.float32, copy=True)
    diagonal = result.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    return result, dead


def factorize(hessian: Tensor, damping: float) -> InverseFactor:
    """Damp `hessian` [n, n], float32, and factorize its inverse, in float64.

    The released codes factorize in float32. There the rounding of two factorizations and an inverse differs by
    processor and by number of threads, and moves weights by more than 1e-5 of themselves; in float64 the same Hessian,
    damped as usual, gives the same factor to float32's last digits. (The Hessian itself is summed in float32.) It takes
    two to three matrices of 8 n^2 bytes: 3 GB at n = 11008.

    Raises NumericalError if the Hessian holds NaN or infinity, or is not positive definite at any damping tried.
    """
    if not all_finite(hessian):
        raise NumericalError("the Hessian holds NaN or infinity: the calibration activations overflowed")
    for attempt in range(_MAX_RETRIES + 1):
        used = damping * 10**attempt
        matrix, dead = damped(hessian, used)
        matrix = matrix.double()
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del matrix, lower  # two of them are enough at a time
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and all_finite(upper):
            return InverseFactor(upper.float(), dead, used)
    raise NumericalError(
        f"the Hessian is not positive definite even with damping={used:g}; calibrate on more text or raise `damping`"
    )


def proxy_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T): the share of the layer's output energy lost, on undamped `hessian`."""
    error = (weight - quantized).float()
    weight = weight.float()
    reference = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    lost = float(((error @ hessian) * error).sum(dtype=torch.float64))
    return lost / reference if reference > 0 else 0.0
