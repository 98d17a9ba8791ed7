"""What calibration knows about the inputs of a linear layer.

The Hessian of the layer's squared output error is H = 2/samples * sum over samples of X^T X, X [tokens, in_features]
(Frantar et al. 2022, "GPTQ", arXiv 2210.17323, section 3; the factor is the one of the authors' code). `samples`
counts sequences, not tokens; the scale of H does not matter to methods that damp it relatively.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.errors import InputError
from kernels.finite import all_finite
from methods.hessian import InverseFactor, accumulate, factorize


@dataclass
class LayerStatistics:
    """Statistics of one linear layer's inputs; layers that read the same input (q, k, v) share one object.

    hessian: [in_features, in_features], float32, symmetric, undamped. inputs: [samples, tokens, in_features], kept only
    where a method asks for them.
    """

    hessian: Tensor
    samples: int
    tokens: int
    inputs: Tensor | None = None
    _factors: dict[float, InverseFactor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.hessian.dim() != 2 or self.hessian.shape[0] != self.hessian.shape[1]:
            raise InputError(f"hessian is {list(self.hessian.shape)}; it must be [in_features, in_features]")

    @classmethod
    def from_inputs(cls, x: Tensor) -> LayerStatistics:
        """Statistics of `x` [samples, tokens, in_features], any float dtype; keeps `x` itself too."""
        if x.dim() != 3 or x.numel() == 0:
            raise InputError(f"inputs are {list(x.shape)}; they must be [samples, tokens, in_features]")
        if not all_finite(x):
            raise InputError(f"inputs {list(x.shape)} hold NaN or infinity")
        total = torch.zeros(x.shape[2], x.shape[2], dtype=torch.float32, device=x.device)
        for sample in x:
            accumulate(total, sample)
        return cls(total.mul_(2 / x.shape[0]), samples=x.shape[0], tokens=x.shape[0] * x.shape[1], inputs=x)

    @classmethod
    def from_hessian(cls, hessian: Tensor, samples: int = 1, tokens: int = 0) -> LayerStatistics:
        """Statistics from a Hessian that was computed elsewhere."""
        return cls(hessian.to(torch.float32), samples=samples, tokens=tokens)

    @property
    def in_features(self) -> int:
        return self.hessian.shape[0]

    def inverse_factor(self, damping: float) -> InverseFactor:
        """The damped inverse Hessian's factor, computed once for all layers that share these statistics."""
        if damping not in self._factors:
            self._factors.clear()  # one factor is as large as the Hessian itself
            self._factors[damping] = factorize(self.hessian, damping)
        return self._factors[damping]
