"""One run that measures running: decode throughput, or memory. Its record has the form of every other run's.

Weights are those of a model that was quantized here (or before, and kept), or random ones of a catalogued shape.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from harness.environment import environment_record, runtime_fingerprint
from harness.evaluations import check_model
from harness.ledger import build_ledger
from harness.metrics.phases import Phases
from harness.models.blocks import model_linears
from harness.models.load import DTYPES, LoadedModel, load_model
from harness.models.placement import Placement
from harness.quantize import check_shapes
from harness.runner import Progress, calibration_text, quantize_or_load
from harness.runtime.architecture import Architecture, catalogued, of_config
from harness.runtime.build import FUSED, BlockMade, MakeProduct, MakeWeights, layer_of, model_weights, nothing_more
from harness.runtime.decoder import Weights
from harness.runtime.measure import Subject, measure_decode, measure_memory
from harness.runtime.synthetic import synthetic_layer, synthetic_weights
from harness.runtime.synthetic_ledger import synthetic_ledger
from harness.spec import UNQUANTIZED, DecodeSpec, MemorySpec, RunSpec, RuntimeSpec
from kernels.errors import InputError
from kernels.layouts import PackedWeight
from methods import QuantizationMethod, create_method


@dataclass
class _Source:
    """Where weights come from. architecture: their shape. layer: the packed weights of block 0, by the names of
    `Architecture.linears`. weights: of a whole model, with products that `make` makes. ledger, described, quantization:
    for the record.

    Packed weights lie in host memory, of which products on a device are made: there is nothing beside them there that a
    deployment would not hold, and one source serves all evaluations of a run."""

    architecture: Architecture
    layer: dict[str, PackedWeight]
    weights: MakeWeights
    ledger: dict[str, Any]
    described: dict[str, Any]
    quantization: dict[str, Any] | None


def run_runtime(
    spec: RunSpec,
    *,
    reference: dict[str, Any] | None = None,
    fresh: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Carry out a run whose evaluations are decode and memory, and return its record.

    Raises InputError for a model whose blocks are unknown here, or a runtime that the device lacks.
    """
    method = create_method(spec.method.name, **spec.method.options)
    phases = Phases(spec.model.device)
    device, dtype = torch.device(spec.model.device), DTYPES[spec.model.dtype]
    evaluations = [part for part in spec.evaluations if isinstance(part, RuntimeSpec)]
    if len({part.synthetic for part in evaluations}) != 1:
        raise InputError("all that a run measures must be synthetic, or nothing")
    if any(part.runtime == "banded" for part in evaluations) and device.type != "cuda":
        raise InputError(f"--runtime banded needs a CUDA device, not {spec.model.device}; use --runtime resident")
    progress(0, 1, "loading")
    with phases.measure("load"):
        made = _synthetic if evaluations[0].synthetic else _real
        source = made(spec, method, phases, fresh, progress)
        gc.collect()
    _check_lengths(evaluations, source.architecture)
    metrics = []
    for part in evaluations:
        subject = Subject(
            name=f"{spec.model.name}{' (synthetic)' if part.synthetic else ''}",
            layer=_fused(source),
            weights=source.weights,
            unquantized=method.name == UNQUANTIZED,
            payload_bytes=source.ledger["payload_bytes"],
            device=device,
            dtype=dtype,
        )
        steps = partial(_with_label, progress, part.runtime)
        if isinstance(part, DecodeSpec):
            metrics.append(measure_decode(part, subject, phases, steps).as_record())
        elif isinstance(part, MemorySpec):
            metrics.append(measure_memory(part, subject, phases).as_record())
    return {
        "spec": spec.model_dump(mode="json"),
        "environment": {**environment_record(), "runtime_code": runtime_fingerprint()},
        "model": source.described,
        "method": {
            "name": method.name,
            "options": method.config.model_dump(mode="json"),
            "provenance": asdict(method.provenance),
        },
        "data": {"calibration": None, "evaluations": []},
        "metrics": metrics,
        "reference": None,
        "ledger": source.ledger,
        "layers": [],
        "phases": phases.measured,
        "quantization": source.quantization,
        "warnings": [],
    }


def _with_label(progress: Progress, what: str, done: int, total: int) -> None:
    progress(done, total, what)


def _check_lengths(evaluations: Sequence[RuntimeSpec], architecture: Architecture) -> None:
    known = architecture.positions
    for part in evaluations:
        if known is not None and part.prompt + part.tokens > known:
            raise InputError(
                f"prompt {part.prompt} and {part.tokens} tokens are more than the {known} positions of the model"
            )


def _fused(source: _Source) -> dict[str, list[PackedWeight]]:
    """The packed weights of block 0 by product."""
    parts = FUSED[source.architecture.block]
    return {name: [source.layer[part] for part in names] for name, names in parts.items()}


def _real(spec: RunSpec, method: QuantizationMethod, phases: Phases, fresh: bool, progress: Progress) -> _Source:
    loaded: LoadedModel = load_model(spec.model.name, spec.model.dtype, spec.model.device)
    check_model(spec, loaded)
    architecture = of_config(loaded.model.config)  # before anything long: are its blocks known?
    if loaded.placement.name != Placement.name:
        raise InputError(
            f"model {spec.model.name!r} does not fit on {spec.model.device}; use --synthetic --runtime banded"
        )
    check_shapes(loaded.model, method)
    calibration = calibration_text(spec, method, loaded)
    quantized, origin = quantize_or_load(spec, method, loaded, calibration, phases, fresh, progress)
    dtype = DTYPES[spec.model.dtype]
    ledger = build_ledger(loaded.model, quantized, origin["file_bytes"])
    packed = quantized.packed
    _let_go_of_dense(loaded.model)

    def weights(make: MakeProduct, made: BlockMade = nothing_more) -> Weights:
        return model_weights(loaded.model, packed, dtype, make, made)

    return _Source(architecture, layer_of(loaded.model, packed), weights, ledger, loaded.as_record(), origin)


def _let_go_of_dense(model: Any) -> None:
    """Products are made of packed weights; of the model itself embeddings, norms, biases and head are read."""
    for linear in model_linears(model).values():
        linear.weight.data = linear.weight.new_empty(0)


def _synthetic(spec: RunSpec, method: QuantizationMethod, phases: Phases, fresh: bool, progress: Progress) -> _Source:
    architecture = catalogued(spec.model.name)
    device, dtype = torch.device(spec.model.device), DTYPES[spec.model.dtype]
    layer = {name: weight.to("cpu") for name, weight in synthetic_layer(architecture, method, device).items()}

    def weights(make: MakeProduct, made: BlockMade = nothing_more) -> Weights:
        return synthetic_weights(architecture, layer, device, dtype, make, made)

    described = {"name": spec.model.name, "source": "synthetic", "class": architecture.block, "sha256": None}
    return _Source(architecture, layer, weights, synthetic_ledger(architecture, layer, method), described, None)
