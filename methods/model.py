"""The whole model, for methods that look at it before its first layer is quantized, or after its last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kernels.layouts import PackedWeight


@dataclass(frozen=True)
class ModelView:
    """The unquantized model with what calibration knows of it. linears: the layers to be quantized, by their name in
    the model, in order. windows: [samples, context], token ids, or None for a method that needs no calibration."""

    model: nn.Module
    linears: dict[str, nn.Linear]
    windows: Tensor | None


@dataclass(frozen=True)
class QuantizedView:
    """The model with every layer quantized: it holds the decoded weights, unless its blocks come to the device one at a
    time. packed: the weights as they are stored, by the layer's name in the model, in order. windows: as
    for `ModelView`. progress: to be called with (steps done, steps in all)."""

    model: nn.Module
    packed: Mapping[str, PackedWeight]
    windows: Tensor | None
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Refinement:
    """packed: weights that take the place of those of the same name, of the same size. parameters: unquantized ones
    with other values, by their name in the model; they count 16 bits each and must fit in them. facts: for the run's
    log, of the model as a whole."""

    packed: Mapping[str, PackedWeight]
    parameters: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
