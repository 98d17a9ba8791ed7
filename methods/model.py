"""The whole model, for methods that plan over all layers before the first is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ModelView:
    """The unquantized model with what calibration knows of it. linears: the layers to be quantized, by their name in
    the model, in order. windows: [samples, context], token ids, or None for a method that needs no calibration."""

    model: nn.Module
    linears: dict[str, nn.Linear]
    windows: Tensor | None
