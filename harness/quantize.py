"""Quantize a model block by block: packed weights out, their decoded values left in the model.

The model that is measured afterwards holds exactly what the packed tensors decode to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import BlockStream
from harness.models.blocks import block_linears, find_blocks, model_linears
from kernels.errors import InputError
from kernels.layouts import PackedWeight
from methods import LayerContext, LayerStatistics, QuantizationMethod
from methods.hessian import proxy_loss

# Called with (steps done, steps in all, what is being done).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerLog:
    """What is known of one quantized layer. relative_error: ||W - Q||^2 / ||W||^2. proxy_loss: the share of the layer's
    output energy that is lost, tr((W - Q) H (W - Q)^T) / tr(W H W^T), or None without calibration."""

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


@dataclass(frozen=True)
class QuantizedModel:
    """Packed weights by layer name, and the log, both in model order."""

    packed: dict[str, PackedWeight]
    layers: list[LayerLog]


def check_shapes(model: nn.Module, method: QuantizationMethod) -> None:
    """Raise InputError, naming the layer, if a layer of `model` does not suit `method`."""
    for name, linear in model_linears(model).items():
        try:
            method.check_shape(linear.out_features, linear.in_features)
        except InputError as error:
            raise InputError(f"method {method.name!r}, layer {name}: {error}") from None


def quantize_model(
    model: nn.Module,
    method: QuantizationMethod,
    windows: Tensor | None,
    progress: Progress = lambda done, total, what: None,
) -> QuantizedModel:
    """Quantize every linear layer of the decoder blocks of `model`, in place.

    windows: [samples, context] calibration token ids; may be None for a method that needs nothing.
    """
    check_shapes(model, method)
    if windows is None and method.needs != "nothing":
        raise InputError(f"method {method.name!r} needs calibration text")
    blocks = find_blocks(model)
    stream = BlockStream(model, blocks, windows) if windows is not None and method.needs != "nothing" else None
    samples = 0 if stream is None else stream.hidden.shape[0]
    per_block = 2 * samples + len(block_linears(blocks.blocks[0]))
    total = per_block * len(blocks.blocks)
    packed: dict[str, PackedWeight] = {}
    logs: list[LayerLog] = []
    for index, block in enumerate(blocks.blocks):
        base = index * per_block
        statistics: dict[str, LayerStatistics] = {}
        label = f"block {index + 1}/{len(blocks.blocks)}"
        if stream is not None:
            statistics = stream.collect(
                index, method.needs, lambda done, base=base, label=label: progress(base + done, total, f"{label} inputs")
            )
        for position, (name, linear) in enumerate(block_linears(block).items()):
            full = blocks.name(index, name)
            weight, log = _quantize_layer(
                linear, method, statistics.get(name), LayerContext(full, index, len(blocks.blocks))
            )
            packed[full] = weight
            logs.append(log)
            progress(base + samples + position + 1, total, f"{label} {name}")
        statistics.clear()
        if stream is not None and index + 1 < len(blocks.blocks):
            start = base + per_block - samples
            stream.advance(
                index, lambda done, start=start, label=label: progress(start + done, total, f"{label} outputs")
            )
    progress(total, total, "done")
    return QuantizedModel(packed, logs)


def install(model: nn.Module, packed: dict[str, PackedWeight]) -> None:
    """Put the decoded `packed` weights into `model`. Raises InputError if they are not those of its layers."""
    linears = model_linears(model)
    if linears.keys() != packed.keys():
        raise InputError(f"packed weights name {len(packed)} layers, the model has {len(linears)} others")
    for name, linear in linears.items():
        if packed[name].shape != tuple(linear.weight.shape):
            raise InputError(f"layer {name}: packed {packed[name].shape}, model {tuple(linear.weight.shape)}")
        _put(linear, packed[name])


def _put(linear: nn.Linear, weight: PackedWeight) -> None:
    with torch.no_grad():
        linear.weight.copy_(weight.decode(linear.weight.dtype))


def _quantize_layer(
    linear: nn.Linear, method: QuantizationMethod, statistics: LayerStatistics | None, context: LayerContext
) -> tuple[PackedWeight, LayerLog]:
    start = time.perf_counter()
    weight = method.quantize_linear(linear.weight, statistics, context)
    seconds = time.perf_counter() - start
    original, decoded = linear.weight.float(), weight.decode()
    if tuple(decoded.shape) != tuple(original.shape):
        raise InputError(f"method {method.name!r} returned {tuple(decoded.shape)} for {context.name} {tuple(original.shape)}")
    if not torch.isfinite(decoded).all():
        raise InputError(f"method {method.name!r} returned NaN or infinity for {context.name}")
    energy = float(original.square().sum(dtype=torch.float64))
    error = float((original - decoded).square().sum(dtype=torch.float64))
    nominal = method.nominal_bits(weight)
    log = LayerLog(
        name=context.name,
        block=context.block,
        shape=weight.shape,
        relative_error=error / energy if energy else 0.0,
        proxy_loss=None if statistics is None else proxy_loss(original, decoded, statistics.hessian),
        payload_bits=weight.payload_bits(),
        nominal_weight_bits=nominal.weight,
        nominal_scale_bits=nominal.scale,
        seconds=seconds,
        facts=context.facts,
    )
    _put(linear, weight)
    return weight, log
