"""One layer's quantization: what the method was handed and what it returned are checked, and its quality is noted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.errors import NumericalError
from kernels.finite import all_finite
from kernels.layouts import PackedWeight
from methods import BlockResult, BlockView, LayerContext, LayerStatistics, QuantizationMethod
from methods.hessian import proxy_loss


@dataclass(frozen=True)
class LayerLog:
    """What is known of one quantized layer. relative_error: ||W - Q||^2 / ||W||^2. proxy_loss: the share of the layer's
    output energy that is lost, tr((W - Q) H (W - Q)^T) / tr(W H W^T), or None without a Hessian. Both are of the weight
    as it was first quantized: what a method's `refine` changes in the finished model is not in them."""

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


class BlockArguments:
    """The same for a method that is handed a whole block, and may change what its result names."""

    def __init__(self, view: BlockView) -> None:
        self._block = view.block
        self._before = {name: tensor.detach().clone() for name, tensor in view.block.named_parameters()}
        self._activations = [x for x in (view.hidden, view.unquantized, view.targets) if x is not None]
        self._versions = [x._version for x in self._activations]

    def check(self, method: QuantizationMethod, found: BlockResult, block: str) -> None:
        """Raise NumericalError if the method changed activations, or parameters that `found` does not name."""
        if [x._version for x in self._activations] != self._versions:
            raise NumericalError(
                f"method {method.name!r} changed the activations of {block} in place; it must take a copy"
            )
        named = {*found.folded, *(f"{name}.weight" for name in found.targets)}
        for name, parameter in self._block.named_parameters():
            if name not in named and not torch.equal(parameter, self._before[name]):
                raise NumericalError(
                    f"method {method.name!r} changed {block}.{name} in place and does not say so; it must take a copy, "
                    "or name it in `folded` or `targets` of its result"
                )


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
    if not all_finite(decoded):
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
