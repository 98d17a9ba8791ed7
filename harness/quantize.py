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
from harness.models.blocks import Blocks, block_linears, find_blocks, model_linears
from kernels.errors import InputError, NumericalError
from kernels.layouts import PackedWeight
from methods import LayerContext, LayerStatistics, ModelView, QuantizationMethod
from methods.hessian import proxy_loss

# Called with (steps done, steps in all, what is being done).
Progress = Callable[[int, int, str], None]


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


@dataclass(frozen=True)
class QuantizedModel:
    """Packed weights by layer name, and the log, both in model order. folded: unquantized parameters that the method
    changed (AWQ's norm gains), by name in the model; they belong to the result like the packed weights."""

    packed: dict[str, PackedWeight]
    layers: list[LayerLog]
    folded: dict[str, Tensor] = field(default_factory=dict)


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
    bring: Callable[[nn.Module], None] = lambda block: None,
) -> QuantizedModel:
    """Quantize every linear layer of the decoder blocks of `model`, in place.

    windows: [samples, context] calibration token ids; may be None for a method that needs nothing. bring: called with
    each block before it is worked on, for models whose blocks come to the device one at a time.
    """
    check_shapes(model, method)
    if windows is None and method.needs != "nothing":
        raise InputError(f"method {method.name!r} needs calibration text")
    blocks = find_blocks(model)
    stream = None if windows is None or method.needs == "nothing" else BlockStream(model, blocks, windows)
    if stream is not None and method.needs == "streams":
        stream.original = stream.hidden.clone()
    progress(0, 1, "planning")
    method.plan(ModelView(model, model_linears(model), None if stream is None else windows))
    result = QuantizedModel({}, [])
    for index, block in enumerate(blocks.blocks):
        bring(block)
        layers = len(block_linears(blocks.blocks[index]))
        steps = _Steps(progress, index, len(blocks.blocks), 0 if stream is None else stream.samples, layers)
        if stream is not None and method.needs in ("block", "streams"):
            _quantize_block(blocks, index, method, stream, result, steps)
        else:
            _quantize_layers(blocks, index, method, stream, result, steps)
    progress(1, 1, "done")
    return result


def install(model: nn.Module, quantized: QuantizedModel) -> None:
    """Put decoded weights and folded parameters into `model`. Raises InputError if they are not those of its layers."""
    linears = model_linears(model)
    if linears.keys() != quantized.packed.keys():
        unknown = sorted(quantized.packed.keys() ^ linears.keys())[0]
        raise InputError(f"packed weights and model differ in their layers, first in {unknown}")
    for name, linear in linears.items():
        packed = quantized.packed[name]
        if packed.shape != tuple(linear.weight.shape):
            raise InputError(f"layer {name}: packed {packed.shape}, model {tuple(linear.weight.shape)}")
        _put(linear, packed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in quantized.folded.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise InputError(f"folded parameter {name} does not fit the model")
            parameters[name].copy_(tensor)


class _Steps:
    """Progress of one block: its samples twice (inputs, outputs) and its layers, all blocks alike."""

    def __init__(self, progress: Progress, index: int, blocks: int, samples: int, layers: int) -> None:
        self._progress = progress
        self._index = index
        self._blocks = blocks
        self._samples = samples
        self._layers = layers

    def inputs(self, done: int) -> None:
        self._report(done, "inputs")

    def layer(self, done: int, name: str) -> None:
        self._report(self._samples + done, name)

    def outputs(self, done: int) -> None:
        self._report(self._samples + self._layers + done, "outputs")

    def _report(self, done: int, what: str) -> None:
        share = done / (2 * self._samples + self._layers)
        # In thousandths of a block, since the number of steps differs between methods.
        total = 1000 * self._blocks
        self._progress(round(1000 * (self._index + share)), total, f"block {self._index + 1}/{self._blocks} {what}")


def _quantize_layers(
    blocks: Blocks,
    index: int,
    method: QuantizationMethod,
    stream: BlockStream | None,
    result: QuantizedModel,
    steps: _Steps,
) -> None:
    """Layer by layer; the next block sees the outputs of the quantized block."""
    statistics: dict[str, LayerStatistics] = {}
    if stream is not None:
        statistics = stream.collect(index, method.needs, steps.inputs)
    linears = block_linears(blocks.blocks[index])
    for done, (name, linear) in enumerate(linears.items(), start=1):
        context = LayerContext(blocks.name(index, name), index, len(blocks.blocks))
        seen = statistics.get(name)
        start = time.perf_counter()
        try:
            packed = method.quantize_linear(linear.weight, seen, context)
        except NumericalError as error:
            raise NumericalError(f"{context.name}: {error}") from error
        seconds = time.perf_counter() - start
        hessian = None if seen is None else seen.hessian
        result.layers.append(_log(method, linear.weight, packed, hessian, seconds, context))
        result.packed[context.name] = packed.to("cpu")
        _put(linear, packed)
        steps.layer(done, name)
    if stream is not None and index + 1 < len(blocks.blocks):
        stream.advance(index, steps.outputs)


def _quantize_block(
    blocks: Blocks,
    index: int,
    method: QuantizationMethod,
    stream: BlockStream,
    result: QuantizedModel,
    steps: _Steps,
) -> None:
    """The whole block at once; the next block sees the outputs of the unquantized block, or of both."""
    block = blocks.blocks[index]
    view = stream.view(index)
    outputs = stream.outputs(index, steps.inputs) if stream.original is None else None
    contexts = {name: LayerContext(blocks.name(index, name), index, len(blocks.blocks)) for name in view.linears}
    start = time.perf_counter()
    found = method.quantize_block(view, contexts)
    seconds = (time.perf_counter() - start) / len(view.linears)
    parameters = dict(block.named_parameters())
    for name in found.folded:
        result.folded[blocks.name(index, name)] = parameters[name].detach().clone()
    for name, linear in view.linears.items():
        target = found.targets.get(name, linear.weight)
        packed, context = found.packed[name], contexts[name]
        result.layers.append(_log(method, target, packed, None, seconds, context))
        result.packed[context.name] = packed.to("cpu")
        _put(linear, packed)
    steps.layer(len(view.linears), "layers")
    if outputs is not None:
        stream.hidden = outputs
    elif index + 1 < len(blocks.blocks):
        stream.original = found.original_outputs
        stream.advance(index, steps.outputs)


def _put(linear: nn.Linear, packed: PackedWeight) -> None:
    with torch.no_grad():
        linear.weight.copy_(packed.decode(linear.weight.dtype))


def _log(
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
