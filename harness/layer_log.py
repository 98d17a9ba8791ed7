"""One layer's quantization: what the method was handed and what it returned are checked, and its quality is noted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.errors import NumericalError
from kernels.layouts import PackedWeight
from methods import LayerContext, LayerStatistics, QuantizationMethod
from methods.hessian import proxy_loss


@dataclass(frozen=True)
class LayerLog:
    """What is known of one quantized layer. relative_error: ||W - Q||^2 / ||W||^2. proxy_loss: the share of the layer's
    output energy that is lost, tr((W - Q) H (W - Q)^T) / tr(W H W^T), or None without a Hessian."""

    name: str
    block: int
    shape: tuple[int, int]
    relative_error: float
    proxy_loss: float | None
    payload_bits: float
    nominal_weight_bits: float
    nominal_scale_bits: float
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


class Arguments:
    """What a method is handed, as it was before the call: a method that works in place spoils the layers after it."""

    def __init__(self, weight: Tensor, statistics: LayerStatistics | None) -> None:
        self._weight = weight
        self._before = weight.detach().clone()
        self._statistics = [] if statistics is None else [statistics.hessian, statistics.inputs]
        self._versions = self._counts()

    def check(self, method: QuantizationMethod, layer: str) -> None:
        """Raise NumericalError if the method changed any of it."""
        if not torch.equal(self._before, self._weight):
            raise NumericalError(f"method {method.name!r} changed the weight of {layer} in place; it must take a copy")
        if self._counts() != self._versions:
            raise NumericalError(
                f"method {method.name!r} changed the statistics of {layer} in place; it must take a copy"
            )

    def _counts(self) -> list[int | None]:
        """torch's own count of in-place changes: comparing a Hessian would need a second one."""
        return [None if tensor is None else tensor._version for tensor in self._statistics]


def log_layer(
    method: QuantizationMethod,
    weight: Tensor,
    packed: PackedWeight,
    hessian: Tensor | None,
    seconds: float,
    context: LayerContext,
) -> LayerLog:
    """Check what a method returned and note how good it is."""
    if not isinstance(packed, PackedWeight):
        raise NumericalError(
            f"method {method.name!r} returned {type(packed).__name__} for {context.name}, no PackedWeight"
        )
    original, decoded = weight.detach().float(), packed.decode()
    if decoded.shape != original.shape:
        shapes = f"{tuple(decoded.shape)} for {context.name} {tuple(original.shape)}"
        raise NumericalError(f"method {method.name!r} returned {shapes}")
    if not torch.isfinite(decoded).all():
        raise NumericalError(f"method {method.name!r} returned NaN or infinity for {context.name}")
    energy = float(original.square().sum(dtype=torch.float64))
    error = float((original - decoded).square().sum(dtype=torch.float64))
    nominal = method.nominal_bits(packed)
    return LayerLog(
        name=context.name,
        block=context.block,
        shape=packed.shape,
        relative_error=error / energy if energy else 0.0,
        proxy_loss=None if hessian is None else proxy_loss(original, decoded, hessian),
        payload_bits=packed.payload_bits(),
        nominal_weight_bits=nominal.weight,
        nominal_scale_bits=nominal.scale,
        seconds=seconds,
        facts=context.facts,
    )
