"""Quantize a model block by block: packed weights out, their decoded values left in the model.

The model that is measured afterwards holds exactly what the packed tensors decode to. Each finished block can be kept
on disk together with the activations behind it: quantization that is interrupted goes on from the last block, and its
result is the uninterrupted one bit for bit. A method may refine the finished model at the end; interrupted there, it
begins with the last block again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.calibration import BlockStream
from harness.determinism import seed_everything
from harness.layer_log import Arguments, BlockArguments, LayerLog, log_layer
from harness.models.blocks import Blocks, block_linears, find_blocks, model_linears
from harness.models.placement import Placement
from kernels.errors import InputError, NumericalError
from kernels.finite import all_finite
from kernels.layouts import PackedWeight
from kernels.linear import put_decoded
from methods import (
    LayerContext,
    LayerStatistics,
    LayerSurvey,
    ModelView,
    QuantizationMethod,
    QuantizedView,
    Refinement,
)

# Called with (steps done, steps in all, what is being done).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizedModel:
    """Packed weights by layer name, and the log, both in model order. folded: unquantized parameters that the method
    changed (AWQ's norm gains), by name in the model; they belong to the result like the packed weights."""

    packed: dict[str, PackedWeight]
    layers: list[LayerLog]
    folded: dict[str, Tensor] = field(default_factory=dict)

    def extend(self, block: QuantizedModel) -> None:
        """Add the next block."""
        self.packed.update(block.packed)
        self.layers.extend(block.layers)
        self.folded.update(block.folded)


class Checkpoints(Protocol):
    """Where finished blocks are kept while a model is quantized."""

    def restore(self) -> tuple[list[QuantizedModel], dict[str, Tensor] | None]:
        """The blocks that are finished, and the state of the stream of activations in front of the next one."""

    def save(self, index: int, block: QuantizedModel, stream: dict[str, Tensor] | None) -> QuantizedModel:
        """Keep block `index`, and the state of the stream in front of the one after it (None after the last block, or
        for a method that needs none). Returns the block as it is kept."""

    def replace(self, whole: QuantizedModel) -> QuantizedModel:
        """Keep `whole` instead of all blocks: a method has refined them together. Returns it as it is kept."""


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
    placement: Placement | None = None,
    checkpoints: Checkpoints | None = None,
) -> QuantizedModel:
    """Quantize every linear layer of the decoder blocks of `model`, in place.

    windows: [samples, context] calibration token ids; may be None for a method that needs nothing. A method with
    `sample_tokens` sees the same tokens as more samples, shorter ones. placement: for
    models whose blocks come to the device one at a time. checkpoints: where finished blocks are kept; blocks that are
    there already are not made again.
    """
    check_shapes(model, method)
    if windows is None and method.needs != "nothing":
        raise InputError(f"method {method.name!r} needs calibration text")
    windows = None if windows is None else _short_samples(windows, method.sample_tokens)
    placement = placement or Placement()
    blocks = find_blocks(model)
    # Blocks behind the last one that is quantized need no activations.
    count = 1 + max(index for index, block in enumerate(blocks.blocks) if block_linears(block))
    # Plans and the activations in front of the first block come from the unquantized model, restored blocks or not.
    plans: Mapping[str, Any] = {}
    if windows is not None and method.surveys:
        plans = method.plan_model(_survey(model, blocks, count, windows, placement))
    known = None if method.needs == "nothing" else windows
    if known is not None:
        progress(0, 1, "planning")
    method.study(ModelView(model, model_linears(model), known))
    stream = None
    if known is not None:
        stream = BlockStream(model, blocks, known, beside=method.needs == "block" and method.stream == "both")
    result = QuantizedModel({}, [])
    finished, state = ([], None) if checkpoints is None else checkpoints.restore()
    for index, part in enumerate(finished):
        placement.replace(blocks.blocks[index], *_inside(blocks, index, part))
        result.extend(part)
    if stream is not None and state is not None:
        stream.restore(state)
    for index in range(len(finished), count):
        block = blocks.blocks[index]
        placement.bring(block)
        # By block, so that a method which draws from a global generator draws the same after an interruption.
        seed_everything(method.config.seed + index)
        steps = _Steps(progress, index, count, 0 if stream is None else stream.samples, block)
        quantize = _quantize_block if stream is not None and method.needs == "block" else _quantize_layers
        part = quantize(blocks, index, method, stream, steps, plans)
        if checkpoints is not None:
            last = index + 1 == count
            part = checkpoints.save(index, part, None if stream is None or last else stream.state())
        placement.remember(block, *_inside(blocks, index, part))
        result.extend(part)
    refinement = _refine(model, method, result, known, progress)
    if refinement is not None:
        result = _refined(model, result, refinement, method)
        if checkpoints is not None:
            result = checkpoints.replace(result)
        install(model, result, placement)
    progress(1, 1, "done")
    return result


def _refine(
    model: nn.Module, method: QuantizationMethod, result: QuantizedModel, windows: Tensor | None, progress: Progress
) -> Refinement | None:
    """What `method` makes of the whole model. Raises NumericalError if it changed the model itself."""
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    view = QuantizedView(model, dict(result.packed), windows, lambda done, total: progress(done, total, "whole model"))
    refinement = method.refine(view)
    for name, parameter in model.named_parameters():
        if parameter._version != versions[name]:
            raise NumericalError(f"method {method.name!r} changed {name} in place; `refine` must return what is new")
    return refinement


def _refined(
    model: nn.Module, result: QuantizedModel, refinement: Refinement, method: QuantizationMethod
) -> QuantizedModel:
    """`result` with what `refinement` has instead, its facts in the log of the first layer.

    Raises NumericalError where the one does not fit the other.
    """
    name_of_method = f"method {method.name!r}"
    for name, weight in refinement.packed.items():
        old = result.packed.get(name)
        if old is None or _kind(weight) != _kind(old):
            raise NumericalError(
                f"{name_of_method} refined {name}, which is no layer of the model, or had another layout or size"
            )
        if not all(all_finite(tensor) for tensor in weight.tensors().values() if tensor.is_floating_point()):
            raise NumericalError(f"{name_of_method} returned NaN or infinity for {name}")
    parameters = dict(model.named_parameters())
    for name, tensor in refinement.parameters.items():
        if name not in parameters or name.removesuffix(".weight") in result.packed:
            raise NumericalError(f"{name_of_method} refined {name}, which is no unquantized parameter of the model")
        if parameters[name].shape != tensor.shape or not all_finite(tensor):
            raise NumericalError(f"{name_of_method} refined {name}, which has another shape now, or NaN or infinity")
        if not any(torch.equal(tensor.to(kind).to(tensor.dtype), tensor) for kind in (torch.float16, torch.bfloat16)):
            raise NumericalError(f"{name_of_method} refined {name}, whose values do not fit in the 16 bits they count")
    folded = {name: tensor.to(parameters[name].dtype) for name, tensor in refinement.parameters.items()}
    packed = {**result.packed, **{name: new.to("cpu") for name, new in refinement.packed.items()}}
    first = replace(result.layers[0], facts={**result.layers[0].facts, **refinement.facts})
    return QuantizedModel(packed, [first, *result.layers[1:]], {**result.folded, **folded})


def _kind(weight: PackedWeight) -> tuple[str, tuple[int, ...], int]:
    return weight.layout, tuple(weight.shape), weight.nbytes()


def _short_samples(windows: Tensor, tokens: int | None) -> Tensor:
    """The tokens of `windows` [samples, context] as samples of `tokens` tokens, where they come out even."""
    return windows if tokens is None or windows.shape[1] % tokens else windows.reshape(-1, tokens)


def install(model: nn.Module, quantized: QuantizedModel, placement: Placement | None = None) -> None:
    """Put decoded weights and folded parameters into `model`. Raises InputError if they are not those of its layers."""
    linears = model_linears(model)
    if linears.keys() != quantized.packed.keys():
        unknown = sorted(quantized.packed.keys() ^ linears.keys())[0]
        raise InputError(f"packed weights and model differ in their layers, first in {unknown}")
    for name, linear in linears.items():
        if quantized.packed[name].shape != tuple(linear.weight.shape):
            raise InputError(f"layer {name}: packed {quantized.packed[name].shape}, model {tuple(linear.weight.shape)}")
    parameters = dict(model.named_parameters())
    for name, tensor in quantized.folded.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise InputError(f"folded parameter {name} does not fit the model")
    blocks, placement = find_blocks(model), placement or Placement()
    for index, block in enumerate(blocks.blocks):
        placement.replace(block, *_inside(blocks, index, quantized))
    with torch.no_grad():
        for name in quantized.folded.keys() - {name for name in parameters if name.startswith(f"{blocks.prefix}.")}:
            parameters[name].copy_(quantized.folded[name])


def _inside(blocks: Blocks, index: int, quantized: QuantizedModel) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """What `quantized` has for block `index`, packed and folded, by name inside the block."""
    start = blocks.name(index, "")
    packed = {name.removeprefix(start): w for name, w in quantized.packed.items() if name.startswith(start)}
    return packed, {name.removeprefix(start): t for name, t in quantized.folded.items() if name.startswith(start)}


class _Steps:
    """Progress of one block: its samples twice (inputs, outputs) and its layers, all blocks alike."""

    def __init__(self, progress: Progress, index: int, blocks: int, samples: int, block: nn.Module) -> None:
        self._progress = progress
        self._index = index
        self._blocks = blocks
        self._samples = samples
        self._layers = len(block_linears(block))

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
    steps: _Steps,
    plans: Mapping[str, Any],
) -> QuantizedModel:
    """Layer by layer; the next block sees the outputs of the quantized block."""
    result = QuantizedModel({}, [])
    statistics: dict[str, LayerStatistics] = {}
    if stream is not None:
        statistics = stream.collect(index, method.needs, steps.inputs)
    linears = block_linears(blocks.blocks[index])
    for done, (name, linear) in enumerate(linears.items(), start=1):
        context = _context(blocks, index, name, plans)
        seen = statistics.get(name)
        arguments = Arguments(linear.weight, seen)
        start = time.perf_counter()
        try:
            packed = method.quantize_linear(linear.weight, seen, context)
        except NumericalError as error:
            raise NumericalError(f"{context.name}: {error}") from error
        seconds = time.perf_counter() - start
        arguments.check(method, context.name)
        hessian = None if seen is None else seen.hessian
        result.layers.append(log_layer(method, linear.weight, packed, hessian, seconds, context))
        result.packed[context.name] = packed.to("cpu")
        put_decoded(linear, packed)
        steps.layer(done, name)
    if stream is not None and index + 1 < len(blocks.blocks):
        stream.advance(index, steps.outputs)
    return result


def _quantize_block(
    blocks: Blocks,
    index: int,
    method: QuantizationMethod,
    stream: BlockStream | None,
    steps: _Steps,
    plans: Mapping[str, Any],
) -> QuantizedModel:
    """The whole block at once; the next block sees the outputs that the method's `stream` says."""
    assert stream is not None
    result = QuantizedModel({}, [])
    block = blocks.blocks[index]
    outputs = None if method.stream == "quantized" else stream.outputs(index, steps.inputs)
    view = stream.view(index)
    if method.stream == "both":
        view = replace(view, targets=outputs, unquantized=stream.unquantized)
    contexts = {name: _context(blocks, index, name, plans) for name in view.linears}
    name_of_block = blocks.name(index, "").rstrip(".")
    arguments = BlockArguments(view)
    start = time.perf_counter()
    try:
        found = method.quantize_block(view, contexts)
    except NumericalError as error:
        raise NumericalError(f"{name_of_block}: {error}") from error
    seconds = (time.perf_counter() - start) / len(view.linears)
    arguments.check(method, found, name_of_block)
    parameters = dict(block.named_parameters())
    for name in found.folded:
        result.folded[blocks.name(index, name)] = parameters[name].detach().clone()
    for name, linear in view.linears.items():
        target = found.targets.get(name, linear.weight)
        packed, context = found.packed[name], contexts[name]
        result.layers.append(log_layer(method, target, packed, found.hessians.get(name), seconds, context))
        result.packed[context.name] = packed.to("cpu")
        put_decoded(linear, packed)
    steps.layer(len(view.linears), "layers")
    if outputs is not None and method.stream == "unquantized":
        stream.hidden = outputs
    elif index + 1 < len(blocks.blocks):
        stream.unquantized = outputs
        stream.advance(index, steps.outputs)
    return result


def _context(blocks: Blocks, index: int, name: str, plans: Mapping[str, Any]) -> LayerContext:
    full = blocks.name(index, name)
    bias = block_linears(blocks.blocks[index])[name].bias
    copy = None if bias is None else bias.detach().clone()
    return LayerContext(full, index, len(blocks.blocks), plan=plans.get(full), bias=copy)


def _survey(
    model: nn.Module, blocks: Blocks, count: int, windows: Tensor, placement: Placement
) -> dict[str, LayerSurvey]:
    """All layers as the unquantized model feeds them, for methods that plan for the whole model."""
    stream = BlockStream(model, blocks, windows)
    survey = {}
    for index, block in enumerate(blocks.blocks[:count]):
        placement.bring(block)
        for name, seen in stream.collect(index, "hessian").items():
            linear = stream.view(index).linears[name]
            trace = float(seen.hessian.diagonal().sum(dtype=torch.float64))
            survey[blocks.name(index, name)] = LayerSurvey(linear.out_features, linear.in_features, trace)
        stream.advance(index)
    return survey
